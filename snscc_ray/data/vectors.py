"""Read embeddings in place of images: NumPy files, and a column of Parquet files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path, is_url
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.decode import UnreadableImage, decode_into
from snscc_ray.data.imageset import Catalog, check_ids, describe, digests
from snscc_ray.data.names import Names
from snscc_ray.data.rows import Batches, Rows, Shard
from snscc_ray.data.shards import (
    first_rows,
    ids_and_labels,
    image_batches,
    inspect_shard,
    opened_parquet,
    shard_files,
)

ARRAYS = (".npy", ".npz")
# Names by which a column of embeddings is found among others.
NAMES = ("embedding", "embeddings", "feature", "features", "vector")
_ROWS = 4096  # converted at a time
_SIDE = 96  # of a picture, in pixels


def rows_of_vectors(values_ND: np.ndarray, place: str, label: str | None = None) -> Rows:
    """Make one row per vector of an array of floats (N, D); its number is its id.

    label: what the ids begin with. Vectors are divided by their lengths and rounded to float16.
    Raises UserError for another shape or type, and for a vector that has no direction.
    """
    if values_ND.dtype.kind != "f":
        raise UserError(
            f"{place} holds {values_ND.dtype} values: embeddings must be floats; save them as "
            "float32 or float16"
        )
    if values_ND.ndim != 2 or values_ND.shape[1] < 2:
        raise UserError(
            f"{place} has shape {values_ND.shape}: embeddings must be an array (N, D) with one row "
            "per image and at least two numbers in each"
        )
    unit_ND = np.empty(values_ND.shape, np.float16)
    for first in range(0, len(values_ND), _ROWS):
        part = slice(first, first + _ROWS)
        unit_ND[part] = _unit(values_ND[part], first, place)
    begin = "" if label is None else f"{label}:"
    ids = Names.of(f"{begin}{row}" for row in range(len(unit_ND)))
    return Rows(place=place, ids=ids, batches=Batches([]), vectors=unit_ND)


def catalog_of_vectors(rows: Rows, channels: int) -> Catalog:
    """Return the catalog of embeddings. Raises UserError for no rows or a repeated id."""
    check_ids(rows)
    assert rows.vectors is not None
    no_pixels = np.zeros((channels, 256), np.int64)
    kept = np.arange(len(rows.ids))
    return describe(rows, kept, [], digests(rows.vectors), no_pixels, rows.vectors.shape[1:])


def read_vectors(path: Path, column: str | None, limit: int | None) -> Rows:
    """Read the embeddings of a NumPy file, of a Parquet file, or of all in a folder.

    column: the column, or the array of an .npz file; None: the one that is named like embeddings,
    or the only one. Columns `id`, `label`, `class_name` and `image` are optional.
    Raises UserError naming the row or the column.
    """
    if path.suffix.lower() in ARRAYS and path.is_file():
        array = _array(path, column)
        return rows_of_vectors(array[:limit] if array.ndim else array, str(path), path.name)
    name, used, notes = _shards_of(path, column, limit)
    ids, labels, class_names, note = ids_and_labels(used)
    vectors_ND: np.ndarray | None = None
    row = 0
    for shard in used:
        for part in _parts(shard, name):
            if vectors_ND is None:
                vectors_ND = np.empty((len(ids), part.shape[1]), np.float16)
            if part.shape[1] != vectors_ND.shape[1]:
                raise UserError(
                    f"column `{name}` of {shard.file} has lists of {part.shape[1]} numbers and the "
                    f"files before it of {vectors_ND.shape[1]}: all embeddings must have one length"
                )
            vectors_ND[row : row + len(part)] = part
            row += len(part)
    return Rows(
        place=str(path),
        ids=ids,
        batches=Batches([]),
        labels=labels,
        class_names=class_names,
        vectors=vectors_ND,
        notes=tuple([*notes, *([note] if note else [])]),
    )


def read_queries(path: Path) -> Rows:
    """Read one embedding (D,), or several (N, D), of a .npy file. Raises UserError."""
    return rows_of_vectors(np.atleast_2d(_array(path, None)), str(path), path.name)


def _shards_of(
    path: Path, column: str | None, limit: int | None
) -> tuple[str, list[Shard], list[str]]:
    """Return the column of the embeddings, the Parquet files with it, and a note on others."""
    files = shard_files(path)
    if not files:
        raise UserError(f"no embeddings in {path}: give a .npy, .npz or Parquet file")
    name = _only(_columns_of(files), column, str(path), "column of floats")
    held = [file for file in files if name in _schema(file).names]
    used = first_rows([_shard(file) for file in held], limit)
    if not used:
        raise UserError(f"{path} holds no rows: give a file that holds some")
    left = [file.name for file in files if file not in held]
    notes = [f"ignored for lack of a column `{name}`: {', '.join(left[:8])}"] if left else []
    arrays = [file.name for file in path.glob("*") if file.suffix.lower() in ARRAYS]
    if arrays:
        named = ", ".join(sorted(arrays)[:8])
        notes.append(f"ignored beside Parquet files: {named} (give an array by its own path)")
    return name, used, notes


def embedding_shards(files: Sequence[Path], column: str | None) -> tuple[int, int]:
    """Return the rows of Parquet files with a column that is named like embeddings (or `column`),
    and of those without images that have some column of lists of floats."""
    named = others = 0
    for file in files:
        try:
            with opened_parquet(file) as opened:
                schema, count = opened.schema_arrow, opened.metadata.num_rows
        except UserError:
            continue
        found = {*_lists(schema)}
        if column in schema.names or found & {*NAMES}:
            named += count
        elif (found or _integers(schema).keys() & {*NAMES}) and "image" not in schema.names:
            others += count
    return named, others


def pictures_of(data: DataSettings, rows: Sequence[int]) -> Tensor | None:
    """Return the pictures of some rows of embeddings, uint8 (R, 3, S, S), S = 96.

    An unreadable picture is grey. None: there are no pictures.
    """
    if data.path is None or as_path(data.path).suffix.lower() in ARRAYS:
        return None
    held = _shards_of(as_path(data.path), data.column, data.limit)[1]
    try:
        for shard in held:
            inspect_shard(shard.file)
    except UserError:
        return None  # no column of images
    wanted = {row: number for number, row in enumerate(rows)}
    images_RCSS = np.full((len(rows), 3, _SIDE, _SIDE), 128, np.uint8)
    row = 0
    for shard in held:
        for batch in image_batches(shard.file, None, shard.rows):
            for image in batch:
                if row in wanted:
                    pixels_CSS = np.empty((3, _SIDE, _SIDE), np.uint8)
                    with suppress(UnreadableImage):
                        decode_into(image, pixels_CSS)
                        images_RCSS[wanted[row]] = pixels_CSS
                row += 1
    return torch.from_numpy(images_RCSS)


# --------------------------------------------------------------------------------- one row each


def _named(row: int, place: object) -> str:
    return f"row {row} of {place} (counted from 0)"


def _unit(values_BD: np.ndarray, first: int, place: object) -> np.ndarray:
    """Return the rows with length 1, float16. Raises UserError for one that cannot have it.

    first: the number of the first of them in `place`.
    """
    exact_BD = values_BD.astype(np.float64)
    most_B = np.abs(exact_BD).max(axis=1)
    for row in np.flatnonzero(~np.isfinite(most_B) | (most_B == 0))[:1]:
        what = "holds only zeros" if most_B[row] == 0 else "holds a NaN or an infinite value"
        raise UserError(
            f"{_named(first + int(row), place)} {what}, so it has no direction: leave that row out"
        )
    exact_BD /= most_B[:, None]  # else very large or small numbers would have no square
    exact_BD /= np.linalg.norm(exact_BD, axis=1, keepdims=True)
    return exact_BD.astype(np.float16)


# ----------------------------------------------------------------------------------- NumPy files


def _array(path: Path, name: str | None) -> np.ndarray:
    try:
        if is_url(path):
            held = np.load(BytesIO(path.read_bytes()), allow_pickle=False)
        else:
            held = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(held, np.ndarray):
            if name is not None:
                raise UserError(
                    f"{path} is one array, so it has no column {name!r}; leave --column "
                    "(data.column of a recipe) out"
                )
            return held
        with held:
            return np.asarray(held[_only(held.files, name, str(path), "array")])
    except (OSError, ValueError, OverflowError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        if "pickle" in reason or "Python objects" in reason:  # NumPy advises to load it unsafely
            reason = "it holds pickled objects, or is no NumPy file"
        raise UserError(
            f"{path} cannot be read as a NumPy array ({reason}): save the embeddings with "
            "`np.save`, as an array of floats (N, D)"
        ) from error


def _only(names: Sequence[str], wanted: str | None, place: str, kind: str) -> str:
    """Return the name of the embeddings. Raises UserError if it is not known which they are."""
    if wanted is not None:
        if wanted not in names:
            has = ", ".join(names) or "none"
            raise UserError(f"{place} has no {kind} {wanted!r} (it has: {has}): name another")
        return wanted
    likely = [name for name in names if name in NAMES] or [*names]
    if len(likely) > 1:
        raise UserError(
            f"{place} has {len(likely)} {kind.replace(' ', 's ', 1) if ' ' in kind else kind + 's'}"
            f" that may be the embeddings ({', '.join(likely)}): choose one with --column NAME "
            "(data.column of a recipe)"
        )
    if not likely:
        raise UserError(f"{place} has no {kind} that could be embeddings: name another file")
    return likely[0]


# --------------------------------------------------------------------------------- Parquet files


def _schema(file: Path) -> Any:
    with opened_parquet(file) as opened:
        return opened.schema_arrow


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _lists(schema: Any) -> list[str]:
    """Return the columns of lists of floats."""
    import pyarrow as pa

    return [
        field.name
        for field in schema
        if _is_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]


def _integers(schema: Any) -> dict[str, str]:
    """Return the columns of lists of integers, and the kind of each."""
    import pyarrow as pa

    return {
        field.name: str(field.type.value_type)
        for field in schema
        if _is_list(field.type) and pa.types.is_integer(field.type.value_type)
    }


def _columns_of(files: Sequence[Path]) -> list[str]:
    """Return the columns of lists of floats of all files. Raises UserError if there are none."""
    found: dict[str, None] = {}
    integers: dict[str, str] = {}
    for file in files:
        schema = _schema(file)
        found |= dict.fromkeys(_lists(schema))
        integers |= _integers(schema)
    named = next((name for name in integers if name in NAMES), None)
    if found and (named is None or {*found} & {*NAMES}):
        return [*found]
    if integers:
        name = named or next(iter(integers))
        kind = integers[name]
        raise UserError(
            f"column `{name}` of {files[0]} holds {kind} values: embeddings must be floats; save "
            "them as float32 or float16"
        )
    raise UserError(
        f"{files[0]} has no column of lists of floats (it has: {', '.join(_schema(files[0]).names)}"
        "): write the embeddings into a column `embedding`"
    )


def _shard(file: Path) -> Shard:
    with opened_parquet(file) as opened:
        about, columns = opened.metadata, set(opened.schema_arrow.names)
        groups = tuple(about.row_group(number).num_rows for number in range(about.num_row_groups))
    return Shard(
        file, sum(groups), groups, "id" in columns, "label" in columns, "class_name" in columns
    )


def _parts(shard: Shard, name: str) -> Iterator[np.ndarray]:
    """Yield the vectors of a file in parts, float16 (rows, D) of length 1. Raises UserError."""
    import pyarrow as pa
    import pyarrow.compute as pc

    first, width = 0, None
    with opened_parquet(shard.file) as opened:
        for batch in opened.iter_batches(_ROWS, columns=[name]):
            lists = batch.column(0).slice(0, shard.rows - first)
            if not len(lists):
                return
            for row in np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[:1]:
                what = _named(first + int(row), shard.file)
                raise UserError(f"{what} has no embedding: leave that row out")
            lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
            width = int(lengths[0]) if width is None else width
            for row in np.flatnonzero(lengths != width)[:1]:
                raise UserError(
                    f"{_named(first + int(row), shard.file)} has {lengths[row]} numbers and the "
                    f"rows before it {width}: all embeddings must have one length"
                )
            if width < 2:
                raise UserError(
                    f"column `{name}` of {shard.file} has lists of {width}: embeddings need two "
                    "numbers or more"
                )
            # A null within a list becomes NaN.
            flat = lists.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
            yield _unit(flat.reshape(len(lists), width), first, shard.file)
            first += len(lists)
