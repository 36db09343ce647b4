"""Boost: cross-entropy and soft neighbours within confident pseudo-labels (Eqs. 11-14)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from snscc_ray.config.settings import StageName
from snscc_ray.core import distributed
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.clustering.neighbors import batch_neighbors
from snscc_ray.core.clustering.pseudo_labels import select_pseudo_labels
from snscc_ray.core.losses import (
    agreement,
    boost_soft_loss,
    pseudo_label_cross_entropy,
    same_label_pairs,
)
from snscc_ray.data.loading.resident import Batch, Viewer
from snscc_ray.models.encoders import ClusterNet
from snscc_ray.training.context import Context
from snscc_ray.training.stages.train import probabilities


class Boost:
    name: StageName = "boost"

    def __init__(
        self,
        context: Context,
        network: ClusterNet,
        mined: MinedNeighbors,
        p_NC: Tensor | None = None,
    ) -> None:
        """p_NC: the network's predictions of the clean images on the CPU, if they are known."""
        self.context = context
        self.settings = context.recipe.boost
        self.network = network
        self.labels_N = torch.full((len(context.data),), -1, device=context.device)
        self.restored = False
        self._health_NK = mined.neighbors_NK.cpu()
        self._start_score: float | None = None
        self._best_score = -1.0
        self._best_weights: dict[str, Tensor] = {}
        self.p_NC = p_NC

    def viewer(self, epoch: int) -> Viewer:
        keys = tuple(self.context.key("boost", epoch, kind) for kind in ("original", "augmented"))
        return self.context.viewer((None, self.settings.view), keys)

    def begin_epoch(self, epoch: int) -> None:
        """Select the epoch's pseudo-labels from a clean pass (Eq. 11)."""
        if self.p_NC is None:
            self.p_NC = probabilities(self.context, self.network)[:, 0]
        if self._start_score is None:
            self._start_score = self._measure()["health/score"]
            self._remember(self._start_score)
        self.labels_N = select_pseudo_labels(
            self.p_NC, self.settings.confidence_threshold, self.settings.top_fraction
        ).to(self.context.device)

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        z, logits = forward(torch.cat(views))
        z_BD = distributed.gather(z.chunk(2)[0].detach(), batch.size)
        original, augmented = (distributed.gather(part, batch.size) for part in logits[0].chunk(2))
        p_BC = original.softmax(1)
        if self.settings.selection == "batch":
            labels_B = select_pseudo_labels(
                p_BC.detach(), self.settings.confidence_threshold, self.settings.top_fraction
            )
        else:
            labels_B = self.labels_N[distributed.gather(batch.rows_B, batch.size)]
        near_BK, index_BK = batch_neighbors(
            z_BD,
            z_BD,
            self.settings.num_neighbors,
            same_rows=True,
            allowed_BM=same_label_pairs(labels_B, labels_B),
        )
        o_BK = agreement(augmented.softmax(1), p_BC, index_BK)
        return {
            "soft": self.settings.soft_weight
            * boost_soft_loss(o_BK, near_BK, self.settings.agreement),
            "label": self.settings.label_weight * pseudo_label_cross_entropy(augmented, labels_B),
        }

    def after_step(self) -> None:
        pass

    def end_epoch(self, epoch: int) -> dict[str, float]:
        # Keep the clean pass for the next epoch's selection.
        self.p_NC = probabilities(self.context, self.network)[:, 0]
        figures = self._measure()
        if figures["health/score"] > self._best_score:
            self._remember(figures["health/score"])
        return figures | {"health/selected_share": float((self.labels_N >= 0).double().mean())}

    def finish(self) -> dict[str, float]:
        """Restore the best weights if the label-free score fell by more than the tolerance."""
        if self.p_NC is None:
            self.p_NC = probabilities(self.context, self.network)[:, 0]
        figures = self._measure()
        start, allowed = self._start_score, self.settings.score_tolerance
        if start is not None and figures["health/score"] < start - allowed:
            self.network.load_state_dict(self._best_weights)
            self.p_NC = probabilities(self.context, self.network)[:, 0]
            self.restored = True
            figures = self._measure()
        return figures | {"health/restored": float(self.restored)}

    def _measure(self) -> dict[str, float]:
        assert self.p_NC is not None
        confidence_N, clusters_N = self.p_NC.max(1)
        return self.context.measure(clusters_N, self._health_NK, confidence_N)

    def _remember(self, score: float) -> None:
        self._best_score = score
        self._best_weights = copy.deepcopy(self.network.state_dict())

    def state(self) -> dict[str, Any]:
        return {
            "labels": self.labels_N,
            "start_score": self._start_score,
            "best_score": self._best_score,
            "best_weights": self._best_weights,
            "probabilities": self.p_NC,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels_N = state["labels"]
        self._start_score = state["start_score"]
        self._best_score = state["best_score"]
        self._best_weights = state["best_weights"]
        self.p_NC = None if state["probabilities"] is None else state["probabilities"].cpu()
