"""Measure how long the stages take on this machine, and how many epochs fit into a given time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, StageName, StageSettings
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.runs.run import execute
from snscc_ray.training.workers import LocalWorker

# Seconds of each stage: work that is done once, and one epoch.
Seconds = dict[StageName, tuple[float, float]]

# Epochs to run: the first warms up, the second is measured.
_EPOCHS = 2
# If an epoch of all stages takes less than the first, measure again on four times the rows. Do so
# at least once, to separate what grows with the rows, unless an epoch takes more than the second.
_ENOUGH_SECONDS, _LONG_SECONDS = 1.0, 10.0
# Usable share of the given time. The rest is for checkpoints and for what a few steps do not show.
_SHARE = 0.95
# Largest share of a shortened stage that its warm-up takes.
_WARMUP_SHARE = 0.2


class _Clock(NullMonitor):
    """Record when each epoch ended, including all work that belongs to it."""

    def __init__(self) -> None:
        self.marks: dict[str, list[float]] = {}

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self.marks[stage] = [time.monotonic()]

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self.marks[stage].append(time.monotonic())


@dataclass(frozen=True)
class _Timed:
    """Seconds of one stage on a few rows."""

    warm_up: float  # extra time of the first epoch over the second, such as compiling kernels
    once: float  # outside the epochs
    epoch: float


def measure(recipe: Recipe, known: Catalog, images_NCHW: Tensor, device: torch.device) -> Seconds:
    """Run all stages for two epochs on a few rows, then on more, and scale to the whole dataset.

    The seconds of an epoch include its clean pass.
    """
    batches = [getattr(recipe, stage).batch_size for stage in STAGES]
    # Enough rows to fill the clusters and to have all neighbours.
    least = max(recipe.data.num_clusters, recipe.pretrain.mined_neighbors + 1)
    few = min(len(known), max(*batches, least))
    # Before the first measurement, assume that the time grows from zero.
    fewer, before = 0, dict.fromkeys(STAGES, 0.0)
    while True:
        timed = _measure(recipe, known, images_NCHW, device, few)
        seconds = sum(stage.epoch for stage in timed.values())
        enough = seconds > (_ENOUGH_SECONDS if fewer else _LONG_SECONDS)
        if few == len(known) or enough:
            break
        fewer, before = few, {stage: timed[stage].once for stage in STAGES}
        few = min(len(known), 4 * few)
    left = len(known) - few
    found: Seconds = {}
    for stage, of in timed.items():
        growth = max(of.once - before[stage], 0) / (few - fewer)
        found[stage] = of.warm_up + of.once + growth * left, of.epoch * len(known) / few
    return found


def _measure(
    recipe: Recipe, known: Catalog, images_NCHW: Tensor, device: torch.device, few: int
) -> dict[StageName, _Timed]:
    labels = None if known.labels is None else known.labels[:few]
    catalog = replace(known, ids=known.ids[:few], labels=labels)
    short = override(recipe, [f"{stage}.epochs={_EPOCHS}" for stage in STAGES])
    clock = _Clock()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = ResidentData(images_NCHW[:few], device)
        result = execute(short, catalog, data, folder, LocalWorker(folder, device), clock)
    found: dict[StageName, _Timed] = {}
    for stage in STAGES:
        begin, warm, end = clock.marks[stage]
        all_of_it = result.figures["stages"][stage]["seconds"]
        found[stage] = _Timed(
            max(2 * warm - begin - end, 0), max(all_of_it - (end - begin), 0), end - warm
        )
    return found


def within(recipe: Recipe, pace: Seconds, seconds: float, stages: Sequence[StageName]) -> Recipe:
    """Set as many epochs as end within `seconds`, in the recipe's proportion between the stages.

    Milestones keep their relative position, so that a schedule still ends where it should. A
    warm-up keeps its epochs as far as they are a small share. Stages that are not run or have no
    epochs do not change. Raises UserError if not even one epoch of each stage fits.
    """
    asked = {stage: getattr(recipe, stage).epochs for stage in stages}
    asked = {stage: epochs for stage, epochs in asked.items() if epochs}

    def epochs_at(share: float) -> dict[StageName, int]:
        return {stage: max(1, int(share * epochs)) for stage, epochs in asked.items()}

    def needed(share: float) -> float:
        once = sum(pace[stage][0] for stage in stages)
        return once + sum(pace[stage][1] * count for stage, count in epochs_at(share).items())

    seconds *= _SHARE
    if needed(0) > seconds:
        raise UserError(
            f"--budget: one epoch of each stage takes about {needed(0):.0f} s here, and only "
            f"{max(seconds, 0):.0f} s are left; give more time, or use a smaller encoder or "
            "data.limit"
        )
    low, high = 0.0, 1.0
    while asked and needed(high) <= seconds:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) <= seconds else (low, middle)
    changed: dict[str, StageSettings] = {
        stage: _lasting(getattr(recipe, stage), count) for stage, count in epochs_at(low).items()
    }
    return recipe.model_copy(update=changed)


def describe(recipe: Recipe, pace: Seconds, stages: Sequence[StageName]) -> str:
    """Return the epochs of each stage and their estimated minutes, in one line."""
    epochs = {stage: getattr(recipe, stage).epochs for stage in stages}
    total = sum(pace[stage][0] + pace[stage][1] * count for stage, count in epochs.items())
    counts = ", ".join(f"{stage} {count}" for stage, count in epochs.items())
    return f"epochs that fit: {counts}; about {total / 60:.1f} minutes"


def _lasting(settings: StageSettings, epochs: int) -> StageSettings:
    """Return the stage's settings for another number of epochs, with its schedule scaled."""
    share = epochs / settings.epochs
    # A proportional warm-up of a short run would be a step or two; it collapses (docs/log.md).
    warmup = settings.warmup_epochs
    changed: dict[str, Any] = {
        "epochs": epochs,
        "warmup_epochs": min(warmup, max(_WARMUP_SHARE * epochs, warmup * share)),
        "milestones": tuple(max(1, round(mark * share)) for mark in settings.milestones),
    }
    return settings.model_copy(update=changed)
