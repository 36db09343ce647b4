"""Groups of features that may be of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.kmeans import kmeans

# k-means cuts large clusters into pieces of like size: so many pieces per cluster are put
# together again by average linkage, which does not mind sizes.
_PIECES = 3
# One draw of the pieces is as good as another only on average (docs/log.md), so many are made.
_TRIED_PIECES, _DRAWS = (3, 4, 6), 10


def uneven_clusters(
    features_ND: Tensor, clusters: int, seed: int, pieces: int = _PIECES, starts: int = 10
) -> tuple[Tensor, Tensor]:
    """(centres (C, D), assignment (N,)) of clusters that may be of any size, on the CPU.

    They are made of `pieces` k-means clusters each, the best of so many `starts`.
    """
    count = min(pieces * clusters, len(features_ND))
    centres_PD, piece_N = kmeans(features_ND, count, seed, starts)
    group_P = AgglomerativeClustering(clusters, linkage="average").fit_predict(centres_PD.numpy())
    cluster_N = torch.from_numpy(group_P).long()[piece_N]
    rows_ND = features_ND.detach().cpu().float()
    sums_CD = torch.zeros(clusters, rows_ND.shape[1]).index_add_(0, cluster_N, rows_ND)
    # A piece, and so a group, may be empty where rows are equal.
    return sums_CD / torch.bincount(cluster_N, minlength=clusters).clamp_min(1)[:, None], cluster_N


def uneven_starts(
    features_ND: Tensor,
    neighbors_NK: Tensor,
    clusters: int,
    max_imbalance: float,
    count: int,
    seed: int,
) -> Tensor:
    """Centres (count, C, D) of the best of many such groupings.

    They are judged by the label-free score, twice: as they are, and as they come out where every
    row goes to the nearest centre, which is how prototypes begin.
    """

    def score(cluster_N: Tensor) -> float:
        return metrics.health(cluster_N, neighbors_NK, clusters, max_imbalance=max_imbalance)[
            "health/score"
        ]

    rows_ND = features_ND.detach().cpu().float()
    found: list[tuple[float, Tensor]] = []
    for draw in range(max(_DRAWS, count)):
        for pieces in _TRIED_PIECES:
            centres_CD, cluster_N = uneven_clusters(
                rows_ND, clusters, seed + draw, pieces, starts=1
            )
            nearest_N = (rows_ND @ F.normalize(centres_CD, dim=1).T).argmax(1)
            found.append((score(cluster_N) + score(nearest_N), centres_CD))
    found.sort(key=lambda one: -one[0])
    return torch.stack([centres_CD for _, centres_CD in found[:count]])
