"""Clusters of unequal size: how unequal they may be, and how to tell that they are forced."""

from __future__ import annotations

import torch
from torch import Tensor

# Below it one group holds almost all: features too weak to say anything about sizes.
_CREDIBLE_BALANCE = 0.6
# On digits the difference is under .01 where sizes are equal, and .058 or more where they are 1:10.
# Of kinds that each fall into two it was .051 though the sizes were equal: better one too many.
_FORCED = 0.045


def expected_shares(clusters: int, ratio: float) -> Tensor:
    """Shares of clusters whose sizes fall evenly from `ratio` to 1, float64 (C,), largest first."""
    place_C = torch.linspace(1, 0, clusters, dtype=torch.float64)
    return torch.softmax(place_C * torch.tensor(ratio, dtype=torch.float64).log(), dim=0)


def enough_entropy(clusters: int, ratio: float) -> float:
    """Entropy, in nats, of clusters as uneven as they may be; log C for ratio 1."""
    return float(torch.special.entr(expected_shares(clusters, ratio)).sum())


def forced_balance(balance: float, free_balance: float) -> float:
    """How much more even the clusters are than groups of the pretext features free to be uneven.

    0 where the features are too weak to tell.
    """
    return max(0.0, balance - free_balance) if free_balance >= _CREDIBLE_BALANCE else 0.0


def forced_warning(forced: float) -> str | None:
    """What to say of it, if anything."""
    if forced < _FORCED:
        return None
    return (
        f"forced-balance: the clusters are more even than the images look (by {forced:.2f} of 1), "
        "so large groups may have been cut up and small ones joined; if some kinds are much more "
        "frequent than others, say how much: --max-cluster-imbalance 10 of `snscc fit`, or "
        "train.max_imbalance=10"
    )
