"""The pretext methods of Pretrain, one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from snscc_ray.models.encoders import PretextNet
from snscc_ray.training.context import Context
from snscc_ray.training.stages.pretext.byol import Byol
from snscc_ray.training.stages.pretext.moco import Moco
from snscc_ray.training.stages.pretext.simclr import Simclr


class Pretext(Protocol):
    """Interface of a method. Pretrain owns the encoder, the views and the metrics."""

    def loss(
        self, forward: nn.Module, views: tuple[Tensor, ...], size: int
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a global batch of `size` images, and one view's outputs (B, P),
        gathered and without gradient. `forward` is the wrapped network."""
        ...

    def after_step(self) -> None: ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the network."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


PRETEXTS: dict[str, Callable[[Context, PretextNet], Pretext]] = {
    "simclr": Simclr,
    "moco": Moco,
    "byol": Byol,
}


def build_pretext(context: Context, network: PretextNet) -> Pretext:
    """Build the recipe's method for training `network`."""
    return PRETEXTS[context.recipe.pretrain.method](context, network)
