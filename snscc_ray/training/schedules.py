"""Optimisers, and learning rates as pure functions of position: resuming needs no state."""

from __future__ import annotations

import math

import torch
from torch import nn

from snscc_ray.config.settings import StageSettings


def learning_rate(settings: StageSettings, position: float) -> float:
    """Learning rate at `position`, in epochs since the start of the stage; may be fractional."""
    warmup = min(settings.warmup_epochs, settings.epochs)
    if position < warmup:
        return settings.learning_rate * position / warmup
    if settings.schedule == "cosine":
        done = (position - warmup) / max(settings.epochs - warmup, 1e-12)
        return settings.learning_rate * (1 + math.cos(math.pi * min(done, 1))) / 2
    if settings.schedule == "step":
        passed = sum(position >= milestone for milestone in settings.milestones)
        return settings.learning_rate * settings.decay**passed
    return settings.learning_rate


def build_optimizer(settings: StageSettings, network: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser, fused: one kernel for all weights, on GPUs and CPUs."""
    weights = list(network.parameters())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            weights,
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    build = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return build(weights, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
