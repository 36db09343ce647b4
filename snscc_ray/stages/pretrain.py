"""Pretrain: instance discrimination, by SimCLR (Eq. 1) or MoCo-v2."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray import distributed
from snscc_ray.config import StageName, View
from snscc_ray.data.resident import Batch
from snscc_ray.encoders import PretextNet, build_encoder
from snscc_ray.kmeans import kmeans
from snscc_ray.losses import info_nce, nt_xent
from snscc_ray.neighbors import MinedNeighbors, mine
from snscc_ray.stages.context import Context, Viewer
from snscc_ray.views import Normalize, make_view


class Pretrain:
    name: StageName = "pretrain"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = context.recipe.pretrain
        data = context.recipe.data
        encoder = build_encoder(context.recipe.encoder, data.channels)
        self.network = context.place(PretextNet(encoder, self.settings))
        self.momentum = _MomentumEncoder(self) if self.settings.method == "moco" else None
        self.mined: MinedNeighbors | None = None
        self._last: Tensor | None = None

    def viewer(self, epoch: int) -> Viewer:
        return partial(
            _two_views,
            view=self.settings.view,
            key=self.context.key("pretrain", epoch),
            rows=len(self.context.data),
            normalize=self.context.normalize,
        )

    def begin_epoch(self, epoch: int) -> None:
        pass

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        if self.momentum is not None:
            query_BD = distributed.gather(forward(views[0]), batch.size)
            loss = self.momentum.loss(query_BD, views[1], batch.size)
            self._last = query_BD.detach()
        else:
            # Gathered view by view, so that the rows keep the order one process would have.
            first, second = (
                distributed.gather(z, batch.size) for z in forward(torch.cat(views)).chunk(2)
            )
            loss = nt_xent(first, second, self.settings.temperature)
            self._last = first.detach()
        return {"instance": loss}

    def after_step(self) -> None:
        if self.momentum is not None:
            self.momentum.follow(self.network)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        if self._last is None:
            return {}
        # 1: projections fill the sphere evenly; 0: all images are projected to one point.
        spread = self._last.float().std(0).square().sum().sqrt()
        return {"health/projection_spread": float(spread)}

    def finish(self) -> dict[str, float]:
        """Mine the neighbours, and measure what k-means finds in the features."""
        context = self.context
        features_ND = pretext_features(context, self.network)
        self.mined = mine(features_ND, context.recipe.pretrain.mined_neighbors)
        clusters = context.recipe.data.num_clusters
        _, assignment_N = distributed.from_first(
            lambda: kmeans(features_ND, clusters, context.key("kmeans"))
        )
        return context.measure(assignment_N, self.mined.neighbors_NK.cpu())

    def state(self) -> dict[str, Any]:
        return self.momentum.state() if self.momentum is not None else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.momentum is not None:
            self.momentum.load_state(state)


def _two_views(
    images_BCHW: Tensor, rows_B: Tensor, view: View, key: int, rows: int, normalize: Normalize
) -> tuple[Tensor, ...]:
    # Both in one call: for small images the calls cost more than the pixels. Row r's second view
    # is drawn as row N + r.
    twice_B = torch.cat([rows_B, rows_B + rows])
    return make_view(images_BCHW.repeat(2, 1, 1, 1), twice_B, view, key, normalize).chunk(2)


def pretext_features(context: Context, network: nn.Module) -> Tensor:
    """L2-normalised encoder features of the clean images, (N, D)."""
    encoder = network.encoder
    assert isinstance(encoder, nn.Module)
    return F.normalize(context.clean_pass(network, encoder), dim=1)


class _MomentumEncoder:
    """MoCo-v2: keys from a slowly following copy of the network, negatives from a queue."""

    def __init__(self, stage: Pretrain) -> None:
        self.settings = stage.settings
        self.context = stage.context
        self.network = copy.deepcopy(stage.network).requires_grad_(False)
        seed = torch.Generator().manual_seed(stage.context.key("queue"))
        queue = torch.randn(self.settings.queue_size, self.settings.projection_dim, generator=seed)
        self.queue_MD = F.normalize(queue, dim=1).to(stage.context.device)
        self.position = 0

    def loss(self, query_BD: Tensor, view_BCHW: Tensor, size: int) -> Tensor:
        with torch.no_grad():
            key_BD = distributed.gather(self.network(view_BCHW), size)
        loss = info_nce(query_BD, key_BD, self.queue_MD.clone(), self.settings.temperature)
        held = len(self.queue_MD)
        places = (self.position + torch.arange(len(key_BD), device=key_BD.device)) % held
        self.queue_MD[places] = key_BD
        self.position = (self.position + len(key_BD)) % held
        return loss

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        own: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(own, theirs, 1 - self.settings.key_momentum)

    def state(self) -> dict[str, Any]:
        return {
            "key_network": self.network.state_dict(),
            "queue": self.queue_MD,
            "position": self.position,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["key_network"])
        self.queue_MD.copy_(state["queue"])
        self.position = state["position"]
