"""The pretext methods Pretrain can train by; each is one file."""

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
    """What Pretrain asks of a method. The encoder, the views and the measuring are its own."""

    def loss(
        self, forward: nn.Module, views: tuple[Tensor, ...], size: int
    ) -> tuple[Tensor, Tensor]:
        """The loss of a global batch of `size` images, and what one view of each came out as,
        (B, P), gathered and without gradient. `forward` is the network, wrapped."""
        ...

    def after_step(self) -> None: ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the network."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


PRETEXTS: dict[str, Callable[[Context, PretextNet], Pretext]] = {
    "simclr": Simclr,
    "moco": Moco,
    "byol": Byol,
}


def build_pretext(context: Context, network: PretextNet) -> Pretext:
    """The recipe's method, training `network`."""
    return PRETEXTS[context.recipe.pretrain.method](context, network)
