"""MoCo-v2 (Chen et al., "Improved baselines with momentum contrastive learning", 2020)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.core import distributed
from snscc_ray.core.losses import info_nce
from snscc_ray.models.encoders import PretextNet
from snscc_ray.training.context import Context
from snscc_ray.training.stages.pretext.momentum import follow


class Moco:
    """Keys from a momentum copy of the network, negatives from a queue."""

    def __init__(self, context: Context, network: PretextNet) -> None:
        self.settings = context.recipe.pretrain
        self.network = network
        self.key_network = copy.deepcopy(network).requires_grad_(False)
        seed = torch.Generator().manual_seed(context.key("queue"))
        queue = torch.randn(self.settings.queue_size, self.settings.projection_dim, generator=seed)
        self.queue_MD = F.normalize(queue, dim=1).to(context.device)
        self.position = 0

    def loss(
        self, forward: nn.Module, views: tuple[Tensor, ...], size: int
    ) -> tuple[Tensor, Tensor]:
        query_BD = distributed.gather(forward(views[0]), size)
        with torch.no_grad():
            key_BD = distributed.gather(self.key_network(views[1]), size)
        loss = info_nce(query_BD, key_BD, self.queue_MD.clone(), self.settings.temperature)
        held = len(self.queue_MD)
        places = (self.position + torch.arange(len(key_BD), device=key_BD.device)) % held
        self.queue_MD[places] = key_BD
        self.position = (self.position + len(key_BD)) % held
        return loss, query_BD.detach()

    def after_step(self) -> None:
        follow(self.key_network, self.network.parameters(), self.settings.key_momentum)

    def state(self) -> dict[str, Any]:
        return {
            "key_network": self.key_network.state_dict(),
            "queue": self.queue_MD,
            "position": self.position,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.key_network.load_state_dict(state["key_network"])
        self.queue_MD.copy_(state["queue"])
        self.position = state["position"]
