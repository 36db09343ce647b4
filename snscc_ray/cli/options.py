"""Options shared by several commands, and their handling."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from snscc_ray import texts
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path, expanded

if TYPE_CHECKING:
    from snscc_ray.cluster.scale import Scale

out = Console(markup=False, emoji=False)
SCALE = "Scale out"  # a panel of the help text

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="override any field of the recipe"),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="the Ray cluster to join: auto, or HOST:PORT  [default: RAY_ADDRESS, or Ray is "
        "started here]",
        rich_help_panel=SCALE,
    ),
]

Workers = Annotated[
    str,
    typer.Option(
        help="Ray workers, or MIN:MAX; 0: this process, without Ray",
        show_default=True,
        rich_help_panel=SCALE,
    ),
]
Gpu = Annotated[bool, typer.Option("--gpu", help="a GPU for each worker", rich_help_panel=SCALE)]
Cpus = Annotated[
    float | None,
    typer.Option(min=0.01, help="1 on a cluster; alone, an equal share", rich_help_panel=SCALE),
]
Wait = Annotated[
    float,
    typer.Option(min=0, help="seconds to wait for the workers to be placed", rich_help_panel=SCALE),
]


def overrides_of(settings: list[str] | None, seed: int | None, data: str | None) -> list[str]:
    found = list(settings or [])
    if seed is not None:
        found.append(f"seed={seed}")
    if data is not None:
        found.append(f"data.path={json.dumps(place_of(data))}")
    return found


def seconds_of(budget: str) -> float:
    """Parse 90s, 25m or 2h into seconds. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--budget {budget}: give a number and a unit, as in 90s, 25m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def place_of(data: str) -> str:
    """Return a URL unchanged and a path absolute: later commands may run in other folders."""
    return data if "://" in data else str(expanded(data).absolute())


def counts_of(workers: str) -> tuple[int, int] | None:
    """Parse the fewest and most workers, or None for this process. Raises UserError."""
    try:
        fewest, _, most = workers.partition(":")
        counts = int(fewest), int(most or fewest)
    except ValueError:
        counts = (-1, -1)
    if counts == (0, 0):
        return None
    if not 1 <= counts[0] <= counts[1]:
        raise UserError(f"--workers {workers}: give a number, 0 for none, or MIN:MAX as in 2:8")
    return counts


def scale_of(
    counts: tuple[int, int], gpu: bool, cpus: float | None, address: str | None, wait: float
) -> Scale:
    from snscc_ray.cluster.scale import Scale

    smaller = "leave --gpu out, or " * gpu + "ask for fewer --cpus-per-worker"
    return Scale(counts, gpu, cpus, address, wait, smaller=smaller)


def folder_in(storage: str | None, out_folder: str | None, name: str) -> Path:
    """Return the run folder: --out, or one with this name in --storage. Raises UserError."""
    if storage is not None and out_folder is not None:
        raise UserError(
            "--out is the run folder, and --storage is the folder that holds run folders; give one "
            "of them"
        )
    return as_path(out_folder or f"{(storage or 'runs').rstrip('/')}/{name}")


def launcher() -> Any:
    """Import the module of runs on Ray. Raises UserError if Ray is not installed."""
    ready_for_ray()
    try:
        from snscc_ray.cluster import run as launch
    except ImportError as error:
        raise UserError(
            f"--workers needs Ray ({error}); pip install 'ray[data,train,tune]', or leave "
            "--workers out"
        ) from error
    return launch


def ready_for_ray() -> None:
    """Set the home folder and user name that Ray needs, if a container's user has none."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.mkdtemp(prefix="snscc")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def refuse_alone(**given: object) -> None:
    """Raise UserError for options that have no effect without Ray workers."""
    for name, value in given.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} needs Ray workers; add --workers N")


def say(text: str) -> None:
    """Print one line, unformatted."""
    texts.say(out, text)


@contextmanager
def for_scripts(*, quiet: bool, aside: bool) -> Iterator[None]:
    """Print nothing to `out`, or to stderr: stdout then has only what `print` writes."""
    former = out.quiet, out.stderr
    out.quiet, out.stderr = quiet, aside
    try:
        yield
    finally:
        out.quiet, out.stderr = former


def fail(message: str, status: int) -> NoReturn:
    print("snscc: " + texts.shown(" ".join(message.split())), file=sys.stderr)
    sys.exit(status)
