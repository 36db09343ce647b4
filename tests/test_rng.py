from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from snscc_ray.core import rng


def test_a_row_keeps_its_numbers_in_any_batch() -> None:
    rows = torch.tensor([5, 900, 17, 5])
    whole = rng.uniform(torch.arange(1000), 42, 7)
    assert torch.equal(rng.uniform(rows, 42, 7), whole[rows])
    assert not torch.equal(rng.uniform(rows, 43, 7), whole[rows])


def test_numbers_are_uniform_and_uncorrelated() -> None:
    drawn = rng.uniform(torch.arange(20_000), rng.fold(0, "train", 3), 6).numpy()
    assert drawn.min() >= 0 and drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(np.hstack([drawn[:-1], drawn[1:]]).T)
    assert np.abs(correlation - np.eye(12)).max() < 0.04


def test_fold_depends_on_every_part_and_their_order() -> None:
    keys = {
        rng.fold(*parts)
        for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, "train"), ("train", 0), (0, "boost")]
    }
    assert len(keys) == 8
    assert all(0 <= key < 2**63 for key in keys)
    # Written down: a change of the mixing would silently change every run.
    assert rng.fold(0, "train", 1) == 3815252484481415816
    drawn = rng.uniform(torch.tensor([9, 3]), rng.fold(0, "train", 1), 2)
    assert float(drawn[1, 0]) == 0.07348096370697021
