"""The prediction table: its columns, and writing it as Parquet or CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import torch
from torch import Tensor

from snscc_ray.answers.nearest import KnownImages
from snscc_ray.config.errors import UserError
from snscc_ray.core.storage import write_whole
from snscc_ray.core.tables import write_table

# Separates the values of a list in a CSV: no spreadsheet splits cells at it.
_BETWEEN = "|"


def answers(
    z_BD: Tensor,
    p_BC: Tensor,
    top: int,
    known: KnownImages | None,
    labels: Sequence[str] | None,
) -> pa.Table:
    """Make one row per image from L2-normalised features and cluster probabilities.

    Columns: cluster, with labels the cluster's one as `name`, confidence, the `top` clusters with
    their confidences and, with known images, the ids of the nearest ones with their cosines. Lists
    are in descending order.
    """
    # Sorted, not topk: among equal probabilities the first cluster wins, as in training.
    order_BC = p_BC.argsort(dim=1, descending=True, stable=True)[:, :top].cpu()
    sorted_BC = p_BC.cpu().gather(1, order_BC)
    columns: dict[str, pa.Array] = {"cluster": pa.array(order_BC[:, 0].int().numpy())}
    if labels is not None:
        columns["name"] = pa.array(labels, pa.string()).take(columns["cluster"])
    columns |= {
        "confidence": pa.array(sorted_BC[:, 0].numpy()),
        "top_clusters": _lists(order_BC.int()),
        "top_confidences": _lists(sorted_BC),
    }
    if known is not None:
        d_BK, idx_BK = known.nearest(z_BD)
        columns["nearest"] = _lists(idx_BK, known.ids.take)
        columns["nearest_similarity"] = _lists(1 - d_BK.square() / 2)  # cosine of unit vectors
    return pa.table(columns)


def _lists(values_BK: Tensor, named: Callable[[pa.Array], pa.Array] | None = None) -> pa.Array:
    """Make a list per row, of the values or of what `named` maps them to."""
    B, K = values_BK.shape
    values = pa.array(values_BK.reshape(-1).numpy())
    offsets = pa.array(torch.arange(0, B * K + 1, K, dtype=torch.int32).numpy())
    return pa.ListArray.from_arrays(offsets, named(values) if named else values)


def check_name(file: Path) -> None:
    """Raise UserError unless the file name ends in .parquet or .csv."""
    if file.suffix.lower() not in (".parquet", ".csv"):
        raise UserError(f"--out {file}: end its name in .parquet, or in .csv for a spreadsheet")


def write(table: pa.Table, file: Path) -> None:
    """Write Parquet or CSV, by the file name, atomically."""
    if file.suffix.lower() == ".csv":
        flat = _flat(table)
        write_whole(file, lambda opened: pyarrow.csv.write_csv(flat, opened))
    else:
        write_table(file, table)


def _flat(table: pa.Table) -> pa.Table:
    """Return the table with each list joined into one string."""
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
    # A name may contain the separator: escape it with a backslash.
    return str(value).replace("\\", "\\\\").replace(_BETWEEN, f"\\{_BETWEEN}")
