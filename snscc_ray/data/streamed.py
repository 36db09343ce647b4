"""A set that stays in its files: read slice by slice in every epoch, within a bound of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from queue import SimpleQueue
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from snscc_ray import distributed
from snscc_ray.config import DataSettings
from snscc_ray.data.decode import available_cores
from snscc_ray.data.imageset import Catalog, Rows, all_corrupt, check_ids, corrupt, describe
from snscc_ray.data.order import batch_edges, steps_of, streamed_order
from snscc_ray.data.resident import Batch, Viewer
from snscc_ray.data.slices import (
    VIEWS_BYTES,
    Findings,
    Sizes,
    Slice,
    cut,
    decode_slice,
    examine,
    image_bytes,
)
from snscc_ray.errors import UserError

T = TypeVar("T")
S = TypeVar("S")

# Batches that are ready, or under way, while the loop works on one.
_AHEAD = 2


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """A set on disk or in an object store that was read once: every row of it is readable."""

    catalog: Catalog
    slices: tuple[Slice, ...]  # all rows of the catalog in its order; some may have none left
    channels: int
    size: int  # of an image, decoded
    window: int  # rows that are shuffled among each other

    def __len__(self) -> int:
        return len(self.catalog)


class Decoded(NamedTuple):
    """A slice as a reader hands it over; one of the two is None."""

    pixels: np.ndarray | None  # uint8 (rows, C, S, S)
    views: tuple[np.ndarray, ...] | None  # float32 (rows, S, S, C) each

    def arrays(self) -> Sequence[np.ndarray]:
        if self.views is not None:
            return self.views
        assert self.pixels is not None
        return [self.pixels]


class Reader(Protocol):
    def __call__(self, slices: Sequence[Slice], viewer: Viewer | None) -> Generator[Decoded]:
        """The slices decoded, in their order; with a viewer, the views it makes of them.

        Raises UserError if a slice can no longer be read.
        """
        ...


# ------------------------------------------------------------------------------------- survey


def choose_mode(
    data: DataSettings, rows: int, free_bytes: int, streamable: bool
) -> tuple[Literal["resident", "stream"], str]:
    """Whether a set of that many rows is to be held in memory, and why, in a sentence.

    free_bytes: of the memory that would hold it. streamable: see `Rows`.
    Raises UserError if `data.mode=stream` is asked for and cannot be had.
    """
    needed = rows * image_bytes(data)
    sizes = f"{rows:,} images take {_gigabytes(needed)} and {_gigabytes(free_bytes)} are free"
    if data.mode != "auto":
        if data.mode == "stream" and not streamable:
            raise UserError(
                "data.mode=stream needs image files or Parquet shards: write the images as files "
                "and those as shards with `snscc pack`, or set data.mode=resident"
            )
        return data.mode, f"data.mode={data.mode} was asked for: {sizes}"
    if not streamable:
        return "resident", f"such a set can only be held in memory: {sizes}"
    if needed <= free_bytes // 2:
        return "resident", f"it fits into half of the memory: {sizes}"
    return "stream", f"it does not fit into half of the memory: {sizes}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def survey(
    rows: Rows,
    data: DataSettings,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StreamedSet:
    """Read a whole set once, in `workers` threads (0: one per core), and keep no pixels of it.

    Its catalog equals that of the same set in memory.

    Raises:
        UserError: as `assemble` does, and for a source that cannot be streamed.
    """

    def look(piece: Slice) -> Findings:
        return examine(piece, data.channels, data.image_size)[0]

    slices = plan(rows, data)
    workers = workers or available_cores()
    with closing(_in_threads(look, slices, workers, 2 * workers)) as findings:
        return conclude(rows, data, slices, findings, progress)


def plan(rows: Rows, data: DataSettings) -> list[Slice]:
    """The slices a survey reads. Raises UserError for rows that cannot be streamed."""
    check_ids(rows)
    return cut(rows, Sizes.of(len(rows.ids), data).slice_rows)


def conclude(
    rows: Rows,
    data: DataSettings,
    slices: Sequence[Slice],
    findings: Iterable[Findings],
    progress: Callable[[int, int], None] | None = None,
) -> StreamedSet:
    """Put the findings in all slices together, which come in order.

    Raises UserError for a corrupt image (with `skip_corrupt`: only if no other is left).
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


# ------------------------------------------------------------------------------------ reading


def threads_reader(streamed: StreamedSet, memory_mb: int, workers: int = 0) -> Reader:
    """A reader in `workers` threads of this process (0: one per core), for runs without Ray."""
    workers = workers or available_cores()
    largest = max(len(piece) for piece in streamed.slices)
    bytes_each = largest * streamed.channels * streamed.size**2
    ahead = max(workers, (memory_mb << 18) // bytes_each)

    def read(slices: Sequence[Slice], viewer: Viewer | None) -> Generator[Decoded]:
        def decode(piece: Slice) -> Decoded:
            return decoded(piece, streamed.channels, streamed.size, viewer)

        return _in_threads(decode, slices, workers, ahead // (VIEWS_BYTES if viewer else 1))

    return read


def decoded(piece: Slice, channels: int, size: int, viewer: Viewer | None) -> Decoded:
    """One slice as a reader hands it over. Raises UserError if it can no longer be read."""
    pixels = decode_slice(piece, channels, size)
    if viewer is None:
        return Decoded(pixels, None)
    rows_B = torch.arange(piece.first, piece.first + len(piece))
    views = viewer(torch.from_numpy(pixels), rows_B)
    return Decoded(None, tuple(view.permute(0, 2, 3, 1).contiguous().numpy() for view in views))


def _in_threads(
    work: Callable[[S], T], items: Sequence[S], workers: int, ahead: int
) -> Generator[T]:
    """`work` of each item in order, at most `ahead` of them under way or waiting to be taken."""
    Image.init()  # not left to the threads, which would race for it
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


# ------------------------------------------------------------------------------------ batches


class StreamedData:
    """Images that a reader brings as they are needed; batches are put together in a thread."""

    def __init__(self, streamed: StreamedSet, device: torch.device, reader: Reader) -> None:
        self.streamed = streamed
        self._device = device
        self._reader = reader
        self._edges = torch.tensor([*(piece.first for piece in streamed.slices), len(streamed)])
        cuts = blake2b(self._edges.numpy().tobytes(), digest_size=8).hexdigest()
        self.order_name = f"streamed in slices {cuts}, window {streamed.window}"

    def __len__(self) -> int:
        return len(self.streamed)

    def steps(self, batch_size: int) -> int:
        return steps_of(len(self), batch_size)

    def order(self, key: int, batch_size: int) -> Tensor:
        """An epoch's order of rows, int64 (N,); the same for any number of workers."""
        return streamed_order(self._edges, batch_size, key, self.streamed.window)

    def epoch(
        self, batch_size: int, key: int, start: int = 0, viewer: Viewer | None = None
    ) -> Iterator[Batch]:
        """This worker's share of each batch of one epoch, from step `start` on.

        With a viewer, which has to be picklable, batches hold the views it makes and no images.
        Raises UserError naming a file that can no longer be read.
        """
        order = self.order(key, batch_size)
        shares, sizes = [], []
        for first, last in pairwise(batch_edges(len(self), batch_size).tolist()[start:]):
            begin, end = distributed.own_share(last - first)
            shares.append(order[first + begin : first + end])
            sizes.append(last - first)
        with closing(_ahead(self._batches(shares, viewer), _AHEAD)) as batches:
            for batch, size in zip(batches, sizes, strict=True):
                yield replace(batch, size=size)

    def slices(self, first: int, last: int, batch_size: int) -> Iterator[Tensor]:
        """Images of rows first..last in order, uint8 on the device, for a clean pass."""
        shares = [
            torch.arange(begin, min(begin + batch_size, last))
            for begin in range(first, last, batch_size)
        ]
        with closing(_ahead(self._batches(shares, None), _AHEAD)) as batches:
            for batch in batches:
                yield batch.images_BCHW

    def _batches(self, shares: list[Tensor], viewer: Viewer | None) -> Generator[Batch]:
        """Batches of the given rows, no row standing in two of them.

        A row has a place in a pool from when its slice comes until it is used, and the pool is as
        large as that needs at most.
        """
        visits = _visits(self._edges, shares)
        if not visits.slices:
            return
        pieces = [self.streamed.slices[number] for number in visits.slices]
        slots = torch.empty(sum(map(len, shares)), dtype=torch.int64)
        free = torch.arange(visits.most_held)
        pools: list[np.ndarray] = []
        came = used = 0
        with closing(self._reader(pieces, viewer)) as slices:
            for share, wanted in zip(shares, visits.until, strict=True):
                for number in range(came, wanted):
                    parts = next(slices).arrays()
                    if not pools:
                        kinds = [(len(free), *part.shape[1:]) for part in parts]
                        pools = [
                            np.empty(kind, part.dtype)
                            for kind, part in zip(kinds, parts, strict=True)
                        ]
                    rows, places = visits.rows[number], visits.places[number]
                    taken, free = free[: len(rows)], free[len(rows) :]
                    slots[places] = taken
                    for pool, part in zip(pools, parts, strict=True):
                        pool[taken] = part[rows]
                came = wanted
                leaving = slots[used : used + len(share)]
                used += len(share)
                free = torch.cat([free, leaving])
                yield self._batch(share, [self._take(pool, leaving) for pool in pools], viewer)

    def _take(self, pool: np.ndarray, slots: Tensor) -> Tensor:
        """Rows of a pool, on the device; a GPU is not waited for."""
        held = torch.from_numpy(pool)
        shape = (len(slots), *held.shape[1:])
        out = torch.empty(shape, dtype=held.dtype, pin_memory=self._device.type == "cuda")
        torch.index_select(held, 0, slots, out=out)
        return out.to(self._device, non_blocking=True)

    def _batch(self, rows_B: Tensor, parts: list[Tensor], viewer: Viewer | None) -> Batch:
        if self._device.type == "cuda":
            rows_B = rows_B.pin_memory().to(self._device, non_blocking=True)
        if viewer is None:
            return Batch(parts[0], rows_B, len(rows_B))
        none = torch.empty(0, self.streamed.channels, 1, 1, dtype=torch.uint8)
        views = tuple(part.permute(0, 3, 1, 2) for part in parts)
        return Batch(none, rows_B, len(rows_B), views)


class _Visits(NamedTuple):
    """Which slices batches need, and when."""

    slices: list[int]  # by number, in the order in which they are first needed
    rows: tuple[Tensor, ...]  # for each of them, which of its rows are needed
    places: tuple[Tensor, ...]  # and where these stand among the rows of all batches
    until: list[int]  # how many slices must be there for each batch
    most_held: int  # rows at a time


def _visits(edges: Tensor, shares: list[Tensor]) -> _Visits:
    """edges: the first row of each slice, and N. shares: the rows of each batch."""
    rows = torch.cat(shares) if shares else torch.empty(0, dtype=torch.int64)
    numbers = torch.searchsorted(edges, rows, right=True) - 1
    places = numbers.argsort(stable=True)  # grouped by slice, and in each by time
    slices, counts = numbers[places].unique_consecutive(return_counts=True)
    needed = places[counts.cumsum(0) - counts]  # the first place of each
    needed, by_need = needed.sort()
    groups = places.split(counts.tolist())
    groups = tuple(groups[slice_] for slice_ in by_need.tolist())
    slices, counts = slices[by_need], counts[by_need]
    ends = torch.tensor([len(share) for share in shares], dtype=torch.int64).cumsum(0)
    until = torch.searchsorted(needed, ends)
    arrived = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[until]
    held = arrived - torch.cat([ends.new_zeros(1), ends])[:-1]
    return _Visits(
        slices.tolist(),
        tuple(rows[group] - edges[slice_] for group, slice_ in zip(groups, slices, strict=True)),
        groups,
        until.tolist(),
        int(held.max()) if len(held) else 0,
    )


class _Failed(NamedTuple):
    error: BaseException


def _ahead(items: Generator[T], depth: int) -> Generator[T]:
    """The same items, made in a thread, `depth` of them at most before they are asked for.

    The thread ends, and closes `items`, when this generator does.
    """
    queue: SimpleQueue[T | _Failed | None] = SimpleQueue()  # None: no more
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def make() -> None:
        try:
            with closing(items):
                while room.acquire() and not stopped.is_set():
                    item = next(items, None)
                    queue.put(item)
                    if item is None:
                        return
        except BaseException as error:
            queue.put(_Failed(error))

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()
