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
BORDERS, _BORDER_IMAGES = 30, 17  # most borders between two clusters, and images of each
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


def numbered(digests: np.ndarray) -> np.ndarray:
    """Number the different images, int64 (N,). digests: (N, B) bytes, equal for equal images."""
    whole = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}")[:, 0]
    return np.unique(whole, return_inverse=True)[1]


def identical(images_N: np.ndarray) -> list[list[int]]:
    """Group the rows that hold the same image, the largest group first.

    images_N: the number of each row's image.
    """
    repeated = np.bincount(images_N) > 1
    rows = np.flatnonzero(repeated[images_N])
    if not len(rows):
        return []
    rows = rows[np.argsort(images_N[rows], kind="stable")]
    edges = np.flatnonzero(np.diff(images_N[rows])) + 1
    groups = sorted(np.split(rows, edges), key=lambda group: (-len(group), group[0]))
    return [group.tolist() for group in groups]


def close_pairs(mined: MinedNeighbors, images_N: np.ndarray) -> tuple[list[Pair], int]:
    """Return the closest pairs that are not identical, and the number with cosine ≥ `NEAR`.

    Up to ten pairs are returned even if none is that close. Distances are Euclidean, of unit
    features. images_N: the number of each row's image.
    """
    distances = mined.distances_NK.numpy().reshape(-1)
    limit = np.sqrt(2 * (1 - NEAR))
    low, high, d = pairs_of(mined, images_N, np.flatnonzero(distances <= limit))
    near, looked = len(low), 0
    while len(low) < _CLOSEST and looked < len(distances):
        # A million rows have tens of millions of entries: look only at the closest.
        looked = min(max(looked, _CLOSEST) * 32, len(distances))
        last = np.partition(distances, looked - 1)[looked - 1]
        low, high, d = pairs_of(mined, images_N, np.flatnonzero(distances <= max(last, limit)))
    closest = np.argsort(d, kind="stable")[: min(max(near, _CLOSEST), LISTED)]
    pairs = [Pair(int(low[i]), int(high[i]), float(1 - d[i] ** 2 / 2)) for i in closest]
    return pairs, near


def pairs_of(
    mined: MinedNeighbors, images_N: np.ndarray, entries: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of different images among these entries, each once: rows and distances."""
    N, K = mined.neighbors_NK.shape
    a = entries // K
    b = mined.neighbors_NK.numpy().reshape(-1)[entries].astype(np.int64)
    low, high = np.minimum(a, b), np.maximum(a, b)
    _, once = np.unique(low * N + high, return_index=True)
    once = once[images_N[low[once]] != images_N[high[once]]]
    d = mined.distances_NK.numpy().reshape(-1)[entries[once]].astype(np.float64)
    return low[once], high[once], d


@dataclass(frozen=True)
class Border:
    """Rows between two clusters, from surely the first to surely the second.

    Each row has one of the two as its cluster and the other as its second choice.
    """

    clusters: tuple[int, int]
    images: int  # that have these two as first and second choice
    doubt: float  # sum of their second-choice probabilities: images expected on the other side
    rows: list[int]
    shares: list[float]  # of the second cluster in the probability of both, for each row


def borders(
    clusters_N: Tensor,
    second_N: Tensor,
    confidence_N: Tensor,
    second_confidence_N: Tensor,
    group_C: np.ndarray,
) -> tuple[list[Border], int]:
    """Return the borders of the most confused pairs of clusters first, and the number of all.

    group_C: the number of each cluster's group, which has no borders within. The rows of a border
    are spread evenly over the shares, as far as there are such rows.
    """
    between = group_C[clusters_N.numpy()] != group_C[second_N.numpy()]
    places = np.flatnonzero(between)
    if not len(places):
        return [], 0
    first, second = clusters_N.numpy()[between], second_N.numpy()[between]
    a, b = np.minimum(first, second), np.maximum(first, second)
    # Rows of equal pairs, one pair after the other.
    keys, pair_N, images = np.unique(a * (b.max() + 1) + b, return_inverse=True, return_counts=True)
    own, other = confidence_N.numpy()[between], second_confidence_N.numpy()[between]
    doubt = np.bincount(pair_N, other)
    order, ends = np.argsort(pair_N, kind="stable"), np.cumsum(images)
    found = []
    for pair in np.argsort(-doubt, kind="stable")[:BORDERS]:
        rows = order[ends[pair] - images[pair] : ends[pair]]
        share = other[rows] / (own[rows] + other[rows])
        share = np.where(first[rows] == a[rows], share, 1 - share)
        rows, share = rows[by := np.argsort(share, kind="stable")], share[by]
        chosen = _spread(share, _BORDER_IMAGES)
        found.append(
            Border(
                (int(a[rows[0]]), int(b[rows[0]])),
                int(images[pair]),
                float(doubt[pair]),
                places[rows[chosen]].tolist(),
                [round(float(value), 4) for value in share[chosen]],
            )
        )
    return found, len(keys)


def _spread(ascending: np.ndarray, count: int) -> np.ndarray:
    """Choose so many places of ascending values in [0, 1], nearest to evenly spaced ones."""
    if len(ascending) <= count:
        return np.arange(len(ascending))
    left, chosen = np.ones(len(ascending), bool), []
    for value in np.linspace(0, 1, count):
        distances = np.where(left, np.abs(ascending - value), np.inf)
        chosen.append(int(distances.argmin()))
        left[chosen[-1]] = False
    return np.sort(chosen)


def outliers(mined: MinedNeighbors) -> tuple[list[int], Tensor]:
    """Return the rows farthest from their neighbours, farthest first, and mean distances (N,)."""
    mean_N = mined.distances_NK.mean(1)
    count = min(LISTED, max(len(mean_N) // 20, 1))
    return mean_N.argsort(descending=True, stable=True)[:count].tolist(), mean_N
