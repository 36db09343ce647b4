"""Starts of the cluster heads from a normalised cut of the neighbour graph.

k-means on a trained encoder's features often puts two kinds into one cluster and the left-overs of
all kinds into another, and no training of the heads repairs that. A normalised cut (Shi & Malik,
"Normalized cuts and image segmentation", TPAMI 2000; Ng, Jordan & Weiss, NIPS 2001) of the graph of
mined neighbours finds kinds by their connections. The cut is made on small k-means pieces in place
of single rows, so that it takes a second for any number of rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.kmeans import kmeans

# k-means clusters per cluster, in turn: which number is best depends on the images.
_PIECES = (4, 8, 16)
_DRAWS = 18  # the best of these are used; each has other pieces
# With many clusters the cost of a cut grows with their cube: there are fewer pieces for each, down
# to four, and no more draws than are used.
_MOST_PIECES, _MANY = 1024, 100
# Centres of all starts together, as in `kmeans`.
_CENTRES, _STARTS = 512, 20
_NEIGHBORS = 10  # mined neighbours of a row that the graph has


def cut_starts(
    features_ND: Tensor,
    neighbors_NK: Tensor,
    clusters: int,
    count: int,
    seed: int,
    max_imbalance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the centres (count, C, D) of the best of several cuts, on the CPU.

    features_ND: of length 1. The label-free score of the rows' nearest centres ranks the cuts.
    progress: called with the number of cuts made, and of all cuts.
    """
    rows_ND = features_ND.detach().cpu().float()
    neighbors_NK = neighbors_NK.cpu()
    found: list[tuple[float, Tensor]] = []
    draws = count if clusters > _MANY else max(_DRAWS, count)
    for draw in range(draws):
        pieces = _PIECES[draw % len(_PIECES)] * clusters
        pieces = min(pieces, max(_PIECES[0] * clusters, _MOST_PIECES))
        cluster_N = cut(rows_ND, neighbors_NK, clusters, pieces, seed + draw)
        sums_CD = torch.zeros(clusters, rows_ND.shape[1]).index_add_(0, cluster_N, rows_ND)
        centres_CD = F.normalize(sums_CD, dim=1)
        nearest_N = (rows_ND @ centres_CD.T).argmax(1)
        figures = metrics.health(nearest_N, neighbors_NK, clusters, max_imbalance=max_imbalance)
        found.append((figures["health/score"], centres_CD))
        if progress is not None:
            progress(draw + 1, draws)
    found.sort(key=lambda one: -one[0])
    return torch.stack([centres_CD for _, centres_CD in found[:count]])


def cut(rows_ND: Tensor, neighbors_NK: Tensor, clusters: int, pieces: int, seed: int) -> Tensor:
    """Return the clusters (N,) of one normalised cut of the neighbour graph into C parts."""
    N, K = len(rows_ND), min(_NEIGHBORS, neighbors_NK.shape[1])
    pieces = min(pieces, N)
    _, piece_N = kmeans(rows_ND, pieces, seed, starts=1)
    ends_NK = piece_N[neighbors_NK[:, :K].long()]
    pairs = (piece_N[:, None] * pieces + ends_NK).flatten()
    weights_PP = torch.bincount(pairs, minlength=pieces * pieces).view(pieces, pieces).double()
    weights_PP = weights_PP + weights_PP.T
    # A piece without rows, as among equal images, has no connections.
    degree_P = weights_PP.sum(1).clamp_min(1e-12)
    scaled_PP = weights_PP / (degree_P[:, None] * degree_P).sqrt()
    _, vectors_PP = torch.linalg.eigh(scaled_PP)
    place_PC = F.normalize(vectors_PP[:, -clusters:], dim=1).numpy()
    starts = max(1, min(_STARTS, _CENTRES // clusters))
    model = KMeans(clusters, n_init=starts, random_state=seed % 2**32)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        group_P = model.fit_predict(place_PC, sample_weight=degree_P.numpy())
    return torch.from_numpy(np.asarray(group_P)).long()[piece_N]
