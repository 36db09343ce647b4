"""Parquet files of a run: written whole, with checksums that reading verifies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from snscc_ray.config.errors import UserError
from snscc_ray.core.storage import WRITE_ANEW, write_whole


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table to one Parquet file. Raises UserError on a full disk."""
    write_whole(path, lambda file: pq.write_table(table, file, write_page_checksum=True))


def read_table(
    path: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> pa.Table:
    """Read a file of `write_table`: all columns, or those named and the optional ones it has.

    Raises UserError if it is damaged, gone or lacks a column.
    """
    try:
        with path.open("rb") as file:  # pyarrow takes UTF-8 names only
            if columns is not None and optional:
                there = pq.read_schema(file).names
                columns = [*columns, *(name for name in optional if name in there)]
                file.seek(0)
            return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged or gone ({reason}): {WRITE_ANEW}") from error
