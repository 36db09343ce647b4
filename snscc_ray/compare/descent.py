"""An engine stage made of a network, a view function and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snscc_ray.config.settings import StageName, StageSettings, View
from snscc_ray.data.loading.resident import Batch, Viewer
from snscc_ray.training.context import Context


@dataclass
class Descent:
    """A stage for methods whose only state is their network."""

    network: nn.Module
    settings: StageSettings
    views: Callable[[int], Viewer]  # epoch to viewer
    terms: Callable[[nn.Module, tuple[Tensor, ...], Batch], dict[str, Tensor]]
    name: StageName = "train"  # the stage whose settings are used

    def viewer(self, epoch: int) -> Viewer:
        return self.views(epoch)

    def begin_epoch(self, epoch: int) -> None:
        pass

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        return self.terms(forward, views, batch)

    def after_step(self) -> None:
        pass

    def end_epoch(self, epoch: int) -> dict[str, float]:
        return {}

    def finish(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


def views_of(context: Context, part: str, *views: View | None) -> Callable[[int], Viewer]:
    """Return a function from an epoch to a viewer, which makes the given views of a batch.

    A view of None is the clean images. Views are drawn anew each epoch.
    """
    return lambda epoch: context.viewer(
        views, tuple(context.key(part, epoch, index) for index in range(len(views)))
    )
