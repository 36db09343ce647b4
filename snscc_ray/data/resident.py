"""The whole set as uint8 on the device, shuffled and indexed there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snscc_ray import rng


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    images_BCHW: Tensor
    rows_B: Tensor


class ResidentData:
    """Images (N, C, H, W) uint8, held once; batches are index operations on their device."""

    def __init__(self, images_NCHW: Tensor, device: torch.device) -> None:
        self.images_NCHW = images_NCHW.to(device)

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def steps(self, batch_size: int) -> int:
        """Steps of an epoch: whole batches only, so that every step has one shape."""
        return len(self) // batch_size

    def epoch(
        self, batch_size: int, key: int, rank: int, world_size: int, start: int = 0
    ) -> Iterator[Batch]:
        """Shuffled batches of one epoch, from step `start` on; the order depends on `key` alone.

        batch_size: global. Each worker takes its contiguous share of every global batch.
        """
        order = torch.randperm(len(self), generator=rng.generator(key))
        order = order.to(self.images_NCHW.device)
        share = batch_size // world_size
        for step in range(start, self.steps(batch_size)):
            first = step * batch_size + rank * share
            rows_B = order[first : first + share]
            yield Batch(self.take(rows_B), rows_B)

    def slices(self, first: int, last: int, batch_size: int) -> Iterator[Tensor]:
        """Images of rows first..last in order, for a clean pass."""
        for start in range(first, last, batch_size):
            yield self.images_NCHW[start : min(start + batch_size, last)]

    def take(self, rows_B: Tensor) -> Tensor:
        return self.images_NCHW.index_select(0, rows_B)
