"""What a sweep costs: estimated from a few real steps before it, and counted after it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from snscc_ray import recipes
from snscc_ray.config import STAGES, Recipe, StageName
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.resident import ResidentData
from snscc_ray.monitor import Journal, RunMonitor
from snscc_ray.run import execute
from snscc_ray.sweep_plan import Job, Ledger, Trial
from snscc_ray.workers import LocalWorker

# Seconds of each stage: for what is done once, and for an epoch.
Seconds = dict[StageName, tuple[float, float]]
Jobs = Mapping[StageName, Sequence[Job]]

# Steps of each stage that the time of a sweep is estimated from.
_MEASURED_STEPS = 4


def measure(recipe: Recipe, known: Catalog, images_NCHW: Tensor, device: torch.device) -> Seconds:
    """Run all stages for one epoch of a few batches, and scale up to the whole set."""
    largest = max(getattr(recipe, stage).batch_size for stage in STAGES)
    rows = len(known)
    few = min(rows, _MEASURED_STEPS * largest)
    labels = None if known.labels is None else known.labels[:few]
    catalog = replace(known, ids=known.ids[:few], labels=labels)
    short = recipes.override(recipe, [f"{stage}.epochs=1" for stage in STAGES])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        monitor = RunMonitor(Journal(folder), Nowhere())
        data = ResidentData(images_NCHW[:few], device)
        result = execute(short, catalog, data, folder, LocalWorker(folder, device), monitor)
        monitor.finish()
        speed = {
            line["stage"]: line["images_per_second"]
            for text in (folder / "metrics.jsonl").read_text().splitlines()
            if "images_per_second" in (line := json.loads(text))
        }
    found: Seconds = {}
    for stage in STAGES:
        epoch = few / speed[stage]
        fixed = max(result.figures["stages"][stage]["seconds"] - epoch, 0)
        found[stage] = fixed * rows / few, epoch * rows / few
    return found


class Nowhere:
    """A `Screen` nobody looks at."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def line(self, text: str) -> None: ...

    def finish(self) -> None: ...


def say_plan(
    console: Console,
    trials: Sequence[Trial],
    jobs: Jobs,
    ledger: Ledger,
    concurrent: int,
    seconds: Seconds,
) -> None:
    """Print which of the jobs are left to train, which are shared, and for about how long."""
    table = Table("stage", "to train", "reused", "already there", "epochs", "minutes", box=None)
    total = 0.0
    for stage in STAGES:
        if not jobs[stage]:
            continue
        left = [job for job in jobs[stage] if not ledger.ended(job)]
        epochs = sum(
            getattr(job.recipe, stage).epochs - len(ledger.lines(stage, job.identity))
            for job in left
        )
        minutes = 0.0
        if seconds:
            fixed, per_epoch = seconds[stage]
            minutes = (fixed * len(left) + per_epoch * epochs) / 60
        total += minutes
        table.add_row(
            stage,
            str(len(left)),
            str(sum(stage in trial.chain for trial in trials) - len(jobs[stage])),
            str(len(jobs[stage]) - len(left)),
            str(epochs),
            f"{minutes:.1f}" if seconds else "-",
        )
    console.print(f"{len(trials)} trials, {concurrent} at a time:", highlight=False)
    console.print(table)
    if seconds:
        console.print(
            f"about {total / concurrent:.1f} minutes, from steps measured just now "
            f"(from scratch, one after the other: {_scratch(jobs, trials, seconds):.1f})",
            highlight=False,
        )


def _scratch(jobs: Jobs, trials: Sequence[Trial], seconds: Seconds) -> float:
    """Minutes that the trials would take if each trained all of its stages itself."""
    total = 0.0
    for stage, found in jobs.items():
        if found:
            fixed, per_epoch = seconds[stage]
            mean = sum(getattr(job.recipe, stage).epochs for job in found) / len(found)
            total += sum(stage in trial.chain for trial in trials) * (fixed + per_epoch * mean)
    return total / 60


def what_sharing_saved(trials: Sequence[Trial], jobs: Jobs, ledger: Ledger) -> str:
    """In a sentence: stages and measured seconds, against each trial training its own."""
    shared = sum(len(found) for found in jobs.values())
    apart = sum(len(trial.chain) for trial in trials)
    spent = {
        job.identity: (ledger.figures(stage, job.identity) or {"seconds": 0.0})["seconds"]
        for stage, found in jobs.items()
        for job in found
    }
    seconds = sum(spent.values())
    scratch = sum(spent[identity] for trial in trials for identity in trial.chain.values())
    share = seconds / scratch if scratch else 1.0
    said = (
        f"{shared} stages trained for {apart} that the trials consist of: {seconds:.0f} s of "
        f"training in place of {scratch:.0f} s ({share:.2f} of retraining each)."
    )
    epochs, all_epochs = _epochs(jobs, ledger)
    if epochs < all_epochs:
        said += (
            f" {epochs:,} epochs of the {all_epochs:,} that all of them take in full "
            f"({epochs / all_epochs:.2f})."
        )
    return said


def _epochs(jobs: Jobs, ledger: Ledger) -> tuple[int, int]:
    """How many were trained, and how many there are where nothing is stopped."""
    trained = total = 0
    for stage, found in jobs.items():
        for job in found:
            full: int = getattr(job.recipe, stage).epochs
            total += full
            if ledger.finished(job):
                trained += full
            elif stopped := ledger.read("stopped", job.identity):
                trained += stopped["epoch"]
    return trained, total
