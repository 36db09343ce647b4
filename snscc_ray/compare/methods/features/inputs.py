"""Checks and scaling of cached features, common to the methods of this folder."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.core.losses.instance import unit_rows

Progress = Callable[[int, int], None]  # steps done, steps in all

# Rows converted or predicted at a time.
CHUNK = 8192


def silent(done: int, steps: int) -> None:
    """A `Progress` that shows nothing."""


def check(features_ND: Tensor, clusters: int) -> None:
    """Check that the features can be divided into so many clusters.

    Raises UserError for features of another shape than (N, D), fewer than 2 clusters, fewer rows
    than clusters, or a NaN or infinity.
    """
    if features_ND.ndim != 2 or not features_ND.shape[1]:
        raise UserError(f"features must be a table (rows, width), got {tuple(features_ND.shape)}")
    if clusters < 2:
        raise UserError(f"{clusters} clusters asked for: use at least 2")
    if len(features_ND) < clusters:
        raise UserError(f"{len(features_ND)} images cannot form {clusters} clusters: use fewer")
    if not all(bool(part_BD.isfinite().all()) for part_BD in features_ND.split(CHUNK)):
        raise UserError("the features hold a NaN or an infinity: compute them again")


def scaled(rows_BD: Tensor) -> Tensor:
    """Return the rows at length √D, float32, so that one learning rate suits every encoder.

    √D is about the length of layer-normalised features. A row of zeros stays one.
    """
    return unit_rows(rows_BD.float()) * math.sqrt(rows_BD.shape[1])


def uniform_weights(drawing: torch.Generator, *shape: int, bound: float) -> Tensor:
    """Return float32 weights drawn uniformly from ±bound, on the CPU."""
    return (2 * torch.rand(*shape, generator=drawing) - 1) * bound
