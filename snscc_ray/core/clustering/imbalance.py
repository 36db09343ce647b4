"""Clusters of unequal size: how unequal they may be, and whether their balance is forced."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this balance one group holds almost all rows: the features are too weak to judge sizes.
_CREDIBLE_BALANCE = 0.6
# On digits the difference is under .01 for equal sizes, and .058 or more for sizes of 1:10. For
# classes that each fall into two it was .051 at equal sizes: one warning too many is better.
_FORCED = 0.045


def expected_shares(clusters: int, ratio: float) -> Tensor:
    """Shares of clusters with sizes falling geometrically from `ratio` to 1, float64 (C,)."""
    place_C = torch.linspace(1, 0, clusters, dtype=torch.float64)
    return torch.softmax(place_C * torch.tensor(ratio, dtype=torch.float64).log(), dim=0)


def enough_entropy(clusters: int, ratio: float) -> float:
    """Entropy, in nats, of clusters at the allowed imbalance `ratio`; log C for ratio 1."""
    return float(torch.special.entr(expected_shares(clusters, ratio)).sum())


def forced_balance(balance: float, free_balance: float) -> float:
    """How much more balanced the clusters are than groups of the pretext features of free size.

    0 if the features are too weak to tell.
    """
    return max(0.0, balance - free_balance) if free_balance >= _CREDIBLE_BALANCE else 0.0


def forced_warning(forced: float) -> str | None:
    """Return the warning for a value of `forced_balance`, or None if it needs none."""
    if forced < _FORCED:
        return None
    return (
        f"forced-balance: the cluster sizes are more even than the images suggest (by {forced:.2f} "
        "of 1), so large groups may be split and small ones merged; if some kinds are much more "
        "frequent than others, use --max-cluster-imbalance 10 (`snscc fit`) or "
        "train.max_imbalance=10"
    )
