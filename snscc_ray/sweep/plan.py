"""What a sweep trains: each distinct stage once, however many trials need it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core import storage
from snscc_ray.runs.finished import finished, stage_folder
from tune_spaces.space import Point, Space

Kind = Literal["stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One point of a space with one seed, and its stages."""

    point: Point
    seed: int
    recipe: Recipe
    chain: dict[StageName, str]  # identities

    @property
    def name(self) -> str:
        return f"{self.point.label}, seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """One stage to train, for all trials that need it."""

    stage: StageName
    identity: str
    parent: str | None
    seed: int
    recipe: Recipe  # of the first trial that needs it
    overrides: dict[str, Any]  # of that trial


def check_points(space: Space, recipe: Recipe) -> None:
    """Raise a UserError that names every point with overrides the recipe does not accept."""
    wrong = []
    for point in space.points:
        try:
            override(recipe, _assignments(point))
        except UserError as error:
            wrong.append(f"{point.label}: {error}")
    if wrong:
        raise UserError(f"space {space.name}: {'; '.join(wrong)}")


def _assignments(point: Point) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in point.overrides.items()]


def trials_of(
    points: Sequence[Point],
    recipe: Recipe,
    seeds: int,
    identity: Callable[[Recipe, StageName], str],
) -> list[Trial]:
    """Make a trial of every point with the seeds recipe.seed, +1, ... Raises UserError."""
    trials = []
    for point, number in itertools.product(points, range(seeds)):
        own = override(recipe, [*_assignments(point), f"seed={recipe.seed + number}"])
        last = STAGES.index(point.last_stage or "boost")
        chain = {stage: identity(own, stage) for stage in STAGES[: last + 1]}
        trials.append(Trial(point, own.seed, own, chain))
    return trials


def jobs_of(trials: Sequence[Trial]) -> dict[StageName, list[Job]]:
    """Return the distinct stages of all trials, in training order."""
    jobs: dict[StageName, dict[str, Job]] = {stage: {} for stage in STAGES}
    for trial in trials:
        parent = None
        for stage, identity in trial.chain.items():
            job = Job(
                stage, identity, parent, trial.seed, trial.recipe, dict(trial.point.overrides)
            )
            jobs[stage].setdefault(identity, job)
            parent = identity
    return {stage: list(found.values()) for stage, found in jobs.items()}


def searched(jobs: Sequence[Job]) -> bool:
    """Return whether the jobs of a stage differ in more than their seed."""
    return len(jobs) > len({job.seed for job in jobs})


@dataclass(frozen=True)
class Ledger:
    """Record of what has been done.

    Finished stages are in a store shared between sweeps, and found by their identity. Each sweep
    records its stopped and failed trials in its own folder.
    """

    store: Path
    folder: Path

    def stage_folder(self, job: Job) -> Path:
        return stage_folder(self.store, job.stage, job.identity)

    def figures(self, stage: StageName, identity: str) -> dict[str, Any] | None:
        """Return the figures of a finished stage, or None."""
        return finished(stage_folder(self.store, stage, identity) / stage, stage, identity)

    def finished(self, job: Job) -> bool:
        return self.figures(job.stage, job.identity) is not None

    def ended(self, job: Job) -> bool:
        """Return whether nothing is left to do: the job is finished or was stopped early."""
        return self.finished(job) or self.read("stopped", job.identity) is not None

    def write(self, kind: Kind, identity: str, record: dict[str, Any]) -> None:
        storage.write_json(self.folder / kind / f"{identity}.json", record)

    def read(self, kind: Kind, identity: str) -> dict[str, Any] | None:
        path = self.folder / kind / f"{identity}.json"
        return dict(storage.read_json(path)) if path.exists() else None

    def forget(self, kind: Kind, identity: str) -> None:
        (self.folder / kind / f"{identity}.json").unlink(missing_ok=True)

    def lines(self, stage: StageName, identity: str) -> list[dict[str, Any]]:
        """Return the figures of the epochs trained so far."""
        path = stage_folder(self.store, stage, identity) / "metrics.jsonl"
        if not path.exists():
            return []
        found = []
        for text in path.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue  # cut short by a kill
        return [line for line in found if "warning" not in line]


def row_of(trial: Trial, space: Space, ledger: Ledger) -> dict[str, Any]:
    """Return a trial's row of the results table: settings, figures per stage, how it ended."""
    row: dict[str, Any] = {
        "space": space.name,
        "recipe": trial.recipe.name,
        "point": trial.point.label,
        "seed": trial.seed,
        "status": "finished",
        "reason": None,
        "stopped_at": None,
        **trial.point.overrides,
    }
    for stage, identity in trial.chain.items():
        figures = ledger.figures(stage, identity)
        if figures is not None:
            if stage == "pretrain" and "data.num_clusters" in trial.point.overrides:
                # Pretrain is shared by all numbers of clusters, but its k-means figures are not.
                figures = {"seconds": figures["seconds"]}
            row |= {f"{stage}/{name}": value for name, value in figures.items()}
            row[f"{stage}/epochs"] = getattr(trial.recipe, stage).epochs
            row[f"{stage}/folder"] = stage_folder(ledger.store, stage, identity).name
        elif (record := ledger.read("stopped", identity)) is not None:
            row["status"], row["stopped_at"] = "stopped", f"{stage} epoch {record['epoch']}"
            row |= {f"{stage}/{name}": value for name, value in record["figures"].items()}
            row[f"{stage}/epochs"] = record["epoch"]
            row[f"{stage}/folder"] = stage_folder(ledger.store, stage, identity).name
            break
        else:
            reason = (ledger.read("failed", identity) or {"reason": "not trained"})["reason"]
            row["status"], row["reason"] = "failed", f"{stage}: {reason}"
            break
    return row
