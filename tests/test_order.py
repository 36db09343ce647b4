from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snscc_ray.core import distributed
from snscc_ray.data.loading.order import batch_edges, smallest_batch, steps_of
from snscc_ray.data.loading.resident import ResidentData


@given(rows=st.integers(2, 5000), batch_size=st.integers(2, 700))
def test_batches_hold_every_row_once_and_differ_by_one(rows: int, batch_size: int) -> None:
    edges = batch_edges(rows, batch_size)
    sizes = edges.diff()
    assert edges[0] == 0 and edges[-1] == rows and len(sizes) == steps_of(rows, batch_size)
    assert sizes.max() <= batch_size and sizes.max() - sizes.min() <= 1
    assert sizes.min() == smallest_batch(rows, batch_size)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_share_each_epoch_whatever_their_number(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ResidentData(torch.arange(97, dtype=torch.uint8).view(97, 1, 1, 1), torch.device("cpu"))
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(data.epoch(30, key=5)))
        assert [b.rows_B.tolist() for b in data.epoch(30, 5, start=2)] == [
            b.rows_B.tolist() for b in shares[-1][2:]
        ]
    steps = [torch.cat([b.rows_B for b in batches]) for batches in zip(*shares, strict=True)]
    assert [len(step) for step in steps] == [24, 24, 24, 25]
    assert (
        torch.cat(steps).tolist()
        == torch.randperm(97, generator=torch.Generator().manual_seed(_seed(5))).tolist()
    )
    assert all((b.inputs.flatten() == b.rows_B).all() for share in shares for b in share)


def _seed(key: int) -> int:
    from snscc_ray.core import rng

    return rng.fold(key)
