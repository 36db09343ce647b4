"""BYOL (Grill et al., "Bootstrap your own latent", NeurIPS 2020): no negatives."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from snscc_ray.core import distributed
from snscc_ray.core.losses import byol_loss
from snscc_ray.models.encoders import PretextNet
from snscc_ray.training.context import Context
from snscc_ray.training.stages.pretext.momentum import follow


class Byol:
    """Each view predicts the projection of the other view by a momentum copy of the network."""

    def __init__(self, context: Context, network: PretextNet) -> None:
        self.settings = context.recipe.pretrain
        self.network = network
        self.steps = self.settings.epochs * context.data.steps(self.settings.batch_size)
        self.step = 0
        self.target = copy.deepcopy(network).requires_grad_(False)
        # The target outputs projections, so only the network that learns has a predictor.
        self.target.predictor = nn.Identity()

    def loss(
        self, forward: nn.Module, views: tuple[Tensor, ...], size: int
    ) -> tuple[Tensor, Tensor]:
        both = torch.cat(views)
        with torch.no_grad():
            t1, t2 = (distributed.gather(t, size) for t in self.target(both).chunk(2))
        q1, q2 = (distributed.gather(q, size) for q in forward(both).chunk(2))
        # Return the target's output, as a predictor could hide a collapse of the projections.
        return byol_loss(q1, q2, t1, t2), t1

    def after_step(self) -> None:
        self.step += 1
        leaders = [*self.network.encoder.parameters(), *self.network.projection.parameters()]
        follow(self.target, leaders, momentum(self.settings.key_momentum, self.step / self.steps))

    def state(self) -> dict[str, Any]:
        return {"target": self.target.state_dict(), "step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.target.load_state_dict(state["target"])
        self.step = state["step"]


def momentum(base: float, done: float) -> float:
    """1 - (1 - base) · (cos(π · done) + 1) / 2, from `base` to 1; `done` is the share of steps."""
    return 1 - (1 - base) * (math.cos(math.pi * done) + 1) / 2
