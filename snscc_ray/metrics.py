"""Two kinds of figures: `oracle/` needs labels and only measures; `health/` needs none."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

# A fixed number, whatever K a recipe trains with, so that runs compare.
HEALTH_NEIGHBORS = 10
# A fixed number as well, whatever γ is: Train, whose figure this also is, knows no γ.
CONFIDENT = 0.99


def oracle(labels_N: Tensor, clusters_N: Tensor) -> dict[str, float]:
    """ACC (best one-to-one match of clusters to labels, Kuhn 1955), NMI (arithmetic mean), ARI."""
    counts = _contingency(labels_N, clusters_N)
    rows, columns = linear_sum_assignment(-counts)
    truth, found = labels_N.cpu().numpy(), clusters_N.cpu().numpy()
    return {
        "oracle/acc": float(counts[rows, columns].sum() / len(truth)),
        "oracle/nmi": float(normalized_mutual_info_score(truth, found)),
        "oracle/ari": float(adjusted_rand_score(truth, found)),
    }


def _contingency(labels_N: Tensor, clusters_N: Tensor) -> np.ndarray:
    labels, clusters = labels_N.cpu().long(), clusters_N.cpu().long()
    size = int(max(labels.max(), clusters.max())) + 1
    return torch.bincount(clusters * size + labels, minlength=size * size).view(size, size).numpy()


def balance(clusters_N: Tensor, num_clusters: int) -> float:
    """Entropy of the cluster sizes over its largest value: 1 = equal sizes, 0 = one cluster."""
    share = torch.bincount(clusters_N, minlength=num_clusters).double() / len(clusters_N)
    return float(torch.special.entr(share).sum() / math.log(num_clusters))


def neighbor_agreement(clusters_N: Tensor, neighbors_NK: Tensor) -> float:
    """Share of the nearest pretext neighbours that stand in the row's own cluster."""
    nearest = neighbors_NK[:, :HEALTH_NEIGHBORS].long()
    return float((clusters_N[nearest] == clusters_N[:, None]).double().mean())


def health(
    clusters_N: Tensor,
    neighbors_NK: Tensor,
    num_clusters: int,
    confidence_N: Tensor | None = None,
) -> dict[str, float]:
    """Label-free figures of an assignment.

    `health/score` is neighbour agreement × balance. A product, because a collapsed assignment has
    agreement 1 and would win any sum; its balance is 0.
    """
    sizes = torch.bincount(clusters_N, minlength=num_clusters)
    even = balance(clusters_N, num_clusters)
    agree = neighbor_agreement(clusters_N, neighbors_NK)
    figures = {
        "health/score": agree * even,
        "health/neighbor_agreement": agree,
        "health/balance": even,
        # A cluster with under a tenth of an equal share is not in use.
        "health/clusters_in_use": int((sizes >= 0.1 * len(clusters_N) / num_clusters).sum()),
    }
    if confidence_N is not None:
        figures["health/confidence"] = float(confidence_N.double().mean())
        figures["health/confident_share"] = float((confidence_N >= CONFIDENT).double().mean())
    return figures


def warnings(figures: dict[str, float], num_clusters: int) -> dict[str, str]:
    """Named warnings that an epoch's label-free figures call for."""
    found = {}
    used = figures.get("health/clusters_in_use")
    if used is not None and used * 2 < num_clusters:
        found["collapse"] = (
            f"only {int(used)} of {num_clusters} clusters are in use; raise train.entropy_weight, "
            "or use train.head=prototype with train.agreement=linear"
        )
    if figures.get("health/selected_share") == 0:
        found["no-pseudo-labels"] = (
            "no image is as sure as boost.confidence_threshold asks, so there is nothing to learn "
            "from; lower it, or train longer before Boost"
        )
    return found
