"""An index of a dataset's rows, for the nearest of them to new rows, on a CPU.

The rows are cut into cells by a short k-means: an inverted file (Jégou, Douze & Schmid, "Product
quantization for nearest neighbor search", TPAMI 2011) without the quantisation. A new row is
compared with the rows of the cells whose centres are nearest to it. Its answer does not depend on
which other rows are asked with it. Suffixes: N rows, C cells, P cells that are searched for each
row, B new rows, R candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from snscc_ray.core import rng
from snscc_ray.core.clustering.cells import to_centres
from snscc_ray.core.clustering.kmeans import partition
from snscc_ray.core.clustering.neighbors import SPARE, knn, nearest_of, scores, smallest
from snscc_ray.core.threads import mapping

_CELL_ROWS = 256
# Share of the true neighbours to be found on the sample, and the rows of the sample.
_RECALL, _SAMPLE = 0.98, 1024
# New rows that are searched together: the more there are, the fewer times each cell is read.
_TOGETHER = 4096


@dataclass(frozen=True, eq=False)
class Index:
    """Cells of a dataset's rows. It does not hold the rows themselves."""

    centres_CD: Tensor
    row_N: Tensor  # int64: rows of the first cell, of the second, …
    edges_C: Tensor  # int64 (C + 1,): where each cell begins in row_N, and N
    neighbours: int  # k for which it was measured
    searched: int  # P
    recall: float  # share of the true neighbours that it finds, on a sample of the rows

    @property
    def share(self) -> float:
        """Return the share of all rows that a new row is compared with."""
        return self.searched / len(self.centres_CD)


@torch.no_grad()
def make_index(
    features_ND: Tensor, k: int, tell: Callable[[float], None] = lambda share: None
) -> Index:
    """Cut the rows into cells, and measure how many must be searched for k neighbours.

    tell: called with the share of the work that is done, roughly.
    """
    N = len(features_ND)
    count = max(1, N // _CELL_ROWS)
    seed = rng.fold("index")
    centres_CD, cell_N = partition(features_ND, count, seed, lambda share: tell(0.8 * share))
    row_N = cell_N.argsort(stable=True)
    edges_C = torch.cat([torch.zeros(1).long(), cell_N.bincount(minlength=count).cumsum(0)])
    # At random: every n-th row could be of one kind.
    sample_S = torch.randperm(N, generator=rng.generator("index", "sample"))[:_SAMPLE]
    z_SD = features_ND[sample_S]
    _, true_SK = knn(
        features_ND,
        k + 1,
        queries=z_SD,
        progress=lambda done, total: tell(0.8 + 0.2 * done / total),
    )
    other_SK = true_SK != sample_S[:, None]
    rank_SC = to_centres(z_SD, centres_CD).argsort(dim=1).argsort(dim=1)
    depths = rank_SC.gather(1, cell_N[true_SK])[other_SK] + 1
    searched = int(depths.sort().values[int(_RECALL * (len(depths) - 1))])
    recall = float((depths <= searched).double().mean())
    return Index(centres_CD, row_N, edges_C, k, searched, recall)


@torch.no_grad()
def query(index: Index, features_ND: Tensor, z_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find k rows near each new row: (d_QK float32, idx_QK int64), nearest first.

    features_ND: the rows that the index was made of. The distances are exact. Where the cells of a
    new row hold fewer than k rows, it is compared with all of them.
    """
    parts = [_query(index, features_ND, z_BD.float(), k) for z_BD in z_QD.split(_TOGETHER)]
    d_QK, idx_QK = (torch.cat(found) for found in zip(*parts, strict=True))
    return d_QK, idx_QK


def _query(index: Index, features_ND: Tensor, z_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    B, P, R = len(z_BD), index.searched, k + SPARE
    cell_BP = to_centres(z_BD, index.centres_CD).topk(P, dim=1, largest=False).indices
    # The (row, cell) pairs, cell by cell: each cell is read once for all rows that chose it.
    order = cell_BP.flatten().argsort(stable=True)
    asked_C = cell_BP.flatten().bincount(minlength=len(index.centres_CD))
    score_MR = z_BD.new_full((B * P, R), torch.inf)
    idx_MR = torch.zeros(B * P, R, dtype=torch.long)

    def search(cell: int, pairs: Tensor) -> None:
        row_M = index.row_N[index.edges_C[cell] : index.edges_C[cell + 1]]
        ref_MD = features_ND[row_M]
        score_BM = scores(z_BD[pairs // P], ref_MD, ref_MD.square().sum(1))
        best_BR = smallest(score_BM, min(R, len(row_M)))
        found = slice(best_BR.shape[1])
        score_MR[pairs, found] = score_BM.gather(1, best_BR)
        idx_MR[pairs, found] = row_M[best_BR]

    pairs = order.split(asked_C.tolist())
    chosen = [cell for cell, own in enumerate(pairs) if len(own)]
    with mapping(z_BD.device) as mapped:
        for _ in mapped(search, chosen, [pairs[cell] for cell in chosen]):
            pass
    score_BM, idx_BM = score_MR.view(B, P * R), idx_MR.view(B, P * R)
    best_BR = score_BM.topk(min(R, P * R), dim=1, largest=False).indices
    none_BR = score_BM.gather(1, best_BR).isinf()
    d_BK, idx_BK = nearest_of(z_BD, features_ND, idx_BM.gather(1, best_BR), none_BR, k)
    short_B = d_BK[:, -1].isinf().nonzero()[:, 0]
    if len(short_B):
        d_BK[short_B], idx_BK[short_B] = knn(features_ND, k, queries=z_BD[short_B])
    return d_BK, idx_BK
