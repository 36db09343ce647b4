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
from snscc_ray.config.settings import STAGES, Recipe, StageName, StageSettings
from snscc_ray.core.clustering.neighbors import knn
from snscc_ray.core.display import Display
from snscc_ray.core.threads import mapping, threads_of
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.data.loading.resident import Images, ResidentData
from snscc_ray.models.frozen import components_of, load_frozen
from snscc_ray.runs.banks import is_computed
from snscc_ray.runs.identity import bank_identity
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.runs.run import execute, normalisation
from snscc_ray.training.context import Context
from snscc_ray.training.stages.extract import batches_of, in_steps
from snscc_ray.training.workers import LocalWorker

# Seconds of each stage: work that is done once, and one epoch.
Seconds = dict[StageName, tuple[float, float]]

# Epochs to run: the first warms up, the second is measured.
_EPOCHS = 2
# If an epoch of all stages takes less than the first, measure again on four times the rows. Do so
# at least once, to separate what grows with the rows, unless an epoch takes more than the second.
_ENOUGH_SECONDS, _LONG_SECONDS = 1.0, 10.0
# Images per thread on which extraction is measured, and batches of features on which the heads are.
_FROZEN_ROWS, _BANK_BATCHES = 64, 8
# Usable share of the given time. The rest is for checkpoints and for what a few steps do not show.
_SHARE = 0.95
# Largest share of a shortened stage that its warm-up takes.
_WARMUP_SHARE = 0.2


# Longest run without --budget: users do not wait longer for a first answer.
_CPU_SECONDS, _GPU_SECONDS = 30 * 60.0, 2 * 3600.0


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


def paced(
    recipe: Recipe,
    catalog: Catalog,
    data: Images,
    device: torch.device,
    budget: float | None,
    display: Display,
    beside: Path,
) -> tuple[Recipe, float | None]:
    """Return the recipe with epochs that fit the time there is, and the expected seconds.

    budget: seconds; None: shorten only a run that would be longer than people wait. beside: the
    folder of runs whose features may be shared. Streamed images are not measured: the expected
    seconds are then None. Raises UserError.
    """
    frozen = recipe.encoder.frozen
    if not isinstance(data, ResidentData) and not frozen:
        if budget is not None:
            raise UserError("--budget needs images held in memory, not streamed; leave it out")
        display.line(
            "the images are streamed, so the time cannot be predicted; the ETA appears later"
        )
        return recipe, None
    display.line("measuring a few steps of each stage")
    pace = measure(recipe, catalog, data, device, beside)
    most = budget or (_GPU_SECONDS if device.type == "cuda" else _CPU_SECONDS)
    # Fewer epochs would hardly shorten a frozen encoder's run: most of it is extraction.
    if budget is not None or (not frozen and needed(recipe, pace, STAGES) > most):
        recipe = within(recipe, pace, most, STAGES)
    display.line(describe(recipe, pace, STAGES))
    return recipe, needed(recipe, pace, STAGES)


def measure(
    recipe: Recipe, known: Catalog, data: Images, device: torch.device, beside: Path
) -> Seconds:
    """Measure the stages here, and scale to the whole dataset.

    Images of an encoder that is trained must be in memory. Features of a frozen encoder take no
    time if a run in the folder `beside` has computed them.
    """
    if recipe.encoder.frozen:
        return _measure_frozen(recipe, known, data, device, beside)
    assert isinstance(data, ResidentData)
    return _measure_trained(recipe, known, data.images_NCHW, device)


def _measure_trained(
    recipe: Recipe, known: Catalog, images_NCHW: Tensor, device: torch.device
) -> Seconds:
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
        timed = _measure(recipe, known, ResidentData(images_NCHW[:few], device), few, device)
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
    recipe: Recipe, known: Catalog, data: Images, few: int, device: torch.device
) -> dict[StageName, _Timed]:
    labels = None if known.labels is None else known.labels[:few]
    catalog = replace(known, ids=known.ids[:few], labels=labels, digests=b"", stamps=None)
    short = recipe.model_copy(
        update={s: getattr(recipe, s).model_copy(update={"epochs": _EPOCHS}) for s in STAGES}
    )
    clock = _Clock()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        result = execute(short, catalog, data, folder, LocalWorker(folder, device), clock)
    found: dict[StageName, _Timed] = {}
    for stage in STAGES:
        # A bank of features has no Pretrain, and so no epochs.
        begin, warm, end = clock.marks.get(stage, [0.0] * 3)
        all_of_it = result.figures["stages"][stage]["seconds"]
        found[stage] = _Timed(
            max(2 * warm - begin - end, 0), max(all_of_it - (end - begin), 0), end - warm
        )
    return found


def _measure_frozen(
    recipe: Recipe, known: Catalog, data: Images, device: torch.device, beside: Path
) -> Seconds:
    """Measure extraction on a few images, and the other stages on random features.

    The neighbours of a row are searched among all rows, so that search is timed at full size.
    """
    if isinstance(data, FeatureBank):  # given embeddings: their views are made after mining
        return _measure_bank(recipe, known, 0.0, 0, data.width, device)
    context = Context(recipe, data, None, normalisation(recipe, known), device)
    views, frozen = recipe.encoder.views, load_frozen(recipe)[0]
    if is_computed(bank_identity(recipe, known.fingerprint, mixed=context.mixed), beside):
        return _measure_bank(recipe, known, 0.0, views, frozen.out_features, device)
    frozen.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    count = min(len(known), _FROZEN_ROWS * threads_of(device))
    batches = list(batches_of(data, [(0, count)]))
    with mapping(device) as mapped:
        began = 0.0
        for _ in range(2):  # the first warms up
            began = time.monotonic()
            list(in_steps(context, frozen, batches, mapped))
    extraction = (time.monotonic() - began) * len(known) / count
    return _measure_bank(recipe, known, extraction, views, frozen.out_features, device)


def _measure_bank(
    recipe: Recipe,
    known: Catalog,
    extraction: float,
    views: int,
    width: int,
    device: torch.device,
) -> Seconds:
    """Measure the stages on random features; `extraction` is added to the first."""
    batches = [recipe.train.batch_size, recipe.boost.batch_size]
    least = max(recipe.data.num_clusters, recipe.pretrain.mined_neighbors + 1)
    few = min(len(known), max(*(_BANK_BATCHES * batch for batch in batches), least))
    # Random rows with the spread of real ones; their values do not affect the time.
    generator = torch.Generator().manual_seed(0)
    shape = (few, 1 + views, width)
    random_NVD = torch.randn(shape, generator=generator).half().numpy()
    bank = FeatureBank([random_NVD], device)
    timed = _measure(recipe, known, bank, few, device)
    components = components_of(recipe, width, few)
    rows_ND = torch.from_numpy(random_NVD[:, 0, :components]).float().to(device)
    began = time.monotonic()
    repeats = -(-len(known) // few)
    knn(rows_ND.repeat(repeats, 1)[: len(known)], 1, rows=(0, few))
    search = (time.monotonic() - began) * len(known) / few
    found: Seconds = {}
    for stage, of in timed.items():
        share = len(known) / few
        found[stage] = of.warm_up + of.once * share, of.epoch * share
    once, epoch = found["pretrain"]
    found["pretrain"] = once + extraction + search, epoch
    return found


def needed(recipe: Recipe, pace: Seconds, stages: Sequence[StageName]) -> float:
    """Return the expected seconds of these stages with the recipe's epochs."""
    epochs: dict[StageName, int] = {stage: getattr(recipe, stage).epochs for stage in stages}
    return sum(pace[stage][0] + pace[stage][1] * epochs[stage] for stage in stages)


def within(recipe: Recipe, pace: Seconds, seconds: float, stages: Sequence[StageName]) -> Recipe:
    """Set as many epochs as end within `seconds`, in the recipe's proportion between the stages.

    Milestones keep their relative position, so that a schedule still ends where it should. A
    warm-up keeps its epochs as far as they are a small share. Stages that are not run or have no
    epochs do not change. Raises UserError if not even one epoch of each stage fits.
    """
    asked = {stage: getattr(recipe, stage).epochs for stage in stages}
    # A frozen encoder's Pretrain has no epochs, whatever its settings say.
    asked = {stage: epochs for stage, epochs in asked.items() if epochs and pace[stage][1]}

    def epochs_at(share: float) -> dict[StageName, int]:
        return {stage: max(1, int(share * epochs)) for stage, epochs in asked.items()}

    def lasting(share: float) -> float:
        once = sum(pace[stage][0] for stage in stages)
        return once + sum(pace[stage][1] * count for stage, count in epochs_at(share).items())

    seconds *= _SHARE
    if lasting(0) > seconds:
        raise UserError(
            f"--budget: one epoch of each stage takes about {lasting(0):.0f} s here, and only "
            f"{max(seconds, 0):.0f} s are left; give more time, or use a smaller encoder or "
            "data.limit"
        )
    low, high = 0.0, 1.0
    while asked and lasting(high) <= seconds:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lasting(middle) <= seconds else (low, middle)
    changed: dict[str, StageSettings] = {
        stage: _lasting(getattr(recipe, stage), count) for stage, count in epochs_at(low).items()
    }
    return recipe.model_copy(update=changed)


def describe(recipe: Recipe, pace: Seconds, stages: Sequence[StageName]) -> str:
    """Return the epochs of each stage and their estimated minutes, in one line."""
    shown = [s for s in stages if s != "pretrain" or not recipe.encoder.frozen]
    counts = ", ".join(f"{stage} {getattr(recipe, stage).epochs}" for stage in shown)
    text = f"epochs that fit: {counts}; about {needed(recipe, pace, stages) / 60:.1f} minutes"
    if recipe.encoder.frozen and "pretrain" in stages:
        text += f", {pace['pretrain'][0] / 60:.1f} of them before Train"
    return text


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
