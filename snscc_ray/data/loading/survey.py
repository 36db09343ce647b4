"""Choose whether a dataset is held or streamed, and survey a streamed one.

The survey reads the dataset once, before the first epoch, to find the unreadable images, the
fingerprint and the histogram of values. It keeps no pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import DataSettings, Recipe
from snscc_ray.data.decode import (
    available_cores,
)
from snscc_ray.data.imageset import (
    Catalog,
    all_corrupt,
    check_ids,
    corrupt,
    describe,
)
from snscc_ray.data.loading.kept_survey import kept_or
from snscc_ray.data.loading.slices import Findings, Sizes, Slice, cut, examine, image_bytes
from snscc_ray.data.rows import Rows

T = TypeVar("T")
S = TypeVar("S")


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


# --------------------------------------------------------------------------------------- the survey


def survey(
    rows: Rows,
    data: DataSettings,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StreamedSet:
    """Read a whole dataset once in `workers` threads (0: one per core), without keeping pixels.

    The catalog equals that of the same dataset in memory. A large dataset that was surveyed before
    is not read again (`kept_survey`); `say` is then told so.

    Raises:
        UserError: as `assemble` does, and for a source that cannot be streamed.
    """

    def look(piece: Slice) -> Findings:
        return examine(piece, data.channels, data.image_size)[0]

    slices = plan(rows, data)
    workers = workers or available_cores()

    def fresh() -> Generator[Findings]:
        return in_threads(look, slices, workers, 2 * workers)

    with closing(kept_or(rows, data, slices, fresh, say)) as findings:
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


def in_threads(
    work: Callable[[S], T], items: Iterable[S], workers: int, ahead: int
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
