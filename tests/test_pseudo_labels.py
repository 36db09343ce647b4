"""Eq. 11 against its loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snscc_ray.core.clustering.pseudo_labels import select_pseudo_labels
from tests import reference


def two_classes(*confidences: float) -> torch.Tensor:
    """Rows of class 0 where positive, of class 1 where negative."""
    return torch.tensor([[c, 1 - c] if c > 0 else [1 + c, -c] for c in confidences])


def test_by_hand() -> None:
    p = two_classes(0.99, 0.999, 0.6, -0.995, 0.992, -0.7)
    assert select_pseudo_labels(p, 0.985, 0.5).tolist() == [-1, 0, -1, 1, 0, -1]
    assert select_pseudo_labels(p, 0.985, 0.01).tolist() == [-1, 0, -1, 1, -1, -1]
    assert select_pseudo_labels(p, 0.985, 1.0).tolist() == [0, 0, -1, 1, 0, -1]
    assert select_pseudo_labels(p, 0.985, 0.0).tolist() == [-1] * 6
    assert select_pseudo_labels(p, 0.0, 1.0).tolist() == [0, 0, 0, 1, 0, 1]
    assert select_pseudo_labels(p, 1.0, 1.0).tolist() == [-1] * 6


def test_the_threshold_itself_passes() -> None:
    assert select_pseudo_labels(two_classes(0.75, 0.7499), 0.75, 1.0).tolist() == [0, -1]


def test_ties_go_by_row() -> None:
    p = torch.ones(100, 1)
    kept = select_pseudo_labels(p, 0.99, 0.29) >= 0
    assert kept.nonzero().flatten().tolist() == list(range(29))
    mixed = two_classes(0.9, -0.9, 0.9, -0.9, 0.95, -0.9)
    assert select_pseudo_labels(mixed, 0.5, 0.5).tolist() == [0, 1, -1, 1, 0, -1]


@pytest.mark.parametrize("share", range(1, 100))
def test_the_share_is_not_rounded_by_floating_point(share: int) -> None:
    """0.07 * 100 is a hair above 7 and 0.29 * 100 a hair below 29."""
    kept = select_pseudo_labels(torch.ones(100, 1), 0.5, share / 100)
    assert (kept == 0).sum() == share


def test_none_and_broken_rows() -> None:
    assert select_pseudo_labels(torch.empty(0, 3), 0.9, 0.5).shape == (0,)
    y = select_pseudo_labels(torch.tensor([[torch.nan, 0.5], [0.05, 0.95]]), 0.9, 1.0)
    assert y.dtype == torch.int64 and y.tolist() == [-1, 1]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 5), st.integers(0, 999),
    st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]),
)  # fmt: skip
def test_as_the_loop(N: int, C: int, seed: int, threshold: float, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Eighths: many rows tie, and none lies within rounding of the threshold.
    p = torch.randint(9, (N, C), generator=generator) / 8
    y = select_pseudo_labels(p, threshold, share)
    assert y.tolist() == reference.eq11(p, threshold, share)


def test_more_is_kept_with_a_larger_share() -> None:
    p = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1)
    kept = [select_pseudo_labels(p, 0.6, share) >= 0 for share in (0.1, 0.4, 0.7, 1.0)]
    for fewer, more in pairwise(kept):
        assert not (fewer & ~more).any() and fewer.sum() < more.sum()
