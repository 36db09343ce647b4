"""Pretrain: train an encoder on two views of each image, by one of the methods in `pretext`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.config.settings import StageName, View
from snscc_ray.core import distributed
from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.mining import MinedNeighbors, mine
from snscc_ray.core.clustering.uneven import uneven_clusters
from snscc_ray.core.views import Normalize, make_view
from snscc_ray.data.loading.resident import Batch, Viewer
from snscc_ray.models.encoders import PretextNet, build_encoder
from snscc_ray.training.context import Context
from snscc_ray.training.stages.pretext import build_pretext


class Pretrain:
    name: StageName = "pretrain"

    def __init__(self, context: Context, encoder: nn.Module | None = None) -> None:
        """`encoder` is trained further; None: start with random weights."""
        self.context = context
        self.settings = context.recipe.pretrain
        data = context.recipe.data
        encoder = encoder or build_encoder(context.recipe.encoder, data.channels)
        self.network = context.to_device(PretextNet(encoder, self.settings))
        self.pretext = build_pretext(context, self.network)
        self.mined: MinedNeighbors | None = None
        self.features_ND: Tensor | None = None  # that they were mined in
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
        loss, self._last = self.pretext.loss(forward, views, batch.size)
        return {"instance": loss}

    def after_step(self) -> None:
        self.pretext.after_step()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        return {} if self._last is None else metrics.spread(self._last)

    def finish(self) -> dict[str, float]:
        """Mine the neighbours, and measure k-means and k-NN on the features."""
        context = self.context
        self.features_ND = pretext_features(context, self.network)
        self.mined = mine(self.features_ND, context.recipe.pretrain.mined_neighbors, context.count)
        return measure_features(context, self.features_ND, self.mined)

    def state(self) -> dict[str, Any]:
        return self.pretext.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.pretext.load_state(state)


def measure_features(
    context: Context, features_ND: Tensor, mined: MinedNeighbors
) -> dict[str, float]:
    """Return metrics of features: k-means clusters, balance of uneven clusters, k-NN accuracy.

    On a frozen encoder's features the balance of uneven clusters does not depend on the true sizes
    (docs/log.md), so it is left out.
    """
    clusters, key = context.recipe.data.num_clusters, context.key("kmeans")
    frozen = context.recipe.encoder.frozen
    progress = partial(context.count, "k-means", unit="iterations")

    def group() -> list[Tensor]:
        even_N = kmeans(features_ND, clusters, key, progress=progress)[1]
        if frozen:
            return [even_N]
        return [even_N, uneven_clusters(features_ND, clusters, key, progress=progress)[1]]

    even_N, *uneven = distributed.from_first(group)
    figures = context.measure(even_N, mined.neighbors_NK.cpu())
    if mined.recall < 1:
        figures["health/neighbor_recall"] = mined.recall
    for uneven_N in uneven:
        figures["health/free_balance"] = metrics.balance(uneven_N, clusters)
    if context.labels_N is not None:
        figures["oracle/knn_acc"] = metrics.knn_accuracy(
            context.labels_N.cpu(), mined.neighbors_NK, mined.distances_NK
        )
    return figures


def _two_views(
    images_BCHW: Tensor, rows_B: Tensor, view: View, key: int, rows: int, normalize: Normalize
) -> tuple[Tensor, ...]:
    # Both in one call, as on small images the calls cost more than the pixels. The second view of
    # row r is drawn as row N + r.
    twice_B = torch.cat([rows_B, rows_B + rows])
    return make_view(images_BCHW.repeat(2, 1, 1, 1), twice_B, view, key, normalize).chunk(2)


def pretext_features(context: Context, network: nn.Module) -> Tensor:
    """Return the L2-normalised encoder features of the clean images, (N, D)."""
    encoder = network.encoder
    assert isinstance(encoder, nn.Module)
    return F.normalize(context.clean_pass(network, encoder, task="features"), dim=1)
