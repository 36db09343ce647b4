"""The cost of a sweep: estimated before it, and measured after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from snscc_ray.config.settings import STAGES, StageName
from snscc_ray.runs.pace import Seconds
from snscc_ray.sweep.plan import Job, Ledger, Trial
from snscc_ray.texts import counted

Jobs = Mapping[StageName, Sequence[Job]]


def say_plan(
    console: Console,
    trials: Sequence[Trial],
    jobs: Jobs,
    ledger: Ledger,
    concurrent: int,
    seconds: Seconds,
) -> None:
    """Print how many jobs are left to train, shared and done, and about how long they take."""
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
    console.print(f"{counted(len(trials), 'trial')}, {concurrent} at a time:", highlight=False)
    console.print(table)
    if seconds:
        console.print(
            f"about {total / concurrent:.1f} minutes, measured from a few steps (one after the "
            f"other and without sharing: {_scratch(jobs, trials, seconds):.1f})",
            highlight=False,
        )


def _scratch(jobs: Jobs, trials: Sequence[Trial], seconds: Seconds) -> float:
    """Return the minutes that the trials would take if each trained all of its own stages."""
    total = 0.0
    for stage, found in jobs.items():
        if found:
            fixed, per_epoch = seconds[stage]
            mean = sum(getattr(job.recipe, stage).epochs for job in found) / len(found)
            total += sum(stage in trial.chain for trial in trials) * (fixed + per_epoch * mean)
    return total / 60


def what_sharing_saved(trials: Sequence[Trial], jobs: Jobs, ledger: Ledger) -> str:
    """Compare stages and measured seconds with each trial training its own, in a sentence."""
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
        f"Sharing stages: {shared} trained instead of {apart}, in {seconds:.0f} s instead of "
        f"{scratch:.0f} s (a share of {share:.2f})."
    )
    epochs, all_epochs = _epochs(jobs, ledger)
    if epochs < all_epochs:
        said += (
            f" Early stopping: {epochs:,} of {all_epochs:,} epochs trained "
            f"({epochs / all_epochs:.2f})."
        )
    return said


def _epochs(jobs: Jobs, ledger: Ledger) -> tuple[int, int]:
    """Return the epochs trained, and the epochs in full, without early stopping."""
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
