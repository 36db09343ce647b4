"""k-means, repeatable by its seed: it initialises prototypes and is the baseline.

Rows on a GPU are clustered there, all starts at once; rows on a CPU by scikit-learn.
"""

from __future__ import annotations

import warnings

import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from snscc_ray.core import rng

# Above this many numbers Lloyd's ten starts take minutes; mini-batches find equally good centres.
_FULL_SIZE = 5_000_000
# On a GPU: scikit-learn's values.
_MOST_ITERATIONS, _TOLERANCE = 300, 1e-4
# Number of distances in memory at a time.
_TILE = 2**26


def kmeans(rows_ND: Tensor, clusters: int, seed: int, starts: int = 10) -> tuple[Tensor, Tensor]:
    """Return centres (C, D) float32 and assignment (N,) int64 of the best start, on the CPU."""
    if rows_ND.is_cuda:
        centres_CD, assignment_N = lloyd(rows_ND.detach().float(), clusters, seed, starts)
        return centres_CD.cpu(), assignment_N.cpu()
    rows = rows_ND.detach().float().numpy()
    if rows.size <= _FULL_SIZE:
        model = KMeans(clusters, n_init=starts, random_state=seed % 2**32)
    else:
        model = MiniBatchKMeans(clusters, n_init=starts, batch_size=4096, random_state=seed % 2**32)
    # On several threads scikit-learn adds partial sums in the order they finish. The last bits
    # would differ between runs, and between a resumed and an uninterrupted run.
    with threadpool_limits(1), warnings.catch_warnings():
        # The warning concerns identical images, which `imageset` already reports.
        warnings.simplefilter("ignore", ConvergenceWarning)
        assignment = model.fit_predict(rows)
    centres = torch.from_numpy(model.cluster_centers_).float()
    return centres, torch.from_numpy(assignment).long()


@torch.no_grad()
def lloyd(rows_ND: Tensor, clusters: int, seed: int, starts: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from k-means++ seeds (Arthur & Vassilvitskii, SODA 2007), for a GPU.

    All starts advance together, as one product of the rows with all their centres. Sums over rows
    are products with one-hot rows, because adding row by row has no fixed order on a GPU. A cluster
    that loses all its rows restarts at the row farthest from its centre.
    Returns the centres (C, D) and the assignment (N,) of the best start, on the rows' device.
    """
    mean_D = rows_ND.mean(0)
    rows_ND = rows_ND - mean_D  # distances are differences of squares: small numbers lose less
    centres_SCD = _plus_plus(rows_ND, clusters, seed, starts)
    enough = _TOLERANCE * rows_ND.var(0, correction=0).mean()
    for _ in range(_MOST_ITERATIONS):
        moved_SCD, _, _ = _step(rows_ND, centres_SCD)
        shift_S = (moved_SCD - centres_SCD).square().sum((1, 2))
        centres_SCD = moved_SCD
        if bool((shift_S <= enough).all()):
            break
    _, assignment_NS, inertia_S = _step(rows_ND, centres_SCD)
    best = inertia_S.argmin()
    return centres_SCD[best] + mean_D, assignment_NS[:, best]


def _plus_plus(rows_ND: Tensor, clusters: int, seed: int, starts: int) -> Tensor:
    """Return seeds (S, C, D), each the best of several rows drawn by their squared distance."""
    tries = 2 + clusters.bit_length()
    numbers_N = torch.arange(len(rows_ND), device=rows_ND.device)
    square_N = rows_ND.square().sum(1)
    first_S = rng.uniform(numbers_N, rng.fold(seed, "first"), starts).argmax(0)
    chosen_SC = first_S[:, None]
    nearest_NS = _distances(rows_ND, square_N, rows_ND[first_S])
    for place in range(1, clusters):
        # Of exponential variables, each is the smallest with probability proportional to its rate.
        draws = rng.uniform(numbers_N, rng.fold(seed, place), starts * tries)
        waits_NST = -torch.log1p(-draws).view(-1, starts, tries) / nearest_NS[:, :, None]
        drawn_ST = waits_NST.nan_to_num(nan=torch.inf).argmin(0)  # 0 / 0: already a seed
        distances = _distances(rows_ND, square_N, rows_ND[drawn_ST.flatten()])
        left_NST = torch.minimum(distances.view(-1, starts, tries), nearest_NS[:, :, None])
        best_S1 = left_NST.sum(0).argmin(1, keepdim=True)
        chosen_SC = torch.cat([chosen_SC, drawn_ST.gather(1, best_S1)], dim=1)
        nearest_NS = left_NST.gather(2, best_S1.expand(len(rows_ND), -1, -1))[:, :, 0]
    return rows_ND[chosen_SC]


def _step(rows_ND: Tensor, centres_SCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One Lloyd step: each cluster's mean (S, C, D), each row's nearest centre (N, S), and the
    sum of squared distances (S,)."""
    S, C, D = centres_SCD.shape
    sums_SCD = torch.zeros_like(centres_SCD)
    counts_SC = centres_SCD.new_zeros(S, C)
    parts, far = [], []
    for part_BD in rows_ND.split(max(1, _TILE // (S * C))):
        d_BSC = _distances(part_BD, part_BD.square().sum(1), centres_SCD.flatten(0, 1))
        d_BS, nearest_BS = d_BSC.view(-1, S, C).min(2)
        one_hot_BSC = torch.zeros_like(d_BSC).view(-1, S, C).scatter_(2, nearest_BS[..., None], 1)
        sums_SCD += (one_hot_BSC.flatten(1).T @ part_BD).view(S, C, D)
        counts_SC += one_hot_BSC.sum(0)
        parts.append(nearest_BS)
        far.append(d_BS)
    assignment_NS, d_NS = torch.cat(parts), torch.cat(far)
    means_SCD = sums_SCD / counts_SC.clamp_min(1)[..., None]
    # The n-th empty cluster of a start gets the n-th farthest row.
    empty_SC = counts_SC == 0
    farthest_CS = d_NS.topk(min(C, len(rows_ND)), dim=0).indices
    rank_SC = (empty_SC.cumsum(1) - 1).clamp(0, len(farthest_CS) - 1)
    spare_SCD = rows_ND[farthest_CS.T.gather(1, rank_SC)]
    means_SCD = torch.where(empty_SC[..., None], spare_SCD, means_SCD)
    return means_SCD, assignment_NS, d_NS.double().sum(0)


def _distances(rows_ND: Tensor, square_N: Tensor, to_MD: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M)."""
    square_M = to_MD.square().sum(1)
    product_NM = torch.addmm(square_M, rows_ND, to_MD.T, alpha=-2)
    return product_NM.add_(square_N[:, None]).clamp_min_(0)
