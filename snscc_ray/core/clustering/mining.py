"""Mined neighbours: the nearest rows of each row in the whole dataset, kept with a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.core import distributed
from snscc_ray.core.checkpoints import AGAIN
from snscc_ray.core.clustering.cells import make_cells, search_cells
from snscc_ray.core.clustering.neighbors import check_k, knn, local_radius
from snscc_ray.core.losses.neighbors import soft_confidence
from snscc_ray.core.tables import write_table

# Up to so many rows on a CPU every row is compared with every other: some ten seconds on two cores.
_EXACT_ROWS = 2**16
# Where neighbours are spread over more than this share of the cells, cells save nothing.
_LARGEST_SHARE = 0.4


@dataclass(frozen=True, eq=False)
class MinedNeighbors:
    """The K nearest rows of each row of a dataset, with Eq. 2's confidence; tensors on the CPU."""

    neighbors_NK: Tensor  # int32, nearest first
    distances_NK: Tensor  # float32
    confidence_NK: Tensor  # float32
    recall: float = 1.0  # share of the true neighbours that were found; not kept in the file

    def save(self, path: Path) -> None:
        """Write one Parquet file, whole or not at all: per row three lists of length K."""
        N, K = self.neighbors_NK.shape
        lists = [
            pa.FixedSizeListArray.from_arrays(tensor.reshape(-1).numpy(), K)
            for tensor in (self.neighbors_NK, self.distances_NK, self.confidence_NK)
        ]
        table = pa.table([np.arange(N, dtype=np.int32), *lists], names=list(_schema(K)))
        write_table(path, table)

    @classmethod
    def load(cls, path: Path) -> MinedNeighbors:
        """Read a file of `save`. Raises UserError if it is missing, truncated or foreign."""
        try:
            with path.open("rb") as file:
                table = pq.ParquetFile(file, page_checksum_verification=True).read()
        except FileNotFoundError:
            raise UserError(f"no mined neighbours at {path}: {AGAIN}") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged or not a Parquet file: {AGAIN}") from error
        types = {name: table.schema.field(name).type for name in table.column_names}
        K = getattr(types.get("neighbors"), "list_size", 0)
        if types != _schema(K):
            raise UserError(f"{path} does not hold mined neighbours: {AGAIN}")
        neighbors_NK, distances_NK, confidence_NK = (
            torch.from_numpy(np.array(table[name].combine_chunks().flatten())).reshape(-1, K)
            for name in ("neighbors", "distances", "confidence")
        )
        return cls(neighbors_NK, distances_NK, confidence_NK)


def _schema(K: int) -> dict[str, pa.DataType]:
    return {
        "row": pa.int32(),
        "neighbors": pa.list_(pa.int32(), K),
        "distances": pa.list_(pa.float32(), K),
        "confidence": pa.list_(pa.float32(), K),
    }


def mine(
    features_ND: Tensor,
    k: int,
    count: Callable[..., None] = lambda task, done, total, unit="": None,
) -> MinedNeighbors:
    """Find the k nearest rows of each row in the dataset, with the local radius (Def. 1, Eq. 2).

    Exact on a GPU, and on a CPU up to 65,536 rows. More rows are searched in the nearest cells
    only (`cells`), and `recall` is then measured.
    Every process holds all features and searches for its share of the rows; all get all results.
    count: shows the progress of a task; see `Display.count`.
    Raises ValueError if k < 1 or there are at most k rows.
    """
    N = len(features_ND)
    share, cells = distributed.own_share(N), None
    progress = partial(count, "neighbours")
    if N > _EXACT_ROWS and not features_ND.is_cuda:
        check_k(k)

        def tell(done: float) -> None:
            count("cells", int(100 * done), 100, "%")

        cells = distributed.from_first(lambda: make_cells(features_ND, k, tell))
        cells = None if cells.share > _LARGEST_SHARE else cells
    if cells is None:
        found, recall = knn(features_ND, k, rows=share, progress=progress), 1.0
    else:
        found, recall = search_cells(features_ND, cells, k, share, progress), cells.recall
    d_NK, idx_NK = (distributed.gather(part, N) for part in found)
    if cells is not None:  # back from places to rows
        place_N = cells.row_N.argsort()
        d_NK, idx_NK = d_NK[place_N], idx_NK[place_N]
    s_NK = soft_confidence(d_NK, local_radius(d_NK))
    return MinedNeighbors(idx_NK.int().cpu(), d_NK.cpu(), s_NK.cpu(), recall)
