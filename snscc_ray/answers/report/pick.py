"""Choose the rows that a page shows: a bounded number for any size of dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snscc_ray.core import rng
from snscc_ray.core.clustering.mining import MinedNeighbors

SAMPLED = 2000  # rows in the scatter
CLUSTERS = 200  # most clusters with a gallery; the largest are taken
_IMAGES = 1200  # in all galleries together
_EACH = 12  # most images of a kind (typical, doubtful, random) per cluster
_NEIGHBOR_ROWS, _NEIGHBOR_ROWS_EACH = 40, 2
_NEIGHBORS = 20  # at most, per row
LISTED = 50  # near-duplicates and outliers, at most
_CLOSEST = 10  # pairs shown even if none is a near-duplicate
NEAR = 0.995  # least cosine of near-duplicates


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


def galleries(
    features_ND: Tensor, margin_N: Tensor, clusters_N: Tensor, num_clusters: int, seed: int
) -> list[Gallery]:
    """Pick typical, doubtful and random rows of the largest clusters, in order of cluster number.

    Typical rows are nearest to their cluster's mean feature; doubtful ones have the smallest
    margin over their second-choice cluster.
    """
    sizes_C = torch.bincount(clusters_N, minlength=num_clusters)
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
    """Return the rows whose neighbours are shown: random ones of each cluster, for a fair view."""
    each = max(1, min(_NEIGHBOR_ROWS_EACH, _NEIGHBOR_ROWS // max(len(shown), 1)))
    return [row for gallery in shown for row in gallery.random[:each]][:_NEIGHBOR_ROWS]


def neighbors_shown(mined: MinedNeighbors, num_neighbors: int) -> int:
    """Return how many neighbours are shown per row: K, but at most 20."""
    return min(num_neighbors, _NEIGHBORS, mined.neighbors_NK.shape[1])


def sample(rows: int, seed: int) -> list[int]:
    """Draw a seeded sample of the rows, ascending; all rows if there are at most `SAMPLED`."""
    if rows <= SAMPLED:
        return list(range(rows))
    order = torch.randperm(rows, generator=rng.generator(seed, "report", "scatter"))
    return sorted(order[:SAMPLED].tolist())


def identical(digests: Sequence[bytes]) -> list[list[int]]:
    """Group rows with the same digest, the largest group first."""
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    return sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)


def close_pairs(mined: MinedNeighbors, digests: Sequence[bytes]) -> tuple[list[Pair], int]:
    """Return the closest pairs that are not identical, and the number with cosine ≥ `NEAR`.

    Up to ten pairs are returned even if none is that close. Distances are Euclidean, of unit
    features.
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
    """Return the rows farthest from their neighbours, farthest first, and mean distances (N,)."""
    mean_N = mined.distances_NK.mean(1)
    count = min(LISTED, max(len(mean_N) // 20, 1))
    return mean_N.argsort(descending=True, stable=True)[:count].tolist(), mean_N
