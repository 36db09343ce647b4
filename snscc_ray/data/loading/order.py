"""Choose the rows of each batch of an epoch. Every row occurs once.

The order depends only on the key, the number of rows and the batch size, not on the number of
workers or on where an epoch was resumed. Any worker can compute which rows another one holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snscc_ray.core import rng

# Parts of a streamed dataset that are read in parallel, so that every batch mixes them. If the
# number of workers divides it, each worker reads whole lanes, so only its part of the dataset.
LANES = 32


def steps_of(rows: int, batch_size: int) -> int:
    """Return the number of steps of an epoch in which every row occurs once."""
    return -(-rows // batch_size)


def batch_edges(rows: int, batch_size: int) -> Tensor:
    """Return the first row of each global batch, and the number of rows, int64 (steps + 1,).

    No batch is larger than `batch_size`, and sizes differ by one at most. A small last batch
    would have a different kind of loss and of batch statistics.
    """
    steps = steps_of(rows, batch_size)
    return torch.arange(steps + 1) * rows // steps


def smallest_batch(rows: int, batch_size: int) -> int:
    return rows // steps_of(rows, batch_size)


def shuffled(rows: int, key: int) -> Tensor:
    """Return all rows in a random order given by the key, int64 (N,)."""
    return torch.randperm(rows, generator=rng.generator(key))


def streamed_order(edges: Tensor, batch_size: int, key: int, window: int) -> Tensor:
    """Return all rows in a random order that reads a dataset slice by slice, int64 (N,).

    edges: the first row of each slice, in order, and N: int64 (slices + 1,). window: how many
    rows are shuffled together.

    The permuted slices are joined and cut into LANES equal lanes. Every batch takes an equal share
    of each lane, and each lane shuffles its rows within a moving window.
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
    # The windows of the lanes end at different times, so that reading is even.
    width = max(1, window // LANES)
    part = (number + lane * width // LANES) // width
    draws = torch.randint(1 << 31, (rows,), generator=source)
    shuffle = ((lane * (rows // width + 2) + part << 31) | draws).argsort(stable=True)

    # Row j of a lane of n rows comes at time (j + 1/2) / n.
    dealt = ((number + 0.5).double() / lane_rows[lane]).argsort(stable=True)
    batch_rows = batch_edges(rows, batch_size).diff()
    batch = torch.arange(len(batch_rows)).repeat_interleave(batch_rows)
    # Sort each batch by place: the contiguous share of a worker then lies in the fewest slices.
    chosen = shuffle[dealt]
    return sequence[chosen[(batch * rows + chosen).argsort(stable=True)]]
