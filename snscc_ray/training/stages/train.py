"""Train: soft neighbours, cluster contrast and entropy (Eqs. 2-10), several heads at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snscc_ray.config.settings import StageName
from snscc_ray.core import distributed, rng
from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.cut import cut_starts
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.clustering.neighbors import place_drawn
from snscc_ray.core.clustering.uneven import uneven_starts
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.data.loading.resident import Batch, ResidentData, Viewer
from snscc_ray.models.encoders import ClusterHeads, ClusterNet, out_features
from snscc_ray.training.context import Context
from snscc_ray.training.stages.objectives import OBJECTIVES, Predictions, neighborhood
from snscc_ray.training.stages.pretrain import pretext_features


class Train:
    name: StageName = "train"

    def __init__(self, context: Context, pretext: nn.Module, mined: MinedNeighbors) -> None:
        """`pretext` is the network that Pretrain trained; its encoder is trained further."""
        self.context = context
        self.settings = context.recipe.train
        nearest = slice(self.settings.num_neighbors)
        confidence_NK = mined.confidence_NK[:, nearest]
        # The nearest neighbour has confidence 1 by Def. 1, so the sum is never 0.
        self._host_chance_NK = confidence_NK / confidence_NK.sum(1, keepdim=True)
        self._host_neighbors_NK = mined.neighbors_NK[:, nearest].long()
        # Partners are drawn on the CPU, as their views are; predictions are looked up on their
        # own device.
        self._chance_NK = self._host_chance_NK.to(context.device)
        self._neighbors_NK = self._host_neighbors_NK.to(context.device)
        # Each row's last prediction in training. Neighbours attract to it, and an epoch is measured
        # by it, so that neither needs a separate pass.
        self._p_NHC: Tensor | None = None
        encoder = pretext.encoder
        assert isinstance(encoder, nn.Module)
        heads = ClusterHeads(
            self.settings,
            out_features(encoder),
            context.recipe.data.num_clusters,
            self.settings.num_heads,
        )
        self.network = context.to_device(ClusterNet(encoder, heads))
        self._health_NK = mined.neighbors_NK.cpu()

    def prepare(self, features_ND: Tensor | None = None) -> None:
        """Start the prototypes at clusters of the pretext features, other ones for each head.

        features_ND: those of `pretext_features`, if they are known.
        """
        if self.settings.head == "prototype":
            if features_ND is None:
                features_ND = pretext_features(self.context, self.network)
            centres_HCD = distributed.from_first(lambda: self._starts(features_ND))
            self.network.heads.start_at(centres_HCD)

    def _starts(self, features_ND: Tensor) -> Tensor:
        """Return centres (H, C, D), by `train.start`."""
        clusters, heads = self.context.recipe.data.num_clusters, self.settings.num_heads
        uneven, key = self.settings.max_imbalance, self.context.key("kmeans")
        progress = partial(self.context.count, "starts", unit="tried")
        cuts = {"kmeans": 0, "cut": heads, "both": (heads + 1) // 2}[self.settings.start]
        starts = []
        if cuts:
            starts.append(
                cut_starts(features_ND, self._health_NK, clusters, cuts, key, uneven, progress)
            )
        if (others := heads - cuts) and uneven > 1:
            starts.append(
                uneven_starts(features_ND, self._health_NK, clusters, uneven, others, key, progress)
            )
        elif others:
            keys = [self.context.key("kmeans", head) for head in range(others)]
            # One start each where the heads should differ.
            tries = 1 if cuts else 10
            found = []
            for own in keys:
                found.append(kmeans(features_ND, clusters, own, tries)[0])
                progress(len(found), others)
            starts.append(torch.stack(found))
        return torch.cat(starts)

    def viewer(self, epoch: int) -> Viewer:
        original, augmented, mined = (
            self.context.key("train", epoch, kind) for kind in ("original", "augmented", "mined")
        )
        first = self.settings.original_view
        two = self.context.viewer((first, self.settings.view), (original, augmented))
        if self._mined_from != "images":
            return two

        partner = self.context.viewer((first,), (mined,))

        def three(inputs: Tensor, rows_B: Tensor) -> tuple[Tensor, ...]:
            data = self.context.data
            assert isinstance(data, ResidentData | FeatureBank)
            partners_B = self._partners(rows_B, epoch)
            return *two(inputs, rows_B), *partner(data.take(partners_B), partners_B)

        return three

    def _partners(self, rows_B: Tensor, epoch: int) -> Tensor:
        """Draw one mined neighbour of each row by its confidence, on the CPU."""
        draw_B1 = rng.uniform(rows_B, self.context.key("train", epoch, "partner"), 1)
        place_B1 = place_drawn(self._host_chance_NK[rows_B], draw_B1)
        return self._host_neighbors_NK[rows_B].gather(1, place_B1)[:, 0]

    @property
    def _mined_from(self) -> str | None:
        unused = self.settings.mined_weight == 0 or self.settings.objective == "paper"
        return None if unused else self.settings.mined_from

    def begin_epoch(self, epoch: int) -> None:
        if self._p_NHC is None:
            self._p_NHC = probabilities(self.context, self.network).to(self.context.device)

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        z, logits = forward(torch.cat(views))
        features = [distributed.gather(part, batch.size) for part in z.chunk(len(views))]
        near = neighborhood(features[0], features[1], self.settings)
        # The gather needs rows first, the losses need heads first.
        p_views = [
            distributed.gather(part.softmax(2).transpose(0, 1), batch.size).transpose(0, 1)
            for part in logits.chunk(len(views), dim=1)
        ]
        rows_B = distributed.gather(batch.rows_B, batch.size)
        p = Predictions(p_views[0], p_views[1], self._mined_HBC(p_views, rows_B))
        terms = OBJECTIVES[self.settings.objective](p, near, self.settings)
        assert self._p_NHC is not None
        self._p_NHC[rows_B] = p_views[0].detach().float().transpose(0, 1)
        return terms

    def _mined_HBC(self, p_views: list[Tensor], rows_B: Tensor) -> Tensor | None:
        """Return each row's target: one neighbour's prediction, or the mean over all K."""
        if self._mined_from != "predictions":
            return p_views[2] if self._mined_from else None
        assert self._p_NHC is not None
        p_BKHC = self._p_NHC[self._neighbors_NK[rows_B]]
        # Autocast would round the targets.
        with torch.autocast(rows_B.device.type, enabled=False):
            return torch.einsum("bk,bkhc->hbc", self._chance_NK[rows_B], p_BKHC)

    def after_step(self) -> None:
        pass

    def end_epoch(self, epoch: int) -> dict[str, float]:
        assert self._p_NHC is not None
        figures, _ = self._measure_heads(self._p_NHC.cpu())
        return figures

    def finish(self) -> dict[str, float]:
        """Keep the head with the best label-free score, on fixed features times its cohesion."""
        features_ND = None
        if self.context.recipe.encoder.frozen:
            features_ND = pretext_features(self.context, self.network).cpu()
        figures, best = self._measure_heads(probabilities(self.context, self.network), features_ND)
        self.network.heads.keep(best)
        return figures

    def _measure_heads(
        self, p_NHC: Tensor, features_ND: Tensor | None = None
    ) -> tuple[dict[str, float], int]:
        scores: list[float] = []
        heads = p_NHC.shape[1]
        for p_NC in p_NHC.unbind(1):
            self.context.count("measure", len(scores), heads, "heads")
            clusters_N = p_NC.argmax(1)
            clusters = self.context.recipe.data.num_clusters
            scores.append(
                metrics.health(
                    clusters_N,
                    self._health_NK,
                    clusters,
                    max_imbalance=self.settings.max_imbalance,
                )["health/score"]
            )
            if features_ND is not None:
                scores[-1] *= metrics.cohesion(features_ND, clusters_N, clusters)
        best = max(range(len(scores)), key=scores.__getitem__)
        confidence_N, clusters_N = p_NHC[:, best].max(1)
        return self.context.measure(clusters_N, self._health_NK, confidence_N), best

    def state(self) -> dict[str, Any]:
        return {"probabilities": self._p_NHC}

    def load_state(self, state: dict[str, Any]) -> None:
        self._p_NHC = state["probabilities"]


def probabilities(context: Context, network: nn.Module, rows: int | None = None) -> Tensor:
    """Return cluster probabilities (N, H, C) of the clean images (or first `rows`), on the CPU."""

    def both(x_BCHW: Tensor) -> Tensor:
        logits_HBC: Tensor = network(x_BCHW)[1]
        return logits_HBC.softmax(2).transpose(0, 1)

    return context.clean_pass(network, both, rows, "predictions").cpu()
