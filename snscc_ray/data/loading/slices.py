"""The slices that a streamed dataset is cut into: a few rows that are read together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import absolute
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.decode import OWN_RANGE, Reading, Source, UnreadableImage, decode_into
from snscc_ray.data.imageset import digests, value_counts
from snscc_ray.data.loading.order import LANES
from snscc_ray.data.names import Files
from snscc_ray.data.rows import Rows
from snscc_ray.data.shards import image_batches

# Decoded bytes of a slice: enough to make the hand-over cheap, but no more, because slices stay in
# memory until all their rows are used.
_SLICE_BYTES = 4 << 20
# Least number of slices, and of windows, per lane and epoch. The first batch waits for one slice of
# each lane, so it is ready after at most an eighth of the reading.
_PER_LANE = 8
# Bytes held per image byte when views are made with the image: up to three views in float32.
VIEWS_BYTES = 12
# Slice size for datasets so small that the rule above would read single rows.
_FEW_ROWS = 16


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of a dataset, read together. It is small, and valid on any machine."""

    first: int  # number of its first row, counting only rows that are kept
    rows: int  # number of rows to read, including corrupt ones
    files: Sequence[Path]  # absolute: the images, or one Parquet file
    group: int | None = None  # row group of the Parquet file; None: the files are images
    offset: int = 0  # position of the first row in that group
    skip: tuple[int, ...] = ()  # corrupt rows to leave out, counted from 0 within the slice
    reading: Reading = OWN_RANGE

    def __len__(self) -> int:
        return self.rows - len(self.skip)

    def name(self, row: int) -> str:
        """Return the name of a row for messages."""
        if self.group is None:
            return str(self.files[row])
        return f"row {self.offset + row} of row group {self.group} of {self.files[0]}"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts of a streamed dataset, independent of the number of workers."""

    slice_rows: int  # maximum
    window: int  # rows that are shuffled together

    @staticmethod
    def of(rows: int, data: DataSettings) -> Sizes:
        """Choose sizes for `rows` rows within `data.memory_mb`.

        A window takes at most a quarter of it, and so do slices in use.
        """
        quarter = data.memory_mb << 18
        row_bytes = image_bytes(data) * (VIEWS_BYTES if data.augment_in == "data" else 1)
        small = max(_FEW_ROWS, rows // (LANES * _PER_LANE))
        slice_rows = min(_SLICE_BYTES, quarter // LANES) // row_bytes
        window = min(quarter // row_bytes, rows // _PER_LANE)
        return Sizes(max(1, min(slice_rows, small)), max(LANES, window))


class Findings(NamedTuple):
    """What a survey keeps of a slice."""

    digests: bytes  # of the readable rows
    values: np.ndarray  # int64 (C, 256), counts over the readable rows
    failures: list[tuple[int, str]]


def image_bytes(data: DataSettings) -> int:
    """Return the bytes of one decoded image."""
    return data.channels * data.image_size**2


def cut(rows: Rows, slice_rows: int) -> list[Slice]:
    """Split a source into slices of at most `slice_rows` rows, each within one row group.

    Raises UserError if the images are neither files nor in shards.
    """
    if rows.files is not None:
        files = _absolute(rows.files)
        return [
            Slice(first, len(part), part, reading=rows.reading)
            for first in range(0, len(files), slice_rows)
            for part in [files[first : first + slice_rows]]
        ]
    if rows.shards is None:
        raise UserError(
            f"data.mode=stream cannot read {rows.place}: set data.mode=resident, or save its "
            "images as files and pack them with `snscc pack`"
        )
    slices: list[Slice] = []
    row = 0
    for shard in rows.shards:
        left = shard.rows
        for group, held in enumerate(shard.groups):
            held = min(held, left)
            # Equal parts, instead of full ones and a small rest.
            parts = -(-held // slice_rows)
            edges = [held * part // parts for part in range(parts + 1)] if held else []
            for begin, end in pairwise(edges):
                place = (absolute(shard.file),)
                slices.append(Slice(row, end - begin, place, group, begin, reading=rows.reading))
                row += end - begin
            left -= held
    return slices


def _absolute(files: Sequence[Path]) -> Sequence[Path]:
    """Return paths or URLs that are valid on any machine and in any working directory."""
    if isinstance(files, Files):
        return replace(files, root=absolute(files.root))
    return tuple(map(absolute, files))


def read_slice(piece: Slice, channels: int, size: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Return the kept rows, uint8 (len(piece), C, S, S), and (row, reason) of unreadable ones.

    The pixels of unreadable rows are undefined. Their numbers count from 0 and include
    `piece.skip`. Raises UserError if the file cannot be read, or no longer holds the rows.
    """
    pixels = np.empty((len(piece), channels, size, size), np.uint8)
    failures: list[tuple[int, str]] = []
    row = seen = 0
    for seen, source in enumerate(_sources(piece), 1):
        if seen - 1 in piece.skip:
            continue
        try:
            decode_into(source, pixels[row], piece.reading)
        except UnreadableImage as error:
            failures.append((seen - 1, str(error)))
        row += 1
    if seen != piece.rows:
        raise UserError(f"{piece.files[0]} changed while it was read: run again once it is stable")
    return pixels, failures


def decode_slice(piece: Slice, channels: int, size: int) -> np.ndarray:
    """Return the kept rows, uint8 (len(piece), C, S, S), which the survey could all read.

    Raises UserError naming the file if a row can no longer be read.
    """
    pixels, failures = read_slice(piece, channels, size)
    for row, reason in failures:
        raise UserError(
            f"{piece.name(row)} can no longer be read ({reason}): restore the image and continue "
            "the run"
        )
    return pixels


def _sources(piece: Slice) -> Iterator[Source]:
    if piece.group is None:
        yield from piece.files
        return
    place, left = -piece.offset, piece.rows
    for batch in image_batches(piece.files[0], piece.group, piece.offset + piece.rows):
        wanted = batch[max(0, -place) :][:left] if place + len(batch) > 0 else []
        place += len(batch)
        left -= len(wanted)
        yield from wanted


def examine(piece: Slice, channels: int, size: int) -> tuple[Findings, np.ndarray]:
    """Return what a survey keeps of a slice, and the pixels of its readable rows."""
    pixels, failures = read_slice(piece, channels, size)
    if failures:
        pixels = np.delete(pixels, [row for row, _ in failures], axis=0)
    return Findings(digests(pixels), value_counts(pixels), failures), pixels
