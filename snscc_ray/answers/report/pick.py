"""Which rows a page shows: a bounded number, whatever the size of the set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snscc_ray.core import rng
from snscc_ray.core.clustering.neighbors import MinedNeighbors

SAMPLED = 2000  # rows in the scatter
CLUSTERS = 200  # that are shown with images, the largest first
_IMAGES = 1200  # in all of their galleries together
_EACH = 12  # images of a kind in a cluster, at most
_NEIGHBOR_ROWS, _NEIGHBOR_ROWS_EACH = 40, 2
_NEIGHBORS = 20  # of a row, at most
LISTED = 50  # near-duplicates and outliers, at most
_CLOSEST = 10  # pairs that are shown even where none is a near-duplicate
NEAR = 0.995  # cosine of near-duplicates


@dataclass(frozen=True)
class Gallery:
    """Rows of one cluster."""

    cluster: int
    typical: list[int]
    doubtful: list[int]
    random: list[int]


@dataclass(frozen=True)
class Pair:
    a: int
    b: int
    cosine: float


def runners_up(p_NC: Tensor, clusters_N: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest other cluster of each row, and its probability."""
    others_NC = p_NC.scatter(1, clusters_N[:, None], -1)
    second_N, index_N = others_NC.max(1)
    return index_N, second_N


def galleries(features_ND: Tensor, p_NC: Tensor, clusters_N: Tensor, seed: int) -> list[Gallery]:
    """Typical, doubtful and random rows of the largest clusters, in the order of their numbers.

    Typical are those nearest to their cluster's mean feature, doubtful those that were almost put
    elsewhere.
    """
    own_N = p_NC.gather(1, clusters_N[:, None])[:, 0]
    margin_N = own_N - runners_up(p_NC, clusters_N)[1]
    sizes_C = torch.bincount(clusters_N, minlength=p_NC.shape[1])
    largest = sizes_C.argsort(descending=True, stable=True)[:CLUSTERS]
    shown = sorted(c for c in largest.tolist() if sizes_C[c])
    each = min(max(_IMAGES // (3 * len(shown)), 1), _EACH)
    found = []
    for cluster in shown:
        rows = (clusters_N == cluster).nonzero()[:, 0]
        from_mean = torch.linalg.vector_norm(features_ND[rows] - features_ND[rows].mean(0), dim=1)
        order = torch.randperm(len(rows), generator=rng.generator(seed, "report", cluster))
        found.append(
            Gallery(
                cluster,
                rows[from_mean.argsort(stable=True)[:each]].tolist(),
                rows[margin_N[rows].argsort(stable=True)[:each]].tolist(),
                rows[order[:each]].tolist(),
            )
        )
    return found


def with_neighbors(shown: Sequence[Gallery]) -> list[int]:
    """Rows whose neighbours are shown: random ones of each cluster, so none is flattered."""
    each = max(1, min(_NEIGHBOR_ROWS_EACH, _NEIGHBOR_ROWS // max(len(shown), 1)))
    return [row for gallery in shown for row in gallery.random[:each]][:_NEIGHBOR_ROWS]


def neighbors_shown(mined: MinedNeighbors, num_neighbors: int) -> int:
    """How many neighbours of a row are shown: K, within reason."""
    return min(num_neighbors, _NEIGHBORS, mined.neighbors_NK.shape[1])


def sample(rows: int, seed: int) -> list[int]:
    """A seeded sample of the rows, ascending; all of them where they are few."""
    if rows <= SAMPLED:
        return list(range(rows))
    order = torch.randperm(rows, generator=rng.generator(seed, "report", "scatter"))
    return sorted(order[:SAMPLED].tolist())


def identical(digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of rows with the same digest, the largest first."""
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    return sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)


def close_pairs(mined: MinedNeighbors, digests: Sequence[bytes]) -> tuple[list[Pair], int]:
    """The closest pairs that are not identical, and how many there are of cosine `NEAR` or more.

    Ten are given even where none is that close. Distances are Euclidean, of unit features.
    """
    N, K = mined.neighbors_NK.shape
    numbers: dict[bytes, int] = {}
    images = np.array([numbers.setdefault(digest, len(numbers)) for digest in digests])
    a = np.repeat(np.arange(N), K)
    b = mined.neighbors_NK.numpy().astype(np.int64).reshape(-1)
    cosines = 1 - mined.distances_NK.numpy().astype(np.float64).reshape(-1) ** 2 / 2
    low, high = np.minimum(a, b), np.maximum(a, b)
    _, once = np.unique(low * N + high, return_index=True)
    once = once[images[low[once]] != images[high[once]]]
    near = int((cosines[once] >= NEAR).sum())
    closest = once[np.argsort(-cosines[once], kind="stable")][: min(max(near, _CLOSEST), LISTED)]
    return [Pair(int(low[i]), int(high[i]), float(cosines[i])) for i in closest], near


def outliers(mined: MinedNeighbors) -> tuple[list[int], Tensor]:
    """The rows farthest from their neighbours, farthest first, and every row's mean distance."""
    mean_N = mined.distances_NK.mean(1)
    count = min(LISTED, max(len(mean_N) // 20, 1))
    return mean_N.argsort(descending=True, stable=True)[:count].tolist(), mean_N
