"""Where methods run: the interface, and this process. The workers of a cluster are another one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from snscc_ray.core.display import Display, Screen
from snscc_ray.data.imageset import Catalog, assemble
from snscc_ray.data.loading.resident import Images, ResidentData
from snscc_ray.runs.local import free_bytes
from snscc_ray.runs.plan import Plan

T = TypeVar("T")

# Does the piece of work of this name; returns its result, or a text: why it failed.
Work = Callable[[str, Catalog, Images, torch.device, Screen], T | str]


class Machine(Protocol):
    """Loads images, and does pieces of work on them."""

    @property
    def described(self) -> str: ...

    @property
    def several(self) -> bool:
        """Whether pieces are done at the same time, in other processes."""
        ...

    @property
    def image_bytes(self) -> int:
        """Memory for the images."""
        ...

    def load(self, plan: Plan, folder: Path) -> Catalog:
        """Load the images for a comparison in `folder`. Raises UserError."""
        ...

    def each(
        self,
        waits: Mapping[str, Sequence[str]],
        work: Work[T],
        max_failures: int,
        began: Callable[[str], None],
    ) -> Generator[tuple[str, T | str]]:
        """Do the pieces of work, and yield each with its result as it ends.

        waits: the name of each, and of those that it needs the results of. began: called with the
        name of a piece that begins. Raises Interrupted.
        """
        ...


class Here:
    """This process, and one device. It does one piece after the other, in order."""

    several = False

    def __init__(self, device: torch.device, display: Display) -> None:
        self._device, self._display = device, display
        self._loaded: tuple[Catalog, Images] | None = None

    @property
    def described(self) -> str:
        return str(self._device)

    @property
    def image_bytes(self) -> int:
        return free_bytes(self._device)

    def load(self, plan: Plan, folder: Path) -> Catalog:
        recipe = plan.recipe
        progress = self._display.counting("reading", "images")
        images = assemble(plan.rows, recipe.data, recipe.runtime.decode_workers, progress)
        self._display.finish()
        if images.catalog.skipped:  # fewer images than were checked
            plan.check(len(images))
        catalog = images.catalog.for_clusters(recipe.data.num_clusters)
        self._loaded = catalog, ResidentData(images.images, self._device)
        return catalog

    def each(
        self,
        waits: Mapping[str, Sequence[str]],
        work: Work[T],
        max_failures: int,
        began: Callable[[str], None],
    ) -> Generator[tuple[str, T | str]]:
        assert self._loaded is not None
        for name in waits:
            began(name)
            yield name, work(name, *self._loaded, self._device, self._display)
