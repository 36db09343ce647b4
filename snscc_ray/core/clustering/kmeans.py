"""k-means, repeatable by its seed: it initialises prototypes and is the baseline.

Lloyd's iterations from k-means++ seeds (Arthur & Vassilvitskii, SODA 2007), by tiles of rows: on a
GPU one after the other, on a CPU one per core. All starts advance together, as one product of the
rows with all their centres. Many rows are clustered on a sample first. Suffixes: S starts, C
clusters, M = S · C centres.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from snscc_ray.core import rng
from snscc_ray.core.threads import Mapping, mapping

# Of scikit-learn: it stops where the centres' squared shift is a small share of the variance.
_MOST_ITERATIONS, _TOLERANCE = 300, 1e-4
# More rows than this, and than this for each cluster, are clustered on a sample of that size.
_SAMPLE_ROWS, _SAMPLE_EACH = 2**15, 64
# Iterations on the sample, and then over all rows.
_SAMPLE_ITERATIONS, _FEW_ITERATIONS = 100, 20
_QUICK_ITERATIONS = 10
_MEDIAN_ROWS = 4096  # rows whose median stands for the middle of all
# Centres of all starts together: with many clusters, one start is as good as another.
_CENTRES = 512
# Rounds in which the seeds are drawn; up to so many clusters, one seed each.
_ROUNDS = 256
# Distances in memory at a time: on a CPU they should stay in its cache.
_TILE = {"cpu": 2**20, "cuda": 2**26}


@torch.no_grad()
def kmeans(
    rows_ND: Tensor,
    clusters: int,
    seed: int,
    starts: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return centres (C, D) float32 and assignment (N,) int64 of the best start, on the CPU.

    The result is the same for any number of threads. With more than 51 clusters there are fewer
    starts, down to one. More than 32,768 rows (and 64 per cluster) are clustered on a random
    sample of that many; the best start then makes at most 20 iterations on all rows.
    progress: called with the number of steps done (drawings of seeds, and iterations), and the most
    that there may be.
    Raises ValueError for no rows or clusters, and for a NaN or an infinity.
    """
    if clusters < 1 or not len(rows_ND):
        raise ValueError(f"{len(rows_ND)} rows cannot be put into {clusters} clusters")
    starts = max(1, min(starts, _CENTRES // clusters))
    with mapping(rows_ND.device) as mapped:
        rows_ND, middle_D, scale = _prepared(rows_ND)
        most = max(_SAMPLE_ROWS, _SAMPLE_EACH * clusters)
        sample_RD = rows_ND
        if len(rows_ND) > most:
            drawn = torch.randperm(len(rows_ND), generator=rng.generator(seed, "sample"))[:most]
            sample_RD = rows_ND[drawn.to(rows_ND.device)]
        sampled = sample_RD is not rows_ND
        limits = (_SAMPLE_ITERATIONS, _FEW_ITERATIONS) if sampled else (_MOST_ITERATIONS, 0)
        # All are counted alike, as they take about as long; _lloyd ends with a step more.
        steps = (_rounds(clusters), limits[0] + 1, limits[1] + sampled)

        def tell(done: float) -> None:
            if progress is not None:
                progress(int(done), sum(steps))

        seeds_SCD = _plus_plus(sample_RD, clusters, seed, starts, mapped, tell)
        centres_SCD, nearest_NS, inertia_S = _lloyd(
            sample_RD, seeds_SCD, limits[0], mapped, lambda done: tell(steps[0] + done)
        )
        best = int(inertia_S.argmin())
        centres_SCD, nearest_NS = centres_SCD[[best]], nearest_NS[:, [best]]
        if sampled:
            centres_SCD, nearest_NS, _ = _lloyd(
                rows_ND, centres_SCD, limits[1], mapped, lambda done: tell(sum(steps[:2]) + done)
            )
        tell(sum(steps))
        return (centres_SCD[0] * scale + middle_D).cpu(), nearest_NS[:, 0].cpu()


@torch.no_grad()
def partition(
    rows_ND: Tensor, parts: int, seed: int, tell: Callable[[float], None] = lambda share: None
) -> tuple[Tensor, Tensor]:
    """Cut rows into many parts, quickly: their centres (C, D) and the part of each row (N,).

    Ten Lloyd iterations from random rows, on a sample of 64 rows per part. A part may be empty.
    tell: called with the share of the work that is done.
    """
    with mapping(rows_ND.device) as mapped:
        rows_ND, middle_D, scale = _prepared(rows_ND)
        drawn = torch.randperm(len(rows_ND), generator=rng.generator(seed, "sample"))
        sample_RD = rows_ND[drawn[: _SAMPLE_EACH * parts].to(rows_ND.device)]
        few, S, N = _QUICK_ITERATIONS, len(sample_RD), len(rows_ND)
        work = (few + 1) * S + N  # in rows compared with all centres
        centres_SCD, _, _ = _lloyd(
            sample_RD,
            sample_RD[None, :parts],
            few,
            mapped,
            lambda done: tell(done * S / work),
        )
        square_N = rows_ND.square().sum(1)
        _, nearest_NS, _ = _step(
            rows_ND, square_N, centres_SCD, mapped, lambda share: tell(1 - (1 - share) * N / work)
        )
    return centres_SCD[0] * scale + middle_D, nearest_NS[:, 0]


def _prepared(rows_ND: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the rows in float32, shifted and scaled, and the shift (D,) and scale.

    Distances are differences of squares, which lose least around 0 and near 1. The shift is the
    median of some rows, as the mean would follow a single row that is far away.
    """
    rows_ND = rows_ND.detach().float()
    middle_D = rows_ND[:: max(1, len(rows_ND) // _MEDIAN_ROWS)].median(0).values
    rows_ND = rows_ND - middle_D
    largest = float(rows_ND.abs().amax()) if rows_ND.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError("the rows hold a NaN or an infinity, so they cannot be clustered")
    scale = 2.0 ** math.frexp(largest)[1] if largest else 1.0  # a power of two: exact
    return rows_ND.div_(scale), middle_D, scale  # in place: it is a copy already


def _rounds(clusters: int) -> int:
    """Return in how many rounds `_plus_plus` draws seeds."""
    return -(-(clusters - 1) // _each(clusters))


def _each(clusters: int) -> int:
    """Return how many seeds are drawn in a round."""
    return -(-clusters // _ROUNDS)


def _plus_plus(
    rows_ND: Tensor,
    clusters: int,
    seed: int,
    starts: int,
    mapped: Mapping,
    tell: Callable[[int], None],
) -> Tensor:
    """Return seeds (S, C, D), rows drawn by their squared distance to the seeds before.

    Up to 256 clusters each seed is the best of several rows that are drawn. Of more clusters,
    several are drawn at a time.
    """
    each = _each(clusters)
    tries = 2 + int(math.log(clusters)) if each == 1 else each
    square_N = rows_ND.square().sum(1)
    draws = torch.rand(clusters, starts, tries, generator=rng.generator(seed, "seeds"))
    draws = draws.double().to(rows_ND.device)
    first_S = (draws[0, :, 0] * len(rows_ND)).long()
    chosen_SC = first_S[:, None]
    nearest_NS = _distances(rows_ND, square_N, rows_ND[first_S])
    while (place := chosen_SC.shape[1]) < clusters:
        drawn_ST = _draw(nearest_NS, draws[place, :, : clusters - place if each > 1 else tries])
        left_NST = _closest(rows_ND, square_N, nearest_NS, rows_ND[drawn_ST], mapped)
        if each > 1:
            nearest_NS = left_NST.amin(2)
            chosen_SC = torch.cat([chosen_SC, drawn_ST], dim=1)
        else:
            best_S1 = left_NST.sum(0).argmin(1, keepdim=True)
            nearest_NS = left_NST.gather(2, best_S1.expand(len(rows_ND), -1, -1))[:, :, 0]
            chosen_SC = torch.cat([chosen_SC, drawn_ST.gather(1, best_S1)], dim=1)
        tell(-(-(chosen_SC.shape[1] - 1) // each))
    return rows_ND[chosen_SC]


def _closest(
    rows_ND: Tensor, square_N: Tensor, nearest_NS: Tensor, drawn_STD: Tensor, mapped: Mapping
) -> Tensor:
    """Return the distances (N, S, T) to the nearest seed, with each of the rows that were drawn."""
    S, T, _ = drawn_STD.shape

    def tile(part: slice) -> Tensor:
        d_BM = _distances(rows_ND[part], square_N[part], drawn_STD.flatten(0, 1))
        return torch.minimum(d_BM.view(-1, S, T), nearest_NS[part][:, :, None])

    return torch.cat(list(mapped(tile, _tiles(rows_ND, S * T))))


def _draw(nearest_NS: Tensor, draws_ST: Tensor) -> Tensor:
    """Return rows (S, T), drawn with a chance proportional to the distance.

    The cumulative sums are of integers, which have the same sum in any order, as on a GPU.
    """
    top_S = nearest_NS.amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    until_SN = (nearest_NS / top_S * 2**30).long().T.contiguous().cumsum(1)
    wanted_ST = (draws_ST * until_SN[:, -1:]).long()
    return torch.searchsorted(until_SN, wanted_ST, right=True).clamp(max=len(nearest_NS) - 1)


def _lloyd(
    rows_ND: Tensor,
    centres_SCD: Tensor,
    most: int,
    mapped: Mapping,
    tell: Callable[[float], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centres (S, C, D) after at most so many iterations, the rows' nearest ones (N, S)
    and the sums of squared distances to them (S,).

    tell: called with the number of iterations done, with the share of the present one: in the end
    `most` + 1.
    """
    enough = _TOLERANCE * rows_ND.var(0, correction=0).mean()
    square_N = rows_ND.square().sum(1)
    moving = torch.arange(len(centres_SCD), device=rows_ND.device)
    for iteration in range(most):
        before_SCD = centres_SCD[moving]
        told = partial(_further, tell, iteration)
        after_SCD, _, _ = _step(rows_ND, square_N, before_SCD, mapped, told)
        centres_SCD = centres_SCD.index_copy(0, moving, after_SCD)
        moving = moving[(after_SCD - before_SCD).square().sum((1, 2)) > enough]
        if not len(moving):
            break
    _, nearest_NS, d_NS = _step(
        rows_ND, square_N, centres_SCD, mapped, partial(_further, tell, most)
    )
    return centres_SCD, nearest_NS, d_NS.double().sum(0)


def _further(tell: Callable[[float], None], done: int, share: float) -> None:
    tell(done + share)


def _step(
    rows_ND: Tensor,
    square_N: Tensor,
    centres_SCD: Tensor,
    mapped: Mapping,
    tell: Callable[[float], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """One Lloyd step: each cluster's mean (S, C, D), each row's nearest centre and the squared
    distance to it (N, S). A cluster without rows moves to one of the rows farthest from theirs."""
    S, C, D = centres_SCD.shape
    centres_MD = centres_SCD.flatten(0, 1)
    first_S = torch.arange(S, device=rows_ND.device) * C

    def tile(part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_BM = _distances(rows_ND[part], square_N[part], centres_MD)
        d_BS, nearest_BS = d_BM.view(-1, S, C).min(2)
        sums_MD = _sums(rows_ND[part], nearest_BS + first_S, S * C)
        counts_M = torch.bincount((nearest_BS + first_S).flatten(), minlength=S * C)
        return sums_MD, counts_M, nearest_BS, d_BS

    sums_MD = torch.zeros(S * C, D, dtype=torch.float64, device=rows_ND.device)
    counts_M = torch.zeros(S * C, dtype=torch.int64, device=rows_ND.device)
    nearest, distances = [], []
    tiles = _tiles(rows_ND, S * C)
    for part, (sums, counts, nearest_BS, d_BS) in enumerate(mapped(tile, tiles), 1):
        sums_MD += sums
        counts_M += counts
        nearest.append(nearest_BS)
        distances.append(d_BS)
        tell(part / len(tiles))
    nearest_NS, d_NS = torch.cat(nearest), torch.cat(distances)
    means_MD = (sums_MD / counts_M.clamp_min(1)[:, None]).float()
    means_SCD, empty_SC = means_MD.view(S, C, D), (counts_M == 0).view(S, C)
    if bool(empty_SC.any()):
        # The n-th empty cluster of a start gets the n-th farthest row.
        farthest_CS = d_NS.topk(min(C, len(rows_ND)), dim=0).indices
        rank_SC = (empty_SC.cumsum(1) - 1).clamp(0, len(farthest_CS) - 1)
        spare_SCD = rows_ND[farthest_CS.T.gather(1, rank_SC)]
        means_SCD = torch.where(empty_SC[..., None], spare_SCD, means_SCD)
    return means_SCD, nearest_NS, d_NS


def _sums(rows_BD: Tensor, centre_BS: Tensor, centres: int) -> Tensor:
    """Return the sum of the rows at each centre, (M, D)."""
    if rows_BD.is_cuda:  # adding row by row has no fixed order there
        one_hot_BM = rows_BD.new_zeros(len(rows_BD), centres).scatter_(1, centre_BS, 1)
        return one_hot_BM.T @ rows_BD
    sums_MD = rows_BD.new_zeros(centres, rows_BD.shape[1])
    for centre_B in centre_BS.unbind(1):
        sums_MD.index_add_(0, centre_B, rows_BD)
    return sums_MD


def _distances(rows_ND: Tensor, square_N: Tensor, to_MD: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M)."""
    product_NM = torch.addmm(to_MD.square().sum(1), rows_ND, to_MD.T, alpha=-2)
    return product_NM.add_(square_N[:, None]).clamp_min_(0)


def _tiles(rows_ND: Tensor, columns: int) -> list[slice]:
    """Return parts of the rows that have few enough distances to so many others."""
    rows = max(1, _TILE[rows_ND.device.type] // columns)
    return [slice(first, first + rows) for first in range(0, len(rows_ND), rows)]
