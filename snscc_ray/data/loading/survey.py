"""Choose whether a dataset is held or streamed; cut a streamed one into slices, and survey it.

A slice is a few rows that are read together. The survey reads the dataset once, before the first
epoch, to find the unreadable images, the fingerprint and the histogram of values. It keeps no
pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import absolute
from snscc_ray.config.settings import DataSettings, Recipe
from snscc_ray.data.decode import (
    OWN_RANGE,
    Reading,
    Source,
    UnreadableImage,
    available_cores,
    decode_into,
)
from snscc_ray.data.imageset import (
    Catalog,
    all_corrupt,
    check_ids,
    corrupt,
    describe,
    digests,
    value_counts,
)
from snscc_ray.data.loading.order import LANES
from snscc_ray.data.names import Files
from snscc_ray.data.rows import Rows
from snscc_ray.data.shards import image_batches

T = TypeVar("T")
S = TypeVar("S")

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


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """A surveyed dataset on disk or in an object store. Every row of it is readable."""

    catalog: Catalog
    slices: tuple[Slice, ...]  # all rows of the catalog, in order; some slices may be empty
    channels: int
    size: int  # side of a decoded image
    window: int  # rows that are shuffled together

    def __len__(self) -> int:
        return len(self.catalog)


# --------------------------------------------------------------------------------- held or streamed


def choose_mode(
    data: DataSettings, rows: int, free_bytes: int, streamable: bool
) -> tuple[Literal["resident", "stream"], str]:
    """Choose whether to hold or stream a dataset of that many rows. Returns the reason, too.

    free_bytes: free memory where it would be held. streamable: see `Rows`.
    Raises UserError if `data.mode=stream` is set but the dataset cannot be streamed.
    """
    needed = rows * image_bytes(data)
    sizes = f"{rows:,} images take {_gigabytes(needed)} and {_gigabytes(free_bytes)} are free"
    if data.mode != "auto":
        if data.mode == "stream" and not streamable:
            raise UserError(
                "data.mode=stream needs image files or Parquet shards: set data.mode=resident, or "
                "save the images as files and pack them with `snscc pack`"
            )
        return data.mode, f"data.mode={data.mode} is set: {sizes}"
    if not streamable:
        return "resident", f"this dataset can only be held in memory: {sizes}"
    if needed <= free_bytes // 2:
        return "resident", f"it fits into half of the memory: {sizes}"
    return "stream", f"it does not fit into half of the memory: {sizes}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def check_streamed(recipe: Recipe) -> None:
    """Refuse settings that need random access to images. Raises UserError naming the field."""
    train = recipe.train
    if train.mined_from == "images" and train.mined_weight and train.objective != "paper":
        raise UserError(
            "train.mined_from=images reads single images at random, and a streamed dataset cannot "
            "do that; use --set train.mined_from=predictions, or data.mode=resident"
        )


# ------------------------------------------------------------------------------------------- slices


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


# --------------------------------------------------------------------------------------- the survey


def survey(
    rows: Rows,
    data: DataSettings,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StreamedSet:
    """Read a whole dataset once in `workers` threads (0: one per core), without keeping pixels.

    The catalog equals that of the same dataset in memory.

    Raises:
        UserError: as `assemble` does, and for a source that cannot be streamed.
    """

    def look(piece: Slice) -> Findings:
        return examine(piece, data.channels, data.image_size)[0]

    slices = plan(rows, data)
    workers = workers or available_cores()
    with closing(in_threads(look, slices, workers, 2 * workers)) as findings:
        return conclude(rows, data, slices, findings, progress)


def plan(rows: Rows, data: DataSettings) -> list[Slice]:
    """Return the slices for a survey. Raises UserError for rows that cannot be streamed."""
    check_ids(rows)
    return cut(rows, Sizes.of(len(rows.ids), data).slice_rows)


def conclude(
    rows: Rows,
    data: DataSettings,
    slices: Sequence[Slice],
    findings: Iterable[Findings],
    progress: Callable[[int, int], None] | None = None,
) -> StreamedSet:
    """Combine the findings of all slices, given in order.

    Raises UserError for a corrupt image (with `skip_corrupt`: only if all are corrupt).
    """
    total = len(rows.ids)
    failed: list[tuple[int, str]] = []
    digests: list[bytes] = []
    values = np.zeros((data.channels, 256), np.int64)
    kept: list[Slice] = []
    done = 0
    for piece, found in zip(slices, findings, strict=True):
        failures = [(piece.first + row, reason) for row, reason in found.failures]
        if failures and not data.skip_corrupt:
            raise corrupt(rows, *failures[0])
        skip = tuple(row for row, _ in found.failures)
        kept.append(replace(piece, first=piece.first - len(failed), skip=skip))
        failed += failures
        digests.append(found.digests)
        values += found.values
        done += piece.rows
        if progress is not None:
            progress(done, total)
    if len(failed) == total:
        raise all_corrupt(rows, *failed[0])
    left = np.setdiff1d(np.arange(total), [row for row, _ in failed])
    shape = (data.channels, data.image_size, data.image_size)
    return StreamedSet(
        describe(rows, left, failed, b"".join(digests), values, shape),
        tuple(kept),
        data.channels,
        data.image_size,
        Sizes.of(total, data).window,
    )


def examine(piece: Slice, channels: int, size: int) -> tuple[Findings, np.ndarray]:
    """Return what a survey keeps of a slice, and the pixels of its readable rows."""
    pixels, failures = read_slice(piece, channels, size)
    if failures:
        pixels = np.delete(pixels, [row for row, _ in failures], axis=0)
    return Findings(digests(pixels), value_counts(pixels), failures), pixels


def in_threads(
    work: Callable[[S], T], items: Sequence[S], workers: int, ahead: int
) -> Generator[T]:
    """Yield `work(item)` in order. At most `ahead` results are in progress or waiting."""
    Image.init()  # here, because the threads would race for it
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            if len(pending) >= max(1, ahead):
                yield pending.popleft().result()
            pending.append(pool.submit(work, item))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
