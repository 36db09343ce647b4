"""Train: soft neighbours, cluster contrast and entropy (Eqs. 2-10), several heads at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snscc_ray import distributed, metrics, rng
from snscc_ray.config import StageName
from snscc_ray.data.resident import Batch
from snscc_ray.encoders import ClusterHeads, ClusterNet, out_features
from snscc_ray.kmeans import kmeans
from snscc_ray.neighbors import MinedNeighbors
from snscc_ray.stages.context import Context
from snscc_ray.stages.objectives import OBJECTIVES, Predictions, neighborhood
from snscc_ray.stages.pretrain import pretext_features
from snscc_ray.views import make_view


class Train:
    name: StageName = "train"

    def __init__(self, context: Context, pretext: nn.Module, mined: MinedNeighbors) -> None:
        """`pretext` is what Pretrain left; its encoder is trained further."""
        self.context = context
        self.settings = context.recipe.train
        nearest = slice(self.settings.num_neighbors)
        self._chance_NK = _cumulative(mined.confidence_NK[:, nearest]).to(context.device)
        self._neighbors_NK = mined.neighbors_NK[:, nearest].to(context.device).long()
        encoder = pretext.encoder
        assert isinstance(encoder, nn.Module)
        heads = ClusterHeads(
            self.settings,
            out_features(encoder),
            context.recipe.data.num_clusters,
            self.settings.num_heads,
        )
        self.network = context.place(ClusterNet(encoder, heads))
        self._health_NK = mined.neighbors_NK.cpu()

    def prepare(self) -> None:
        """Start the prototypes at k-means centres of the pretext features, one start per head."""
        if self.settings.head == "prototype":
            features_ND = pretext_features(self.context, self.network)
            clusters = self.context.recipe.data.num_clusters
            centres = [
                kmeans(features_ND, clusters, self.context.key("kmeans", head))[0]
                for head in range(self.settings.num_heads)
            ]
            self.network.heads.start_at(torch.stack(centres))

    def views(self, batch: Batch, epoch: int) -> tuple[Tensor, ...]:
        context, settings = self.context, self.settings
        rows_B = batch.rows_B

        def view(images: Tensor, rows: Tensor, kind: str) -> Tensor:
            chosen = settings.view if kind == "augmented" else settings.original_view
            key = context.key("train", epoch, kind)
            return make_view(images, rows, chosen, key, context.normalize)

        views = [
            view(batch.images_BCHW, rows_B, "original"),
            view(batch.images_BCHW, rows_B, "augmented"),
        ]
        if self._uses_mined:
            draw_B1 = rng.uniform(rows_B, context.key("train", epoch, "partner"), 1)
            place_B1 = torch.searchsorted(self._chance_NK[rows_B], draw_B1, right=True)
            place_B1 = place_B1.clamp(max=self._neighbors_NK.shape[1] - 1)
            partners_B = self._neighbors_NK[rows_B].gather(1, place_B1)[:, 0]
            views.append(view(context.data.take(partners_B), partners_B, "mined"))
        return tuple(views)

    @property
    def _uses_mined(self) -> bool:
        return self.settings.mined_weight > 0 and self.settings.objective != "paper"

    def begin_epoch(self, epoch: int) -> None:
        pass

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], rows_B: Tensor
    ) -> dict[str, Tensor]:
        z, logits = forward(torch.cat(views))
        features = [distributed.gather(part) for part in z.chunk(len(views))]
        near = neighborhood(features[0], features[1], self.settings)
        # Rows first for the gather, heads first for the losses.
        p_views = [
            distributed.gather(part.softmax(2).transpose(0, 1)).transpose(0, 1)
            for part in logits.chunk(len(views), dim=1)
        ]
        p = Predictions(p_views[0], p_views[1], p_views[2] if self._uses_mined else None)
        return OBJECTIVES[self.settings.objective](p, near, self.settings)

    def after_step(self) -> None:
        pass

    def end_epoch(self, epoch: int) -> dict[str, float]:
        figures, _ = self._measure_heads()
        return figures

    def finish(self) -> dict[str, float]:
        """Keep the head with the best label-free score."""
        figures, best = self._measure_heads()
        self.network.heads.keep(best)
        return figures

    def _measure_heads(self) -> tuple[dict[str, float], int]:
        p_NHC = probabilities(self.context, self.network)
        scores = []
        for p_NC in p_NHC.unbind(1):
            clusters_N = p_NC.argmax(1)
            clusters = self.context.recipe.data.num_clusters
            scores.append(metrics.health(clusters_N, self._health_NK, clusters)["health/score"])
        best = max(range(len(scores)), key=scores.__getitem__)
        confidence_N, clusters_N = p_NHC[:, best].max(1)
        return self.context.measure(clusters_N, self._health_NK, confidence_N), best

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


def probabilities(context: Context, network: nn.Module) -> Tensor:
    """Cluster probabilities of the clean images, (N, H, C), on the CPU."""
    return context.clean_pass(network, lambda x: network(x)[1].softmax(2).transpose(0, 1)).cpu()


def _cumulative(confidence_NK: Tensor) -> Tensor:
    """Cumulative chance of drawing each neighbour, in proportion to its confidence."""
    total = confidence_NK.sum(1, keepdim=True)
    # The nearest neighbour has confidence 1 by Def. 1, so the sum is never 0.
    return (confidence_NK / total).cumsum(1)
