"""SimCLR (Chen et al., "A simple framework for contrastive learning", ICML 2020): Eq. 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snscc_ray.core import distributed
from snscc_ray.core.losses import nt_xent
from snscc_ray.models.encoders import PretextNet
from snscc_ray.training.context import Context


class Simclr:
    def __init__(self, context: Context, network: PretextNet) -> None:
        self.temperature = context.recipe.pretrain.temperature

    def loss(
        self, forward: nn.Module, views: tuple[Tensor, ...], size: int
    ) -> tuple[Tensor, Tensor]:
        # Gather view by view, so that the rows keep the order of a single process.
        first, second = (distributed.gather(z, size) for z in forward(torch.cat(views)).chunk(2))
        return nt_xent(first, second, self.temperature), first.detach()

    def after_step(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass
