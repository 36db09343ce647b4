"""The input and output of a comparison's methods, and training of their networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from snscc_ray.config.settings import Recipe
from snscc_ray.core import checkpoints
from snscc_ray.core.display import Screen
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.runs.identity import stage_identity
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.engine import fit
from snscc_ray.training.workers import LocalWorker

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class MethodResult:
    """The result of a method."""

    clusters_N: Tensor  # int64, on the CPU
    epochs: str = ""  # of each network, as in "100 + 30"
    note: str = ""


@dataclass(frozen=True)
class Features:
    """An encoder's features of the clean images, on the device."""

    context: Context
    """Of what starts from them (see `ours.Pretext`)."""
    rows_ND: Tensor
    """The features that Train starts from, of length 1."""
    spaces_ND: tuple[Tensor, ...]
    """The same for each encoder alone; with one encoder, `rows_ND` itself."""
    seconds: float
    """Of the run's stage that made them."""


@dataclass(frozen=True)
class Study:
    """The images, recipe and folder that a method of a comparison works with."""

    context: Context
    catalog: Catalog
    folder: Path  # of the comparison
    display: Screen
    seconds: list[float] = field(default_factory=list)
    """Of each part of the method, including parts that another method trained before."""
    shared: list[Features] = field(default_factory=list)
    """The features, once a method has asked for them (see `rows`)."""

    @property
    def clusters(self) -> int:
        return self.context.recipe.data.num_clusters

    @property
    def frozen(self) -> bool:
        """Whether the methods work on the features of a frozen encoder."""
        return self.context.recipe.encoder.frozen

    @property
    def data(self) -> ResidentData:
        data = self.context.data
        assert isinstance(data, ResidentData)
        return data

    def pixels(self) -> Tensor:
        """Return the images as rows in [0, 1], (N, channels · H · W) float32, on the CPU."""
        return self.data.images_NCHW.cpu().flatten(1).float().div_(255)

    def key(self, *parts: int | str) -> int:
        return self.context.key(*parts)

    def identity(self) -> str:
        """Return the identity of everything that determines a method's result."""
        return identity_of(self.context.recipe, self.catalog, self.context.data.order_name)

    def timed(self, compute: Callable[[], T]) -> T:
        began = time.monotonic()
        result = compute()
        self.seconds.append(time.monotonic() - began)
        return result

    def build(self, part: str, make: Callable[[], Network]) -> Network:
        """Build a network on the device. Its initial weights depend only on seed and part."""
        with torch.random.fork_rng():
            torch.manual_seed(self.key(part, "init"))
            return self.context.to_device(make())


def identity_of(recipe: Recipe, catalog: Catalog, order_name: str) -> str:
    """Return the identity of a method's result; `order_name` is that of the images."""
    return stage_identity(recipe, "boost", catalog.fingerprint, order_name)


def method_folder(folder: Path, part: str) -> Path:
    """Return the subfolder of a comparison for one part."""
    return folder / "methods" / part


def train(study: Study, part: str, stage: Stage) -> None:
    """Train the stage's network, resume its training, or load it if an earlier run finished it.

    Raises TrainingError on a NaN loss, Interrupted on SIGTERM or Ctrl-C.
    """
    place, device, identity = (
        method_folder(study.folder, part),
        study.context.device,
        study.identity(),
    )
    path = place / "final.pt"
    if path.exists():
        saved = checkpoints.load(path, device)
        if saved["identity"] == identity:
            checkpoints.load_weights(stage.network, saved["network"], path)
            study.seconds.append(saved["seconds"])
            return
    worker = LocalWorker(place, device)
    monitor = RunMonitor(Journal(place), study.display)
    try:
        study.timed(lambda: fit(stage, study.context, worker, monitor, identity))
    finally:
        monitor.finish()
    state = {
        "identity": identity,
        "network": stage.network.state_dict(),
        "seconds": study.seconds[-1],
    }
    checkpoints.save(path, state)
    (place / stage.name / "latest.pt").unlink(missing_ok=True)
