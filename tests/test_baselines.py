"""Other methods' losses, each against its loop in reference_baselines.py, and how they choose."""

from __future__ import annotations

import pytest
import torch

from snscc_ray.baselines import scan
from tests import reference_baselines as reference
from tests.test_losses import CASES, probabilities, rows, same

SIZES = [(1, 2), (5, 3), (9, 4)]  # B, C


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_scan_consistency(size: tuple[int, int], case: str) -> None:
    B, C = size
    p, q = probabilities(case, B, C, 1), probabilities(case, B, C, 2)
    same(scan.consistency, reference.scan_consistency, p, q)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])  # all rows, some, none
def test_scan_self_labelling(size: tuple[int, int], case: str, threshold: float) -> None:
    B, C = size
    p, logits = probabilities(case, B, C, 1), rows(B, C, seed=2)
    same(
        lambda x: scan.self_labelling(p, x, threshold),
        lambda x: reference.scan_self_labelling(p, x, threshold),
        logits,
    )
    if threshold == 1.0:
        assert scan.self_labelling(p, logits, threshold) == 0


def test_scan_labels_get_no_gradient() -> None:
    p = probabilities("nearly_one_hot", 5, 3, 1).requires_grad_()
    scan.self_labelling(p, rows(5, 3, seed=2).requires_grad_(), 0.5).backward()
    assert p.grad is None


@pytest.mark.parametrize("best", [0, 1, 2])
def test_scan_keeps_the_head_that_agrees_and_is_balanced(best: int) -> None:
    """One head agrees with its neighbours and is balanced; others are collapsed, or at odds."""
    neighbors = torch.tensor([[1], [0], [3], [2]])
    good = torch.tensor([0, 0, 1, 1])
    heads = [torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 0, 1])]
    heads.insert(best, good)
    p_NHC = torch.stack([torch.eye(2)[head] * 0.98 + 0.01 for head in heads], dim=1)
    assert scan._best_head(p_NHC, neighbors) == best
