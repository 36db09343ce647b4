"""Two kinds of metrics: `oracle/` needs labels and only measures; `health/` needs no labels."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from snscc_ray.core.clustering.imbalance import enough_entropy

# Independent of a recipe's K, so that runs can be compared.
HEALTH_NEIGHBORS = 10
# The values of Wu et al. and later papers (which use 200 neighbours on ImageNet).
KNN_NEIGHBORS, KNN_TEMPERATURE = 20, 0.07
# Independent of γ, as Train reports this figure too and has no γ.
CONFIDENT = 0.99
# Networks that learned stayed above .4 from their first epoch on.
_COLLAPSED_SPREAD = 0.05


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


def knn_accuracy(labels_N: Tensor, neighbors_NK: Tensor, distances_NK: Tensor) -> float:
    """Leave-one-out k-NN accuracy over the whole dataset.

    Up to 20 neighbours of L2-normalised features vote with weight exp(cosine / 0.07) (Wu et al.,
    "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018).
    `distances_NK` are Euclidean: cosine = 1 - d² / 2. On equal votes the lowest label wins.
    """
    nearest_NK = neighbors_NK[:, :KNN_NEIGHBORS].long()
    cosine_NK = 1 - distances_NK[:, :KNN_NEIGHBORS].double().square() / 2
    named_NK = labels_N.long()[nearest_NK]
    votes = torch.zeros(len(labels_N), int(labels_N.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, named_NK, (cosine_NK / KNN_TEMPERATURE).exp())
    return float((votes.argmax(1) == labels_N).double().mean())


def confusion(labels_N: Tensor, clusters_N: Tensor) -> tuple[np.ndarray, list[int | None]]:
    """Count the images of each label (rows) in each cluster, and match a cluster to each label.

    The match is that of `oracle`'s ACC; with fewer clusters than labels, some labels have None.
    """
    labels, clusters = int(labels_N.max()) + 1, int(clusters_N.max()) + 1
    counts = _contingency(labels_N, clusters_N).T[:labels, :clusters]
    rows, columns = linear_sum_assignment(-counts)
    matched = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return counts, [matched.get(label) for label in range(labels)]


def _contingency(labels_N: Tensor, clusters_N: Tensor) -> np.ndarray:
    labels, clusters = labels_N.cpu().long(), clusters_N.cpu().long()
    size = int(max(labels.max(), clusters.max())) + 1
    return torch.bincount(clusters * size + labels, minlength=size * size).view(size, size).numpy()


def balance(clusters_N: Tensor, num_clusters: int) -> float:
    """Entropy of the cluster sizes over its maximum: 1 = equal sizes, 0 = one cluster."""
    share = torch.bincount(clusters_N, minlength=num_clusters).double() / len(clusters_N)
    return float(torch.special.entr(share).sum() / math.log(num_clusters))


def neighbor_agreement(clusters_N: Tensor, neighbors_NK: Tensor) -> float:
    """Share of the nearest pretext neighbours that are in the row's own cluster."""
    nearest = neighbors_NK[:, :HEALTH_NEIGHBORS].long()
    return float((clusters_N[nearest] == clusters_N[:, None]).double().mean())


def health(
    clusters_N: Tensor,
    neighbors_NK: Tensor,
    num_clusters: int,
    confidence_N: Tensor | None = None,
    max_imbalance: float = 1.0,
) -> dict[str, float]:
    """Label-free figures of an assignment.

    `health/score` is neighbour agreement × balance. A collapsed assignment has agreement 1 and
    would win any sum, but its balance is 0.
    """
    sizes = torch.bincount(clusters_N, minlength=num_clusters)
    even = balance(clusters_N, num_clusters)
    enough = enough_entropy(num_clusters, max_imbalance) / math.log(num_clusters)
    agree = neighbor_agreement(clusters_N, neighbors_NK)
    figures = {
        "health/score": agree * min(1.0, even / enough),
        "health/neighbor_agreement": agree,
        "health/balance": even,
        # A cluster with under a tenth of an equal share is not in use.
        "health/clusters_in_use": int((sizes >= 0.1 * len(clusters_N) / num_clusters).sum()),
    }
    if confidence_N is not None:
        figures["health/confidence"] = float(confidence_N.double().mean())
        figures["health/confident_share"] = float((confidence_N >= CONFIDENT).double().mean())
    return figures


def cohesion(rows_ND: Tensor, clusters_N: Tensor, num_clusters: int) -> float:
    """Return the mean cosine between rows of length 1 and the mean of their cluster.

    This is what spherical k-means maximises (Dhillon & Modha, Machine Learning 2001). It compares
    assignments of the same rows only.
    """
    sums_CD = torch.zeros(num_clusters, rows_ND.shape[1], dtype=torch.float64)
    sums_CD.index_add_(0, clusters_N, rows_ND.double())
    return float(sums_CD.norm(dim=1).sum()) / len(rows_ND)


def spread(z_BD: Tensor) -> dict[str, float]:
    """Label-free figures of unit projections, to see whether they still tell images apart.

    `health/projection_spread` is the norm of their standard deviations: 1 if they fill the sphere
    evenly, 0 if all are one point. `health/effective_rank` is the number of directions they use,
    of min(B, D): exp of the entropy of the singular values (Roy & Vetterli, EUSIPCO 2007;
    Garrido et al., "RankMe", ICML 2023).
    """
    z_BD = z_BD.float()
    values = torch.linalg.svdvals(z_BD)
    share = values / values.sum().clamp_min(1e-12)
    return {
        "health/projection_spread": float(z_BD.std(0).square().sum().sqrt()),
        "health/effective_rank": float(torch.special.entr(share).sum().exp()),
    }


def warnings(figures: dict[str, float], num_clusters: int) -> dict[str, str]:
    """Return the warnings, by name, that an epoch's label-free figures call for."""
    found = {}
    used = figures.get("health/clusters_in_use")
    if used is not None and used * 2 < num_clusters:
        found["collapse"] = (
            f"only {int(used)} of {num_clusters} clusters are in use; raise train.entropy_weight, "
            "or use train.head=prototype with train.agreement=linear"
        )
    if figures.get("health/projection_spread", 1) < _COLLAPSED_SPREAD:
        found["projection-collapse"] = (
            "all images are projected to almost the same point; raise pretrain.warmup_epochs, "
            "lower pretrain.learning_rate or, with BYOL and MoCo, raise pretrain.key_momentum"
        )
    if figures.get("health/selected_share") == 0:
        found["no-pseudo-labels"] = (
            "no image reaches boost.confidence_threshold, so Boost learns nothing; lower it, or "
            "train longer before Boost"
        )
    return found
