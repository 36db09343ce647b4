"""Run `snscc sweep`, from the search space to the table, figure and verdicts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from snscc_ray.cluster.nodes import connected
from snscc_ray.cluster.scale import Scale
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core import storage
from snscc_ray.core.claim import claimed
from snscc_ray.core.display import Display
from snscc_ray.runs.folder import (
    IMAGES_FILE,
    check_apart,
    check_images,
    holds_something,
    note_images,
    remove_tree,
)
from snscc_ray.runs.identity import stage_identity
from snscc_ray.runs.monitor import write_hyperparameters
from snscc_ray.runs.pace import Seconds
from snscc_ray.sweep import results as sweep_results
from snscc_ray.sweep.cost import say_plan, what_sharing_saved
from snscc_ray.sweep.figures import draw
from snscc_ray.sweep.plan import Job, Ledger, Trial, check_points, jobs_of, row_of, trials_of
from snscc_ray.sweep.search import Search, at_once, by_optuna
from snscc_ray.sweep.session import Options, Session
from snscc_ray.sweep.verdicts import Best, best_setting, judge, rank_correlation
from tune_spaces import load
from tune_spaces.space import Point, Space

_PLAN, _NOTES = "sweep.json", "results.md"


@dataclass(frozen=True)
class Request:
    """The arguments of `snscc sweep`."""

    space: str  # a name, or FILE.py:FUNCTION
    recipe: Recipe
    folder: Path
    options: Options
    seeds: int = 3
    samples: int | None = None
    overwrite: bool = False
    dry: bool = False


@dataclass(frozen=True)
class Summary:
    """The results of a sweep."""

    folder: Path
    rows: list[dict[str, Any]]
    text: str


def run_sweep(request: Request, console: Console) -> Summary | None:
    """Run every trial of a space, sharing the stages they have in common.

    The same call again continues a stopped sweep. With `dry`, runs only a few steps of each stage,
    outside the folder, and prints the plan. Raises UserError, or Interrupted.
    """
    space = load(request.space)(request.recipe)
    check_points(space, request.recipe)
    check_apart(request.folder, request.recipe.data.path)
    with claimed(request.folder, Display(console).line):
        return _run(space, request, console)


def _run(space: Space, request: Request, console: Console) -> Summary | None:
    began = time.monotonic()
    folder, options, seeds = request.folder, request.options, request.seeds
    described = _describe(space, request)
    if not request.overwrite:
        _refuse_another(folder, described)
    with connected(Scale((1, 1), address=options.address)):
        session = Session(request.recipe, folder, options, console)
        if not request.overwrite:
            check_images(session.folder, session.images.catalog)
        search = _search(space, request, session.concurrent)
        if request.dry:
            trials = _trials(next(search), session, seeds)
            _say_plan(trials, session, session.measure(), console)
            return None
        if request.overwrite:  # keep the finished stages: they are found by identity
            for ours in ("stopped", "failed", "tune", "tensorboard"):
                remove_tree(session.folder / ours)
            (session.folder / IMAGES_FILE).unlink(missing_ok=True)
        storage.write_json(session.folder / _PLAN, described)
        note_images(session.folder, session.images.catalog)
        trials, rows = _train_all(space, session, search, seeds, console)
        curves = _curves(trials, session.ledger)
        _write_hyperparameters(trials, rows, session.folder)
    text = "\n\n".join(
        [
            *_findings(space, rows, options.metric, session.folder, curves),
            what_sharing_saved(trials, jobs_of(trials), session.ledger),
            f"This call took {time.monotonic() - began:.0f} s.",
        ]
    )
    whole = f"{sweep_results.markdown(space, rows)}\n\n{text}\n"
    storage.write_whole(session.folder / _NOTES, lambda file: file.write(whole.encode()))
    return Summary(folder, rows, text)


def _train_all(
    space: Space, session: Session, search: Search, seeds: int, console: Console
) -> tuple[list[Trial], list[dict[str, Any]]]:
    """Train the points of the search, round by round. Return all trials, and a row for each."""
    points, trials, seconds = next(search), list[Trial](), Seconds()
    while True:
        trials += _trials(points, session, seeds)
        jobs = jobs_of(trials)
        if not all(session.ledger.ended(job) for stage in STAGES for job in jobs[stage]):
            seconds = seconds or session.measure()
        _say_plan(trials, session, seconds, console)
        for stage in STAGES:
            ready = [
                job
                for job in jobs[stage]
                if job.parent is None or _parent_finished(job, session.ledger)
            ]
            session.train(stage, ready)
        rows = [row_of(trial, space, session.ledger) for trial in trials]
        try:
            points = search.send(_means(rows, session.options.metric, space.stages[-1]))
        except StopIteration:
            return trials, rows


def _trials(points: Sequence[Point], session: Session, seeds: int) -> list[Trial]:
    images = session.images

    def identity(own: Recipe, stage: StageName) -> str:
        return stage_identity(own, stage, images.catalog.fingerprint, images.order_name)

    return trials_of(points, session.recipe, seeds, identity)


def _say_plan(
    trials: Sequence[Trial], session: Session, seconds: Seconds, console: Console
) -> None:
    say_plan(console, trials, jobs_of(trials), session.ledger, session.concurrent, seconds)


def _search(space: Space, request: Request, places: int) -> Search:
    samples, seed = request.samples, request.recipe.seed
    if request.options.searcher == "optuna":
        # Enough points to fill all places; each is trained with every seed.
        together = max(1, places // request.seeds)
        return by_optuna(space, samples or len(space.points), seed, together)
    return at_once(space, samples, seed)


def _means(rows: list[dict[str, Any]], metric: str, stage: StageName) -> dict[str, float | None]:
    """Return each point's mean over seeds of a figure, or None if a seed lacks it."""
    found = {}
    for label in sweep_results.labels_of(rows):
        values = sweep_results.by_seed(rows, label, stage, metric)
        whole = len(values) == sum(row["point"] == label for row in rows)
        found[label] = sum(values.values()) / len(values) if whole else None
    return found


def _describe(space: Space, request: Request) -> dict[str, Any]:
    """Return what identifies the sweep, as values that JSON can hold."""
    described = {
        "space": space.name,
        "points": [dict(point.overrides) for point in space.points],
        "seeds": request.seeds,
        "samples": request.samples,
        "search": _searched_by(request.options),
        "recipe": request.recipe.model_dump(mode="json", exclude={"runtime"}),
    }
    return dict(json.loads(json.dumps(described)))


def _searched_by(options: Options) -> str:
    """Describe what decides which trials are run and which are stopped."""
    if options.searcher == "random" and options.scheduler == "none":
        return "nothing"
    return f"{options.searcher}, {options.scheduler}, by {options.metric}"


def _refuse_another(folder: Path, described: dict[str, Any]) -> None:
    """Raise UserError if the folder holds another sweep or something else."""
    if not holds_something(folder):
        return
    if not (folder / _PLAN).exists():
        raise UserError(f"{folder} already holds other files, but no sweep; use another --out")
    held = storage.read_json(folder / _PLAN)
    for name, value in described.items():
        if held.get(name) != value:
            raise UserError(
                f"{folder} holds a sweep with another {name}; use another --out, or --overwrite "
                "to replace it"
            )


def _parent_finished(job: Job, ledger: Ledger) -> bool:
    before = STAGES[STAGES.index(job.stage) - 1]
    return job.parent is not None and ledger.figures(before, job.parent) is not None


# ---------------------------------------------------------------------------------- the result


def _findings(
    space: Space,
    rows: list[dict[str, Any]],
    metric: str,
    folder: Path,
    curves: dict[str, dict[int, list[dict[str, Any]]]] | None,
) -> list[str]:
    """Write the table and the figure, and return the findings as sentences."""
    sweep_results.write_table(rows, folder)
    figures = draw(space, rows, folder, curves)
    last = space.stages[-1]
    truth = sweep_results.shown_metrics(rows)[0]
    said = [_best_line(space, best_setting(rows, metric, last), metric)]
    said += [judge(claim, rows, truth).text for claim in space.claims]
    said += sweep_results.shortfalls(space, rows)
    found = rank_correlation(rows, metric, stage=last)
    if found.pooled is not None and metric != truth:
        seeds = ", ".join("-" if r is None else f"{r:.2f}" for r in found.per_seed.values())
        said.append(
            f"{metric} ranks the {found.trials} trials as ACC does by {found.pooled:.2f} "
            f"(Spearman; seed by seed {seeds})."
        )
    return [*said, "Figures: " + ", ".join(str(path) for path in figures)]


def _best_line(space: Space, best: Best | None, metric: str) -> str:
    if best is None:
        return f"No trial has {metric}: there is no best setting."
    one = "one seed, no interval"
    spread = one if best.interval is None else f"± {best.interval:.3f}, 95 %, {best.seeds} seeds"
    return f"Best by {metric}: {space.axis} {best.label}, {best.mean:.3f} ({spread})."


def _curves(trials: Sequence[Trial], ledger: Ledger) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Return each trial's metrics for every epoch, for plots over epochs."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for trial in trials:
        epochs = [
            line
            for stage, identity in trial.chain.items()
            if stage != "pretrain"
            for line in ledger.lines(stage, identity)
        ]
        found.setdefault(trial.point.label, {})[trial.seed] = epochs
    return found


def _write_hyperparameters(
    trials: Sequence[Trial], rows: list[dict[str, Any]], folder: Path
) -> None:
    """Write a row of TensorBoard's HPARAMS page for each trial."""
    for trial, row in zip(trials, rows, strict=True):
        figures = {
            name: float(value)
            for name, value in row.items()
            if name.split("/")[0] in STAGES and isinstance(value, int | float)
        }
        name = f"{trial.point.label}-seed{trial.seed}".replace("/", "-").replace(" ", "")
        settings = dict(trial.point.overrides) | {"seed": trial.seed}
        if not is_url(folder):  # event files are appended to; an object store cannot do that
            write_hyperparameters(folder / "tensorboard" / name, settings, figures)
