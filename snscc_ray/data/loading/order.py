"""Which rows stand in which batch of an epoch: every row once, whatever the number of workers.

All of it depends on the key, the number of rows and the batch size alone, never on how many
workers there are or on where an epoch was resumed: any worker can say which rows any other holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snscc_ray.core import rng

# Places of a streamed set that are read side by side, and so mixed in every batch. Workers whose
# number divides it read whole lanes, and hence only their own part of the set.
LANES = 32


def steps_of(rows: int, batch_size: int) -> int:
    """Steps of an epoch in which every row stands once."""
    return -(-rows // batch_size)


def batch_edges(rows: int, batch_size: int) -> Tensor:
    """Where each global batch begins, and the last ends, int64 (steps + 1,).

    No batch is larger than `batch_size` and their sizes differ by one at most: a last batch of
    the few rows that are left over would have a loss, and batch statistics, of another kind.
    """
    steps = steps_of(rows, batch_size)
    return torch.arange(steps + 1) * rows // steps


def smallest_batch(rows: int, batch_size: int) -> int:
    return rows // steps_of(rows, batch_size)


def shuffled(rows: int, key: int) -> Tensor:
    """All rows in an order that depends on the key, int64 (N,)."""
    return torch.randperm(rows, generator=rng.generator(key))


def streamed_order(edges: Tensor, batch_size: int, key: int, window: int) -> Tensor:
    """All rows in an order that reads a set slice by slice, int64 (N,).

    edges: the first row of each slice, in order, and N: int64 (slices + 1,). window: how many
    rows are shuffled among each other.

    The slices are permuted and put in a row, which is cut into LANES equal runs. Every batch takes
    an equal share of each lane, and each lane shuffles its rows within a moving window.
    """
    rows = int(edges[-1])
    source = rng.generator(key)
    lengths = edges.diff()
    which = torch.randperm(len(lengths), generator=source)
    lengths = lengths[which]
    begins = lengths.cumsum(0) - lengths
    places = torch.arange(rows)
    sequence = places + (edges[:-1][which] - begins).repeat_interleave(lengths)

    lane_edges = torch.arange(LANES + 1) * rows // LANES
    lane_rows = lane_edges.diff()
    lane = torch.arange(LANES).repeat_interleave(lane_rows)
    number = places - lane_edges[lane]
    # The windows of the lanes end one after the other, so that reading goes on evenly.
    width = max(1, window // LANES)
    part = (number + lane * width // LANES) // width
    draws = torch.randint(1 << 31, (rows,), generator=source)
    shuffle = ((lane * (rows // width + 2) + part << 31) | draws).argsort(stable=True)

    # Row j of a lane of n rows comes at time (j + 1/2) / n.
    dealt = ((number + 0.5).double() / lane_rows[lane]).argsort(stable=True)
    batch_rows = batch_edges(rows, batch_size).diff()
    batch = torch.arange(len(batch_rows)).repeat_interleave(batch_rows)
    # Within a batch by place: a worker's share, which is contiguous, lies in as few slices as can
    # be.
    chosen = shuffle[dealt]
    return sequence[chosen[(batch * rows + chosen).argsort(stable=True)]]
