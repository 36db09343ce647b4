"""Run methods that need an N × N matrix on a subsample of the rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from snscc_ray.compare.rows import rows_of
from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.core import rng

# N × N distances of this many rows take 200 MB.
ROWS = 5000


def cluster_some(
    study: Study, method: str, assign: Callable[[np.ndarray], np.ndarray]
) -> MethodResult:
    """Cluster the pixels or features of at most `ROWS` rows, drawn by the seed, with `assign`.

    Every other row joins the cluster with the nearest centroid; the note then says so.
    """
    all_ND, N = rows_of(study).cpu(), len(study.catalog)
    drawn = torch.randperm(N, generator=rng.generator(study.key(method, "rows")))
    rows_R = drawn[:ROWS].sort().values

    def everything() -> Tensor:
        # Multithreaded sums differ in the last bits from run to run.
        with threadpool_limits(1):
            found_R = torch.from_numpy(assign(all_ND[rows_R].numpy())).long()
        if N <= ROWS:
            return found_R
        clusters_N = nearest_centroid(all_ND, all_ND[rows_R], found_R, study.clusters)
        clusters_N[rows_R] = found_R
        return clusters_N

    clusters_N = study.timed(everything)
    if N <= ROWS:
        return MethodResult(clusters_N)
    note = f"needs an N × N matrix: {ROWS:,} of {N:,} rows clustered, the rest by centroid"
    return MethodResult(clusters_N, note=note)


def nearest_centroid(
    rows_ND: Tensor, known_RD: Tensor, clusters_R: Tensor, clusters: int
) -> Tensor:
    """Return the non-empty cluster whose known rows have the nearest mean, per row, (N,)."""
    used = [cluster for cluster in range(clusters) if (clusters_R == cluster).any()]
    centroids = torch.stack([known_RD[clusters_R == cluster].mean(0) for cluster in used])
    return torch.tensor(used)[torch.cdist(rows_ND, centroids).argmin(1)]
