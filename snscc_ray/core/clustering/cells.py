"""Approximate nearest neighbours of every row of a large dataset, on a CPU.

The rows are cut into cells of about 256, by a short k-means: an inverted file (Jégou, Douze &
Schmid, "Product quantization for nearest neighbor search", TPAMI 2011) without the quantisation.
Each row has a few cells whose centres are nearest to it. Groups of up to 64 rows, of the same cell
and with the same second cell where possible, search together in the cells of all of them, by one
matrix product. So a row finds most of its neighbours in cells that another row of its group chose.
How many cells each row chooses is measured on a sample of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from snscc_ray.core import rng
from snscc_ray.core.clustering.kmeans import partition
from snscc_ray.core.clustering.neighbors import (
    SPARE,
    best_of,
    knn,
    nearest_of,
    precise,
    scores,
    unsure,
)
from snscc_ray.core.threads import mapping

_CELL_ROWS, _GROUP_ROWS = 256, 64
# Share of the true neighbours to be found on the sample, and the rows of the sample.
_RECALL, _SAMPLE = 0.96, 1024
_MOST_CHOSEN = 64
# Scores that each thread holds at a time: 64 MB, so that a group is hardly ever searched in parts.
_SCORES = 2**24


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of a dataset's rows. Rows have places: those of a cell, and of a group, are next to
    one another."""

    centres_CD: Tensor
    row_N: Tensor  # int64: the row at each place
    cell_edges: list[int]  # first place of each cell, and N
    chosen: int  # cells that each row chooses
    share: float  # of all rows that a row is compared with, on a sample
    recall: float  # share of the true neighbours among these, on a sample

    def groups(self) -> list[tuple[int, int]]:
        """First place and end of each group."""
        return _groups(self.cell_edges)


@torch.no_grad()
def make_cells(
    features_ND: Tensor, k: int, tell: Callable[[float], None] = lambda share: None
) -> Cells:
    """Cut the rows into cells, and measure how many each row must choose for k neighbours.

    tell: called with the share of the work that is done, roughly.
    """
    features_ND = features_ND.float()
    N = len(features_ND)
    count = max(1, N // _CELL_ROWS)
    seed = rng.fold("cells")
    centres_CD, cell_N = partition(features_ND, count, seed, lambda share: tell(0.6 * share))
    second_N = _second(features_ND, centres_CD, cell_N, lambda share: tell(0.6 + 0.2 * share))
    row_N = (cell_N * count + second_N).argsort(stable=True)
    rows_C = torch.bincount(cell_N, minlength=count)
    cell_edges = [0, *rows_C.cumsum(0).tolist()]
    groups = _groups(cell_edges)

    # At random: every n-th row could be of one kind.
    sample_S = torch.randperm(N, generator=rng.generator("cells", "sample"))[:_SAMPLE]
    _, found_SK = knn(
        features_ND,
        k + 1,
        queries=features_ND[sample_S],
        progress=lambda done, total: tell(0.8 + 0.1 * done / total),
    )
    own_SK = found_SK == sample_S[:, None]
    own_SK[~own_SK.any(1), -1] = True  # more duplicates than k: leave out the last in its place
    true_SK = found_SK[~own_SK].view(len(sample_S), k)
    place_N = row_N.argsort()
    firsts_G = torch.tensor([first for first, _ in groups])
    group_S = torch.searchsorted(firsts_G, place_N[sample_S], right=True) - 1
    most = min(count, _MOST_CHOSEN)

    def depth(group: Tensor, true_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many cells each row must choose, for each neighbour to be found, and how
        many rows are searched for each number of cells."""
        own_B = row_N[slice(*groups[int(group)])]
        rank_C = _ranks(features_ND[own_B], centres_CD, most)
        rows_M = torch.bincount(rank_C, weights=rows_C.double(), minlength=most + 1)
        return rank_C[cell_N[true_K]] + 1, rows_M[:most].cumsum(0)

    found = []
    with mapping(features_ND.device) as mapped:
        for one in mapped(depth, group_S, true_SK):
            found.append(one)
            tell(0.9 + 0.1 * len(found) / len(sample_S))
    depth_SK = torch.stack([d for d, _ in found])
    chosen = int(depth_SK.flatten().sort().values[int(_RECALL * depth_SK.numel())])
    if chosen > most:  # neighbours are everywhere
        return Cells(centres_CD, row_N, cell_edges, count, 1.0, 1.0)
    share = float(torch.stack([rows_M[chosen - 1] for _, rows_M in found]).mean()) / N
    recall = float((depth_SK <= chosen).double().mean())
    return Cells(centres_CD, row_N, cell_edges, chosen, share, recall)


def _runs(edges: list[int], cells: list[int]) -> list[slice]:
    """Return the places of ascending cells; those of cells next to one another are one slice."""
    runs: list[slice] = []
    for cell in cells:
        first, last = edges[cell], edges[cell + 1]
        if runs and runs[-1].stop == first:
            first = runs.pop().start
        runs.append(slice(first, last))
    return runs


def _groups(cell_edges: list[int]) -> list[tuple[int, int]]:
    return [
        (place, min(place + _GROUP_ROWS, last))
        for first, last in pairwise(cell_edges)
        for place in range(first, last, _GROUP_ROWS)
    ]


def _second(
    features_ND: Tensor, centres_CD: Tensor, cell_N: Tensor, tell: Callable[[float], None]
) -> Tensor:
    """Return the nearest cell of each row other than its own, (N,); its own if there is none."""
    if len(centres_CD) == 1:
        return cell_N

    def second(part_B: Tensor) -> Tensor:
        score_BC = to_centres(features_ND[part_B], centres_CD)
        score_BC.scatter_(1, cell_N[part_B, None], torch.inf)
        return score_BC.argmin(1)

    parts = torch.arange(len(features_ND)).split(max(1, _SCORES // len(centres_CD)))
    found = []
    with mapping(features_ND.device) as mapped:
        for one in mapped(second, parts):
            found.append(one)
            tell(len(found) / len(parts))
    return torch.cat(found)


def to_centres(z_BD: Tensor, centres_CD: Tensor) -> Tensor:
    """Return scores (B, C) that order the centres as the distances do."""
    return scores(z_BD, centres_CD, centres_CD.square().sum(1))


def _ranks(z_BD: Tensor, centres_CD: Tensor, most: int) -> Tensor:
    """Return the best rank (C,) of each centre among the nearest centres of any of the rows.

    It is `most` for centres beyond the `most` nearest ones of all rows.
    """
    _, near_BM = to_centres(z_BD, centres_CD).topk(most, dim=1, largest=False)
    rank_BM = torch.arange(most).expand_as(near_BM)
    rank_C = torch.full((len(centres_CD),), most)
    return rank_C.scatter_reduce_(0, near_BM.flatten(), rank_BM.flatten(), "amin")


@torch.no_grad()
def search_cells(
    features_ND: Tensor,
    cells: Cells,
    k: int,
    places: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of the row at each place (of `places` first..last) of the cells.

    Returns (d_NK float32, idx_NK int64), nearest first: row i of the result is for the row
    `cells.row_N[first + i]`. No row is its own neighbour. The distances are exact. A row gets the
    same neighbours with any `places`. progress: called with the number of rows done, and of all.
    """
    features_ND = features_ND.float()
    begin, end = places or (0, len(features_ND))
    row_N, edges, count = cells.row_N, cells.cell_edges, len(cells.centres_CD)
    centre_D = features_ND.mean(0)
    sorted_ND = features_ND[row_N] - centre_D
    square_N = sorted_ND.square().sum(1)
    largest = square_N.amax()

    def searched(z_BD: Tensor) -> list[slice]:
        """Return the places to search: of more cells, if those of the rows hold too few rows."""
        chosen = min(cells.chosen, count)
        while True:
            near = (_ranks(z_BD, cells.centres_CD, chosen) < chosen).nonzero()[:, 0].tolist()
            if sum(edges[cell + 1] - edges[cell] for cell in near) > k + SPARE or chosen == count:
                return _runs(edges, near)
            chosen = min(2 * chosen, count)

    local = threading.local()  # scores, reused: new pages for each group cost more than they do

    def room(rows: int, columns: int) -> Tensor:
        scores_M: Tensor | None = getattr(local, "scores", None)
        if scores_M is None or len(scores_M) < rows * columns:
            scores_M = local.scores = features_ND.new_empty(max(rows * columns, _SCORES))
        return scores_M[: rows * columns].view(rows, columns)

    def nearest(group: tuple[int, int]) -> tuple[Tensor, Tensor]:
        own_B = row_N[group[0] : group[1]]
        runs = searched(features_ND[own_B])
        place_M = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        R = min(k + SPARE + 1, len(place_M))
        parts = []
        for part_B in own_B.split(max(1, _SCORES // len(place_M))):
            z_BD = features_ND[part_B]
            # Run by run: to copy the rows of all runs first takes as long as their products.
            score_BM, first = room(len(z_BD), len(place_M)), 0
            for run in runs:
                columns = slice(first, first := first + run.stop - run.start)
                scores(z_BD - centre_D, sorted_ND[run], square_N[run], score_BM[:, columns])
            place_BR, beyond_B = best_of(score_BM, z_BD - centre_D, R)
            idx_BR = row_N[place_M[place_BR]]
            d_BK, idx_BK = nearest_of(z_BD, features_ND, idx_BR, idx_BR == part_B[:, None], k)
            again = unsure(d_BK, beyond_B, z_BD - centre_D, largest)
            if len(again):
                ref_MD = sorted_ND[place_M]
                idx_BR = row_N[place_M[precise(z_BD[again] - centre_D, ref_MD, R)]]
                own_BR = idx_BR == part_B[again, None]
                d_BK[again], idx_BK[again] = nearest_of(z_BD[again], features_ND, idx_BR, own_BR, k)
            parts.append((d_BK, idx_BK))
        return torch.cat([d for d, _ in parts]), torch.cat([idx for _, idx in parts])

    d_NK = features_ND.new_empty(end - begin, k)
    idx_NK = torch.empty(end - begin, k, dtype=torch.long)
    groups = [(a, b) for a, b in cells.groups() if a < end and b > begin]
    with mapping(features_ND.device) as mapped:
        for (a, b), found in zip(groups, mapped(nearest, groups), strict=True):
            own = slice(max(a, begin) - a, min(b, end) - a)  # a group may be partly another's
            first, last = own.start + a - begin, own.stop + a - begin
            d_NK[first:last], idx_NK[first:last] = (part[own] for part in found)
            if progress is not None:
                progress(last, end - begin)
    return d_NK, idx_NK
