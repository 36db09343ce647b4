"""Parquet shards: one encoded image a row, with an id, a label and a class name where known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from snscc_ray.data.imageset import BATCH, Rows
from snscc_ray.errors import UserError
from snscc_ray.paths import is_url

MAX_CLASSES = 65_536


@dataclass(frozen=True)
class Shard:
    """A Parquet file and which of its columns there are."""

    file: Path
    rows: int  # how many to read, from the first
    groups: tuple[int, ...]  # rows in each of its row groups
    id: bool
    label: bool
    class_name: bool


def shard_files(path: Path) -> list[Path]:
    """The Parquet files that `path` is or directly holds, sorted by name."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))


def read_shards(path: Path, limit: int | None) -> Rows:
    """The rows of one Parquet file or of all in a folder, in the order of the file names.

    `image` is binary, or HuggingFace's struct with `bytes`. A row without an `id` is called
    `FILE:ROW`. `label` must be an integer and `class_name` names it; both are optional.

    Raises:
        UserError: no such file, one that cannot be read, or a column that is missing or of a
            wrong type or range.
    """
    files = shard_files(path)
    if not files:
        raise UserError(f"no *.parquet files in {path}: give their folder")
    shards = [_inspect(file) for file in files]
    bare = next((shard.file for shard in shards if not shard.label), None)
    if bare is not None and any(shard.label for shard in shards):
        raise UserError(
            f"{bare} has no column `label` while others beside it have: "
            "give it to all shards or to none"
        )
    used = _first_rows(shards, limit)
    ids: list[str] = []
    labels: list[np.ndarray] = []
    names: dict[int, str] = {}
    for shard in used:
        table = _read_columns(shard)
        ids += _ids(shard, table)
        if shard.label:
            labels.append(_labels(shard, table["label"]))
            if shard.class_name:
                names.update(_names(shard, labels[-1], table["class_name"], names))
    return Rows(
        place=str(path),
        ids=ids,
        batches=_images(used),
        labels=np.concatenate(labels) if labels else None,
        class_names=_name_all(names),
        shards=used,
    )


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # What an object store's client raises is open-ended.
    broken = Exception if is_url(file) else (pa.ArrowException, OSError)
    try:
        with ExitStack() as held:
            source = held.enter_context(file.open("rb")) if is_url(file) else file
            # The buffer makes it stream a row group instead of loading it whole.
            yield held.enter_context(
                pq.ParquetFile(source, buffer_size=1 << 20, page_checksum_verification=True)
            )
    except UserError:
        raise
    except broken as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} cannot be read as Parquet ({reason}): write or copy it again, or remove it"
        ) from error


def _inspect(file: Path) -> Shard:
    import pyarrow as pa

    with _parquet(file) as opened:
        schema, about = opened.schema_arrow, opened.metadata
        groups = tuple(about.row_group(number).num_rows for number in range(about.num_row_groups))
    columns = set(schema.names)
    if "image" not in columns:
        raise UserError(
            f"{file} has no column `image` (it has: {', '.join(schema.names)}): "
            "name the column of encoded images `image`"
        )
    kind = schema.field("image").type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if str(kind) not in ("binary", "large_binary", "binary_view"):
        raise UserError(
            f"column `image` of {file} is {kind}: it must hold encoded images as binary"
        )
    if "label" in columns and not pa.types.is_integer(schema.field("label").type):
        raise UserError(
            f"column `label` of {file} is {schema.field('label').type}: "
            "make it an integer, or drop it (labels only measure)"
        )
    return Shard(
        file, sum(groups), groups, "id" in columns, "label" in columns, "class_name" in columns
    )


def _first_rows(shards: list[Shard], limit: int | None) -> list[Shard]:
    used = []
    left = sum(shard.rows for shard in shards) if limit is None else limit
    for shard in shards:
        rows = min(shard.rows, left)
        if rows:
            used.append(replace(shard, rows=rows))
        left -= rows
    return used


def _read_columns(shard: Shard) -> Any:
    """The columns other than the images, as an Arrow table of the shard's first rows."""
    import pyarrow as pa

    columns = [name for name in ("id", "label", "class_name") if getattr(shard, name)]
    batches, left = [], shard.rows
    with _parquet(shard.file) as opened:
        for batch in opened.iter_batches(min(left, 65_536), columns=columns) if columns else ():
            batches.append(batch.slice(0, left))
            left -= len(batches[-1])
            if not left:
                break
        return pa.Table.from_batches(batches) if batches else None


def _ids(shard: Shard, table: Any) -> list[str]:
    given = table["id"].to_pylist() if shard.id else [None] * shard.rows
    return [
        f"{shard.file.name}:{row}" if value is None else str(value)
        for row, value in enumerate(given)
    ]


def _labels(shard: Shard, column: Any) -> np.ndarray:
    values = column.to_pylist()
    for row, value in enumerate(values):
        if value is None or not 0 <= value < MAX_CLASSES:
            raise UserError(
                f"label {value} in row {row} of {shard.file} is no class number: use 0 to "
                f"{MAX_CLASSES - 1}, or drop the column `label` (labels only measure)"
            )
    return np.array(values, np.int64)


def _names(shard: Shard, labels: np.ndarray, column: Any, known: dict[int, str]) -> dict[int, str]:
    names = dict(known)
    for label, name in set(zip(labels.tolist(), column.to_pylist(), strict=True)):
        if name is not None and names.setdefault(label, str(name)) != str(name):
            raise UserError(
                f"label {label} is called both {names[label]!r} and {name!r} in {shard.file}: "
                "give each label one class_name, or drop that column"
            )
    return names


def _name_all(names: dict[int, str]) -> tuple[str, ...] | None:
    """A label that never occurs (`limit` can do that) goes by its number."""
    return tuple(names.get(label, str(label)) for label in range(max(names) + 1)) if names else None


def _images(shards: list[Shard]) -> Iterator[list[bytes | None]]:
    for shard in shards:
        yield from image_batches(shard.file, None, shard.rows)


def image_batches(file: Path, group: int | None, rows: int) -> Iterator[list[bytes | None]]:
    """The first `rows` images of a file, or of one of its row groups, a batch at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with _parquet(file) as opened:
        groups = None if group is None else [group]
        for batch in opened.iter_batches(BATCH, row_groups=groups, columns=["image"]):
            column = batch.column("image").slice(0, rows)
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, "bytes")
            rows -= len(column)
            yield column.to_pylist()
            if not rows:
                break
