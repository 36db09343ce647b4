"""Approximate nearest neighbours of every row of a large dataset, on a CPU.

The rows are cut into cells of about 256, by a short k-means. A row's neighbours are searched in the
cells nearest to its own, and nowhere else: an inverted file (Jégou, Douze & Schmid, "Product
quantization for nearest neighbor search", TPAMI 2011) without the quantisation. All rows of a cell
search together, by one matrix product. How many cells that takes is measured on a sample of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from snscc_ray.core import rng
from snscc_ray.core.clustering.kmeans import partition
from snscc_ray.core.clustering.neighbors import (
    SPARE,
    candidates,
    knn,
    nearest_of,
    precise,
    unsure,
)
from snscc_ray.core.threads import mapping

_CELL_ROWS = 256
# Share of the true neighbours to be found on the sample, and the rows of the sample.
_RECALL, _SAMPLE = 0.96, 1024
_MORE = 32
# Scores that each thread holds at a time: 16 MB.
_SCORES = 2**22


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of a dataset's rows."""

    count: int  # C
    cell_N: Tensor  # int64
    order_CM: Tensor  # int64: for each cell, the M nearest ones, itself first
    searched: int  # how many of them are searched
    recall: float  # share of the true neighbours in these, on a sample

    @property
    def share(self) -> float:
        """Share of all cells that are searched for each row."""
        return self.searched / self.count


@torch.no_grad()
def make_cells(features_ND: Tensor, k: int) -> Cells:
    """Cut the rows into cells, and measure in how many to search for k neighbours."""
    features_ND = features_ND.float()
    N = len(features_ND)
    count = max(1, N // _CELL_ROWS)
    centres_CD, cell_N = partition(features_ND, count, rng.fold("cells"))
    # At random: every n-th row could be of one kind.
    sample_S = torch.randperm(N, generator=rng.generator("cells", "sample"))[:_SAMPLE]
    _, found_SK = knn(features_ND, k + 1, queries=features_ND[sample_S])
    own_SK = found_SK == sample_S[:, None]
    own_SK[~own_SK.any(1), -1] = True  # more duplicates than k: leave out the last in its place
    true_SK = found_SK[~own_SK].view(len(sample_S), k)
    distance_SC = torch.cdist(centres_CD[cell_N[sample_S]], centres_CD)
    rank_SC = distance_SC.argsort(dim=1, stable=True).argsort(dim=1)
    rank_SK = rank_SC.gather(1, cell_N[true_SK])
    searched = int(rank_SK.flatten().sort().values[int(_RECALL * rank_SK.numel())]) + 1
    recall = float((rank_SK < searched).double().mean())
    # Some more than are searched, for cells among small ones.
    kept = min(count, searched + _MORE)
    _, order_CM = knn(centres_CD, kept, queries=centres_CD)
    return Cells(count, cell_N, order_CM, searched, recall)


@torch.no_grad()
def search_cells(
    features_ND: Tensor,
    cells: Cells,
    k: int,
    rows: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of each row (of `rows` first..last) in the nearest cells.

    Returns (d_NK float32, idx_NK int64), nearest first; no row is its own neighbour. The distances
    are exact. A row gets the same neighbours with any `rows`, up to rounding as in `knn`.
    progress: called with the number of rows done, and of all rows.
    """
    features_ND = features_ND.float()
    begin, end = rows or (0, len(features_ND))
    row_N = cells.cell_N.argsort(stable=True)  # rows by cell
    edges = [0, *torch.bincount(cells.cell_N, minlength=cells.count).cumsum(0).tolist()]
    centre_D = features_ND.mean(0)
    sorted_ND = features_ND[row_N] - centre_D
    square_N = sorted_ND.square().sum(1)
    largest = square_N.amax()

    def places(cell: int) -> Tensor:
        """Return places in `row_N`: of the cells to search, and of more if these have too few."""
        order, needed = cells.order_CM[cell].tolist(), k + SPARE + 1
        parts: list[Tensor] = []
        found = 0
        for near in order:
            if len(parts) >= cells.searched and found >= needed:
                break
            parts.append(torch.arange(edges[near], edges[near + 1]))
            found += len(parts[-1])
        return torch.cat(parts) if found >= needed else torch.arange(len(row_N))

    def nearest(own_B: Tensor) -> tuple[Tensor, Tensor]:
        place_M = places(int(cells.cell_N[own_B[0]]))
        ref_MD, square_M = sorted_ND[place_M], square_N[place_M]
        R = min(k + SPARE + 1, len(place_M))
        parts = []
        for part_B in own_B.split(max(1, _SCORES // len(place_M))):
            z_BD = features_ND[part_B]
            place_BR, beyond_B = candidates(z_BD - centre_D, ref_MD, square_M, R)
            idx_BR = row_N[place_M[place_BR]]
            d_BK, idx_BK = nearest_of(z_BD, features_ND, idx_BR, idx_BR == part_B[:, None], k)
            again = unsure(d_BK, beyond_B, z_BD - centre_D, largest)
            if len(again):
                idx_BR = row_N[place_M[precise(z_BD[again] - centre_D, ref_MD, R)]]
                own_BR = idx_BR == part_B[again, None]
                d_BK[again], idx_BK[again] = nearest_of(z_BD[again], features_ND, idx_BR, own_BR, k)
            parts.append((d_BK, idx_BK))
        return torch.cat([d for d, _ in parts]), torch.cat([idx for _, idx in parts])

    d_NK = features_ND.new_empty(end - begin, k)
    idx_NK = torch.empty(end - begin, k, dtype=torch.long)
    groups = [row_N[first:last] for first, last in pairwise(edges)]
    groups = [own_B[(own_B >= begin) & (own_B < end)] for own_B in groups]
    groups = [own_B for own_B in groups if len(own_B)]
    done = 0
    with mapping(features_ND.device) as mapped:
        for own_B, (d_BK, idx_BK) in zip(groups, mapped(nearest, groups), strict=True):
            d_NK[own_B - begin], idx_NK[own_B - begin] = d_BK, idx_BK
            done += len(own_B)
            if progress is not None:
                progress(done, end - begin)
    return d_NK, idx_NK
