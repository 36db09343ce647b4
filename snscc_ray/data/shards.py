"""Read Parquet shards: one encoded image per row, optionally with id, label and class name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.core.storage import read_json
from snscc_ray.data.labels import Labels
from snscc_ray.data.names import Names
from snscc_ray.data.rows import BATCH, Rows, Shard

# The file in which `snscc pack` describes the shards of a folder.
MANIFEST = "pack.json"


def image_shards(files: list[Path]) -> dict[Path, int]:
    """Return those Parquet files that have a column `image`, and the number of their rows.

    Others hold something else, such as the output of `snscc predict`. A broken file is included,
    with no rows.
    """
    held: dict[Path, int] = {}
    for file in files:
        try:
            with opened_parquet(file) as opened:
                if "image" in opened.schema_arrow.names:
                    held[file] = opened.metadata.num_rows
        except UserError:
            held[file] = 0
    return held


def shard_files(path: Path) -> list[Path]:
    """Return the Parquet file `path`, or those directly in the folder `path`, sorted by name."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))


def ids_and_labels(
    shards: Sequence[Shard],
) -> tuple[Names, np.ndarray | None, tuple[str, ...] | None, str | None]:
    """Return the ids, labels and class names of all rows, and a note on labels that are ignored."""
    import pyarrow as pa

    ids, columns = [Names.of([]).array], Labels()
    for shard in shards:
        table = read_columns(shard)
        ids.append(Names.of(ids_of(shard, table)).array)
        columns.add(shard, table)
    whole = Names(pa.concat_arrays(ids))
    return whole, *columns.concluded(len(whole))


def read_shards(path: Path, limit: int | None) -> Rows:
    """List the rows of one Parquet file, or of all in a folder in the order of the file names.

    `image` is binary, or Hugging Face's struct with `bytes`. A row without an `id` is called
    `FILE:ROW`. `label` is an integer or a string, and `class_name` names it. Both are optional.
    Labels are ignored if some rows have none or some are not classes. Files without a column
    `image` are ignored if others have one.

    Raises:
        UserError: no such file, an unreadable file, a missing column, a column of the wrong type,
            or an unfinished `snscc pack`.
    """
    files = shard_files(path)
    _refuse_part(path, files)
    if not files:
        raise UserError(f"no *.parquet files in {path}: give their folder")
    kept = [*image_shards(files)] or files
    shards = [inspect_shard(file) for file in kept]
    used = first_rows(shards, limit)
    ids, labels, class_names, note = ids_and_labels(used)
    other = [file.name for file in files if file not in kept]
    left = f"ignored for lack of a column `image`: {', '.join(other[:8])}" if other else None
    return Rows(
        place=str(path),
        ids=ids,
        batches=_images(used),
        labels=labels,
        class_names=class_names,
        shards=used,
        notes=tuple(text for text in (left, note) if text),
    )


def _refuse_part(path: Path, files: Sequence[Path]) -> None:
    manifest = path / MANIFEST
    if path.is_file() or not manifest.exists():
        return
    held = read_json(manifest)
    entries = held.get("shards") if isinstance(held, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return  # not written by `snscc pack`
    names = {file.name for file in files}
    there = [entry for entry in entries if "sha256" in entry and entry.get("file") in names]
    if len(there) < len(entries):
        raise UserError(
            f"{path} holds only {len(there)} of the {len(entries)} shards in its {MANIFEST}: "
            f"finish them with the same `snscc pack` command, or remove {MANIFEST} to use the "
            "shards that are there"
        )


@contextmanager
def opened_parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Clients of object stores raise many kinds of errors.
    broken = Exception if is_url(file) else (pa.ArrowException, OSError)
    try:
        with ExitStack() as held:
            source = held.enter_context(file.open("rb")) if is_url(file) else file
            # With a buffer, a row group is streamed instead of loaded whole.
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


def inspect_shard(file: Path) -> Shard:
    import pyarrow as pa

    with opened_parquet(file) as opened:
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
    return Shard(
        file, sum(groups), groups, "id" in columns, "label" in columns, "class_name" in columns
    )


def first_rows(shards: list[Shard], limit: int | None) -> list[Shard]:
    used = []
    left = sum(shard.rows for shard in shards) if limit is None else limit
    for shard in shards:
        rows = min(shard.rows, left)
        if rows:
            used.append(replace(shard, rows=rows))
        left -= rows
    return used


def read_columns(shard: Shard) -> Any:
    """Read the columns other than the images, for the first rows of the shard."""
    import pyarrow as pa

    columns = [name for name in ("id", "label", "class_name") if getattr(shard, name)]
    batches, left = [], shard.rows
    with opened_parquet(shard.file) as opened:
        for batch in opened.iter_batches(min(left, 65_536), columns=columns) if columns else ():
            batches.append(batch.slice(0, left))
            left -= len(batches[-1])
            if not left:
                break
        return pa.Table.from_batches(batches) if batches else None


def ids_of(shard: Shard, table: Any) -> Iterator[str]:
    """Yield the ids of a shard's rows; `table` has its columns other than the images."""
    row = 0
    for part in table.to_batches() if shard.id else ():
        for value in part.column("id").to_pylist():
            yield f"{shard.file.name}:{row}" if value is None else str(value)
            row += 1
    yield from (f"{shard.file.name}:{number}" for number in range(row, shard.rows))


def sample_images(shards: Sequence[Shard], step: int) -> Iterator[bytes | None]:
    """Yield every `step`th image of all rows. Row groups without one are not read."""
    first = 0  # first row of the group, counted over all shards
    for shard in shards:
        left = shard.rows
        for group, held in enumerate(shard.groups):
            rows = min(held, left)
            wanted = range(-first % step, rows, step)
            if wanted:
                place = 0
                for batch in image_batches(shard.file, group, wanted[-1] + 1):
                    yield from (
                        batch[row - place] for row in wanted if 0 <= row - place < len(batch)
                    )
                    place += len(batch)
            first += rows
            left -= rows


def _images(shards: list[Shard]) -> Iterator[list[bytes | None]]:
    for shard in shards:
        yield from image_batches(shard.file, None, shard.rows)


def image_batches(file: Path, group: int | None, rows: int) -> Iterator[list[bytes | None]]:
    """Yield the first `rows` images of a file, or of one of its row groups, in batches."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with opened_parquet(file) as opened:
        groups = None if group is None else [group]
        for batch in opened.iter_batches(BATCH, row_groups=groups, columns=["image"]):
            column = batch.column("image").slice(0, rows)
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, "bytes")
            rows -= len(column)
            yield column.to_pylist()
            if not rows:
                break
