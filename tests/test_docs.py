"""The pages: every command on them parses, and every name on them exists."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from snscc_ray import cli
from snscc_ray.answers.report.trust import TOLD_BY_FIGURES
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe
from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.imbalance import forced_warning
from snscc_ray.data.look import ImageStats
from snscc_ray.fit.choose import Preferences, choose

ROOT = Path(__file__).resolve().parents[1]
TROUBLE = "docs/when-it-goes-wrong.md"
GUIDE = "CONTRIBUTING.md"
# The log tells of fields that are no more; the estimator's page shows a wrong one, as a doctest.
OTHER_FIELDS = {"docs/log.md", "docs/estimator.md"}
PAGES = (
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
)
GROUP: Any = typer.main.get_command(cli.app)

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(
    r"(?<![\w/])((?:data|encoder|pretrain|train|boost|runtime)\.[a-z_]+(?:\.[a-z_]+)?)(?=[=`])"
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def commands(page: str) -> list[str]:
    """What a person would type: whole lines of blocks, and in backticks."""
    text = text_of(page)
    blocks = "\n".join(body for kind, body in _FENCED.findall(text) if kind != "python")
    lines = blocks.replace("\\\n", " ").splitlines()
    typed = [
        found[1]
        for line in lines
        if (found := re.match(r"(?:\$ |ray job submit -- )?(snscc [a-z].*)", line))
    ]
    inline = re.findall(r"`(snscc [^`]+)`", _FENCED.sub("", text))
    return [" ".join(command.split()) for command in typed + inline if "…" not in command]


def every_command() -> list[Any]:
    found = dict.fromkeys((page, command) for page in PAGES for command in commands(page))
    return [pytest.param(command, id=f"{page}: {command[:60]}") for page, command in found]


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """The name of the command and its parameters; nothing is called."""
    name, *words = shlex.split(command, comments=True)[1:]
    chosen = GROUP.get_command(GROUP.make_context("snscc", [name]), name)
    if chosen is None:
        raise UserError(f"no such command: {name}")
    if words in ([], ["--help"]):  # only named
        return name, {}
    return name, chosen.make_context(name, words).params


def bases(name: str, params: dict[str, Any]) -> list[Recipe]:
    """Recipes that the command may change."""
    if name == "fit" or params.get("recipe") == "auto":
        where = {"source": "auto", "path": "scans"}
        looks = [ImageStats(1000, 32, grey) for grey in (False, True)]
        return [
            choose("x", where, look, gpu=False, free_bytes=2**34, wishes=Preferences(10))[0]
            for look in looks
        ]
    return [recipes.get(params.get("recipe") or "images")]


@pytest.mark.parametrize("command", every_command())
def test_what_is_to_be_typed_parses(command: str) -> None:
    name, params = parsed(command)
    settings = params.get("settings") or ()
    for recipe in bases(name, params) if settings else ():
        override(recipe, settings)


def test_commands_are_found_and_wrong_ones_refused() -> None:
    for page in ("README.md", "docs/tutorial.md", "docs/fit.md", "docs/runs.md", TROUBLE):
        assert len(commands(page)) >= 5, page
    for wrong in ("snscc fitt scans", "snscc fit scans --cluster-count 3", "snscc predict runs/x"):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parsed(wrong)
    with pytest.raises(UserError, match=r"train\.epoch"):
        test_what_is_to_be_typed_parses("snscc fit scans --set train.epoch=3")


@pytest.mark.parametrize("page", sorted({*PAGES} - OTHER_FIELDS))
def test_every_field_that_is_named_is_a_field(page: str) -> None:
    text = text_of(page)
    named = {*_FIELD.findall(text), *re.findall(r"--set '?([a-z][\w.]*)=", text)}
    known = set(itertools.chain(*(fields(build()) for build in recipes.RECIPES.values())))
    assert named <= known
    assert named or page != TROUBLE


def fields(recipe: Recipe) -> set[str]:
    def walk(values: dict[str, Any], prefix: str) -> set[str]:
        found = {prefix + name for name in values}
        for name, value in values.items():
            if isinstance(value, dict):
                found |= walk(value, f"{prefix}{name}.")
        return found

    return walk(recipe.model_dump(), "")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", text_of(page))):
        if "://" in link or link.startswith("api.md#"):  # `make docs` checks those
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """As a forge names them: small letters and digits, a hyphen for each space."""
    titles = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_warning_is_explained_and_none_is_invented() -> None:
    figures = ("health/clusters_in_use", "health/projection_spread", "health/selected_share")
    worst = dict.fromkeys(figures, 0.0)
    real = {*metrics.warnings(worst, 10), *TOLD_BY_FIGURES, "nan-loss"}
    lines = re.findall(
        r"^(?:warning \w+ epoch \d+|snscc): ([a-z]+(?:-[a-z]+)*): (.+)$",
        text_of(TROUBLE),
        re.MULTILINE,
    )
    told = {name: message for name, message in lines if name in real or "-" in name}
    assert set(told) == real
    assert real <= set(re.findall(r"^\| `([a-z-]+)`", text_of(TROUBLE), re.MULTILINE))
    # Word for word, but for the numbers.
    forced = str(forced_warning(1.0)).removeprefix("forced-balance: ")
    exact = {**metrics.warnings(worst, 10), "forced-balance": forced}
    for name, message in exact.items():
        assert re.sub(r"[\d.]+", "0", told[name]) == re.sub(r"[\d.]+", "0", message)
    code = source()
    for name in real:
        assert f"{name}: " in code or f'"{name}"' in code, name


def test_every_page_is_on_the_site() -> None:
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert listed == {Path(page).name for page in PAGES} - {"README.md"}


def test_the_diffs_of_the_guide_for_contributors_fit_the_code() -> None:
    """What they leave and what they remove is in the files that they name."""
    diffs = [body for kind, body in _FENCED.findall(text_of(GUIDE)) if kind == "diff"]
    assert len(diffs) >= 8
    for body in diffs:
        for part in re.split(r"^\+\+\+ ", body, flags=re.MULTILINE)[1:]:
            file, *lines = part.splitlines()
            old = [line[1:] for line in lines if line.startswith((" ", "-"))]
            there = (ROOT / file).read_text("utf-8").splitlines() if old else []
            assert {*old} - {*there} == set(), file


def source() -> str:
    files = sorted((ROOT / "snscc_ray").rglob("*.py"))
    return "\n".join(file.read_text("utf-8") for file in files)


def test_every_figure_that_is_named_is_one() -> None:
    known = set(re.findall(r"(?:health|oracle)/\w+", source()))
    for page in PAGES:
        named = set(re.findall(r"(?:health|oracle)/\w+", text_of(page)))
        assert named <= known, page
