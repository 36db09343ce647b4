"""Where a fit runs: the interface, and this process. The workers of a cluster are another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from snscc_ray.config.settings import Recipe
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.resident import Images
from snscc_ray.runs.finished import final_figures
from snscc_ray.runs.folder import read_recipe
from snscc_ray.runs.local import device_bytes, load
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.plan import Plan
from snscc_ray.runs.run import Result
from snscc_ray.training.workers import LocalWorker


class Machine(Protocol):
    """Loads images and trains on them."""

    @property
    def counts(self) -> Sequence[int]:
        """Every number of workers that may train."""
        ...

    @property
    def gpu(self) -> bool: ...

    @property
    def free_bytes(self) -> int:
        """Free memory of a worker's device."""
        ...

    def load(self, plan: Plan, folder: Path) -> Catalog:
        """Load the images for a run in `folder`. Raises UserError."""
        ...

    def images(self) -> Images:
        """Return the loaded images, for this process."""
        ...

    def run(self, recipe: Recipe, folder: Path, *, work: Callable[..., Result]) -> Result:
        """Train by `work`, which takes the arguments of `runs.run.execute`.

        Raises UserError, TrainingError or Interrupted.
        """
        ...


class Here:
    """This process, and one device."""

    counts = (1,)

    def __init__(self, device: torch.device, display: Display) -> None:
        self.device, self._display = device, display
        self._loaded: tuple[Catalog, Images] | None = None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def free_bytes(self) -> int:
        return device_bytes(self.device)

    def load(self, plan: Plan, folder: Path) -> Catalog:
        self._loaded = load(plan, self.device, self._display)
        return self._loaded[0]

    def images(self) -> Images:
        assert self._loaded is not None
        return self._loaded[1]

    def run(self, recipe: Recipe, folder: Path, *, work: Callable[..., Result]) -> Result:
        assert self._loaded is not None
        catalog, data = self._loaded
        monitor = RunMonitor(Journal(folder), self._display)
        try:
            worker = LocalWorker(folder, self.device)
            result = work(recipe, catalog, data, folder, worker, monitor)
            settings = read_recipe(folder).model_dump(mode="json")
            monitor.journal.hyperparameters(settings, final_figures(result.figures))
        finally:
            monitor.finish()
        return result
