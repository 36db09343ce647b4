"""What is said of each image put into a run's clusters, and the file that it goes into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.core.clustering.neighbors import knn
from snscc_ray.core.storage import write_whole

# Between the values of a list in a CSV: no spreadsheet takes it for the end of a cell.
_BETWEEN = "|"


@dataclass(frozen=True)
class KnownImages:
    """A run's own images, the nearest of which are to be named."""

    ids: pa.Array
    features_MD: Tensor  # L2-normalised
    count: int  # of them to name


def answers(z_BD: Tensor, p_BC: Tensor, top: int, known: KnownImages | None) -> pa.Table:
    """A row for each image, by its L2-normalised features and its cluster probabilities.

    Columns: cluster, confidence, the `top` clusters with their confidences and, where images are
    known, the ids of the nearest with their cosines, each list beginning with the greatest.
    """
    # Sorted, not topk: of equal probabilities the first cluster stands first, as in training.
    order_BC = p_BC.argsort(dim=1, descending=True, stable=True)[:, :top].cpu()
    sorted_BC = p_BC.cpu().gather(1, order_BC)
    columns = {
        "cluster": pa.array(order_BC[:, 0].int().numpy()),
        "confidence": pa.array(sorted_BC[:, 0].numpy()),
        "top_clusters": _lists(order_BC.int()),
        "top_confidences": _lists(sorted_BC),
    }
    if known is not None:
        count = min(known.count, len(known.ids))
        d_BK, idx_BK = (found.cpu() for found in knn(known.features_MD, count, queries=z_BD))
        columns["nearest"] = _lists(idx_BK, known.ids.take)
        columns["nearest_similarity"] = _lists(1 - d_BK.square() / 2)  # of vectors of length 1
    return pa.table(columns)


def _lists(values_BK: Tensor, named: Callable[[pa.Array], pa.Array] | None = None) -> pa.Array:
    """A list for each row, of the values or of what they stand for."""
    B, K = values_BK.shape
    values = pa.array(values_BK.reshape(-1).numpy())
    offsets = pa.array(torch.arange(0, B * K + 1, K, dtype=torch.int32).numpy())
    return pa.ListArray.from_arrays(offsets, named(values) if named else values)


def check_name(file: Path) -> None:
    """Raises UserError for a file that is neither Parquet nor CSV by its name."""
    if file.suffix.lower() not in (".parquet", ".csv"):
        raise UserError(f"--out {file}: end its name in .parquet, or in .csv for a spreadsheet")


def write(table: pa.Table, file: Path) -> None:
    """Write Parquet or CSV, as the name says, whole or not at all."""
    if file.suffix.lower() == ".csv":
        flat = _flat(table)
        write_whole(file, lambda opened: pyarrow.csv.write_csv(flat, opened))
    else:
        write_whole(file, lambda opened: pq.write_table(table, opened))


def _flat(table: pa.Table) -> pa.Table:
    """The table with each list as one text."""
    columns = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type):
            real = pa.types.is_floating(column.type.value_type)
            texts = [_BETWEEN.join(_text(v, real) for v in row) for row in column.to_pylist()]
            column = pa.array(texts, pa.string())
        columns[name] = column
    return pa.table(columns)


def _text(value: object, real: bool) -> str:
    if real:
        return f"{value:.6g}"
    # A name may hold what stands between the values: there a backslash is put before it.
    return str(value).replace("\\", "\\\\").replace(_BETWEEN, f"\\{_BETWEEN}")
