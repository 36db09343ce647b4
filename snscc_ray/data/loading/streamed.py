"""Stream a dataset from its files: read it slice by slice in every epoch, in limited memory."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from snscc_ray.core import distributed
from snscc_ray.core.transfer import send
from snscc_ray.data.decode import available_cores
from snscc_ray.data.loading.order import batch_edges, steps_of, streamed_order
from snscc_ray.data.loading.resident import Batch, Viewer
from snscc_ray.data.loading.slices import VIEWS_BYTES, Slice, decode_slice
from snscc_ray.data.loading.survey import StreamedSet, in_threads

T = TypeVar("T")

# Batches that are prepared while the loop works on one.
_AHEAD = 2


class Decoded(NamedTuple):
    """A decoded slice. One of the two fields is None."""

    pixels: np.ndarray | None  # uint8 (rows, C, S, S)
    views: tuple[np.ndarray, ...] | None  # float32 (rows, S, S, C) each

    def arrays(self) -> Sequence[np.ndarray]:
        if self.views is not None:
            return self.views
        assert self.pixels is not None
        return [self.pixels]


class Reader(Protocol):
    def __call__(self, slices: Sequence[Slice], viewer: Viewer | None) -> Generator[Decoded]:
        """Yield the decoded slices in order, or their views if there is a viewer.

        Raises UserError if a slice can no longer be read.
        """
        ...


# ------------------------------------------------------------------------------------ reading


def threads_reader(streamed: StreamedSet, memory_mb: int, workers: int = 0) -> Reader:
    """Return a reader with `workers` threads (0: one per core), for runs without Ray."""
    workers = workers or available_cores()
    largest = max(len(piece) for piece in streamed.slices)
    bytes_each = largest * streamed.channels * streamed.size**2
    ahead = max(workers, (memory_mb << 18) // bytes_each)

    def read(slices: Sequence[Slice], viewer: Viewer | None) -> Generator[Decoded]:
        def decode(piece: Slice) -> Decoded:
            return decoded(piece, streamed.channels, streamed.size, viewer)

        return in_threads(decode, slices, workers, ahead // (VIEWS_BYTES if viewer else 1))

    return read


def decoded(piece: Slice, channels: int, size: int, viewer: Viewer | None) -> Decoded:
    """Decode one slice, and make its views. Raises UserError if it can no longer be read."""
    pixels = decode_slice(piece, channels, size)
    if viewer is None:
        return Decoded(pixels, None)
    rows_B = torch.arange(piece.first, piece.first + len(piece))
    views = viewer(torch.from_numpy(pixels), rows_B)
    return Decoded(None, tuple(view.permute(0, 2, 3, 1).contiguous().numpy() for view in views))


# ------------------------------------------------------------------------------------ batches


class StreamedData:
    """Images that a reader decodes as they are needed. A thread puts batches together."""

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
        """Return the row order of an epoch, int64 (N,), the same for any number of workers."""
        return streamed_order(self._edges, batch_size, key, self.streamed.window)

    def epoch(
        self, batch_size: int, key: int, start: int = 0, viewer: Viewer | None = None
    ) -> Iterator[Batch]:
        """Yield this worker's share of each batch of one epoch, from step `start` on.

        With a viewer, which must be picklable, batches contain its views and no images.
        Raises UserError naming a file that can no longer be read.
        """
        order = self.order(key, batch_size)
        shares, sizes = [], []
        for first, last in pairwise(batch_edges(len(self), batch_size).tolist()[start:]):
            begin, end = distributed.own_share(last - first)
            shares.append(order[first + begin : first + end])
            sizes.append(last - first)
        with closing(made_ahead(self._batches(shares, viewer), _AHEAD)) as batches:
            for batch, size in zip(batches, sizes, strict=True):
                yield replace(batch, size=size)

    def slices(self, first: int, last: int, batch_size: int) -> Iterator[Tensor]:
        """Yield images of rows first..last in order, uint8 on the device, for a clean pass."""
        shares = [
            torch.arange(begin, min(begin + batch_size, last))
            for begin in range(first, last, batch_size)
        ]
        with closing(made_ahead(self._batches(shares, None), _AHEAD)) as batches:
            for batch in batches:
                yield batch.inputs

    def _batches(self, shares: list[Tensor], viewer: Viewer | None) -> Generator[Batch]:
        """Yield batches of the given rows. No row occurs in two of them.

        A row has a slot in a pool from the arrival of its slice until its use. The pool has as many
        slots as are needed at once.
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
        """Copy rows of a pool to the device, without waiting for a GPU."""
        held = torch.from_numpy(pool)
        shape = (len(slots), *held.shape[1:])
        out = torch.empty(shape, dtype=held.dtype, pin_memory=self._device.type == "cuda")
        torch.index_select(held, 0, slots, out=out)
        return out.to(self._device, non_blocking=True)

    def _batch(self, rows_B: Tensor, parts: list[Tensor], viewer: Viewer | None) -> Batch:
        host_rows_B, rows_B = rows_B, send(rows_B, self._device)
        if viewer is None:
            return Batch(parts[0], rows_B, len(rows_B), host_rows_B=host_rows_B)
        none = torch.empty(0, self.streamed.channels, 1, 1, dtype=torch.uint8)
        views = tuple(part.permute(0, 3, 1, 2) for part in parts)
        return Batch(none, rows_B, len(rows_B), views)


class _Visits(NamedTuple):
    """Which slices the batches need, and when."""

    slices: list[int]  # numbers, in the order in which the slices are first needed
    rows: tuple[Tensor, ...]  # for each slice, the rows that are needed
    places: tuple[Tensor, ...]  # for each slice, the positions of these rows in all batches
    until: list[int]  # for each batch, how many slices must have arrived
    most_held: int  # most rows held at once


def _visits(edges: Tensor, shares: list[Tensor]) -> _Visits:
    """Plan the slices. edges: the first row of each slice, and N. shares: rows of each batch."""
    rows = torch.cat(shares) if shares else torch.empty(0, dtype=torch.int64)
    numbers = torch.searchsorted(edges, rows, right=True) - 1
    places = numbers.argsort(stable=True)  # grouped by slice, then ordered by time
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


def made_ahead(items: Generator[T], depth: int) -> Generator[T]:
    """Yield the same items, made in a thread at most `depth` items ahead.

    When this generator closes, the thread closes `items` and ends.
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
