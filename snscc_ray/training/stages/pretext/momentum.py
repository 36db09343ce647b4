"""Update of the momentum copy of a network that MoCo and BYOL use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(copy: nn.Module, leaders: Iterable[Tensor], momentum: float) -> None:
    """Set copy ← momentum · copy + (1 - momentum) · leader for each weight, in their order.

    Batch statistics are not averaged: the copy keeps its own, of the views it saw.
    """
    own: list[Tensor] = list(copy.parameters())
    torch._foreach_lerp_(own, list(leaders), 1 - momentum)
