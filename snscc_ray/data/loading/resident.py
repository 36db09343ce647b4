"""Hold the whole dataset as uint8 on the device, and shuffle and index it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from snscc_ray.core import distributed
from snscc_ray.core.transfer import send
from snscc_ray.data.loading.order import batch_edges, shuffled, steps_of

# Maps a batch's inputs and their row numbers (best on the CPU) to float views.
Viewer = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    inputs: Tensor  # uint8 images (B, C, H, W), or cached features (B, 1 + V, D)
    rows_B: Tensor
    size: int  # of the global batch
    views: tuple[Tensor, ...] | None = None  # if they were made with the batch
    host_rows_B: Tensor | None = None  # the rows on the CPU, if rows_B is elsewhere

    @property
    def drawing_rows_B(self) -> Tensor:
        """The rows for drawing views, on the CPU to avoid waiting for a GPU (see `views`)."""
        return self.rows_B if self.host_rows_B is None else self.host_rows_B


class Images(Protocol):
    """A dataset as the stages see it: images in memory, streamed images, or cached features."""

    order_name: str  # name of the row order of epochs: another order trains another network

    def __len__(self) -> int: ...

    def steps(self, batch_size: int) -> int:
        """Return the number of steps of an epoch in which every row occurs once."""
        ...

    def epoch(
        self, batch_size: int, key: int, start: int = 0, viewer: Viewer | None = None
    ) -> Iterator[Batch]:
        """Yield this worker's share of each batch of one epoch, from step `start` on.

        batch_size: global; each worker takes its contiguous share of every global batch.
        viewer: if given, each batch contains its views. A streamed dataset makes them where it
        decodes, and its batches then contain no images.
        """
        ...

    def slices(self, first: int, last: int, batch_size: int) -> Iterator[Tensor]:
        """Yield the inputs of rows first..last in order, on the device, for a clean pass."""
        ...


class ResidentData:
    """Images, uint8 (N, C, H, W), held on the device. Batches are index operations there."""

    order_name = "shuffled"

    def __init__(
        self,
        images_NCHW: Tensor,
        device: torch.device,
        order: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        """`order(key, batch_size)` gives the row order of an epoch; None: shuffle all rows."""
        self.images_NCHW = images_NCHW.to(device)
        self._order = order or (lambda key, batch_size: shuffled(len(self), key))

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def steps(self, batch_size: int) -> int:
        return steps_of(len(self), batch_size)

    def epoch(
        self, batch_size: int, key: int, start: int = 0, viewer: Viewer | None = None
    ) -> Iterator[Batch]:
        host_order = self._order(key, batch_size)
        order = send(host_order, self.images_NCHW.device)
        edges = batch_edges(len(self), batch_size).tolist()
        for first, last in zip(edges[start:-1], edges[start + 1 :], strict=True):
            begin, end = distributed.own_share(last - first)
            own = slice(first + begin, first + end)
            rows_B, host_rows_B = order[own], host_order[own]
            images_BCHW = self.images_NCHW.index_select(0, rows_B)
            views = viewer(images_BCHW, host_rows_B) if viewer else None
            yield Batch(images_BCHW, rows_B, last - first, views, host_rows_B)

    def slices(self, first: int, last: int, batch_size: int) -> Iterator[Tensor]:
        for start in range(first, last, batch_size):
            yield self.images_NCHW[start : min(start + batch_size, last)]

    def take(self, rows_B: Tensor) -> Tensor:
        """Return the images of any rows. `rows_B` may be on the CPU."""
        return self.images_NCHW.index_select(0, send(rows_B, self.images_NCHW.device))
