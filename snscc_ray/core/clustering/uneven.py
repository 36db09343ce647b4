"""Cluster features into clusters of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.kmeans import kmeans

# k-means cuts large clusters into pieces of similar size: it makes this many pieces per cluster,
# and average linkage, which ignores sizes, merges them again.
_PIECES = 3
# Draws of the pieces are equally good only on average (docs/log.md), so many are made.
_TRIED_PIECES, _DRAWS = (3, 4, 6), 10


def uneven_clusters(
    features_ND: Tensor,
    clusters: int,
    seed: int,
    pieces: int = _PIECES,
    starts: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return centres (C, D) and assignment (N,) of clusters of any size, on the CPU.

    Merges `pieces` k-means clusters per cluster, from the best of `starts` starts. progress: as for
    `kmeans`.
    """
    count = min(pieces * clusters, len(features_ND))
    centres_PD, piece_N = kmeans(features_ND, count, seed, starts, progress)
    group_P = AgglomerativeClustering(clusters, linkage="average").fit_predict(centres_PD.numpy())
    cluster_N = torch.from_numpy(group_P).long()[piece_N]
    rows_ND = features_ND.detach().cpu().float()
    sums_CD = torch.zeros(clusters, rows_ND.shape[1]).index_add_(0, cluster_N, rows_ND)
    # If rows are equal, a piece, and so a cluster, may be empty.
    return sums_CD / torch.bincount(cluster_N, minlength=clusters).clamp_min(1)[:, None], cluster_N


def uneven_starts(
    features_ND: Tensor,
    neighbors_NK: Tensor,
    clusters: int,
    max_imbalance: float,
    count: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the centres (count, C, D) of the best of many calls of `uneven_clusters`.

    The label-free score ranks them twice: by their own assignment, and with every row assigned to
    the nearest centre, which is how prototypes start. progress: called with the number of draws
    done, and of all draws.
    """

    def score(cluster_N: Tensor) -> float:
        return metrics.health(cluster_N, neighbors_NK, clusters, max_imbalance=max_imbalance)[
            "health/score"
        ]

    rows_ND = features_ND.detach().cpu().float()
    found: list[tuple[float, Tensor]] = []
    draws = max(_DRAWS, count)
    for draw in range(draws):
        for pieces in _TRIED_PIECES:
            centres_CD, cluster_N = uneven_clusters(
                rows_ND, clusters, seed + draw, pieces, starts=1
            )
            nearest_N = (rows_ND @ F.normalize(centres_CD, dim=1).T).argmax(1)
            found.append((score(cluster_N) + score(nearest_N), centres_CD))
        if progress is not None:
            progress(draw + 1, draws)
    found.sort(key=lambda one: -one[0])
    return torch.stack([centres_CD for _, centres_CD in found[:count]])
