"""The three Train objectives, each one small function over the same loss pieces.

soft      what works: attract-only neighbours, entropy of the mean prediction, mined neighbours.
paper     Eqs. 3, 6, 7, 8 and 9 to the letter. Holds agreement near s, so that no row becomes
          confident; summed over K it outweighs the entropy and tends to collapse.
released  the sum the authors' released code computes: mined neighbours by -log O, one-way column
          contrast, and a batch-wide pair term whose sign is inverted against the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from snscc_ray.config import TrainSettings
from snscc_ray.losses import (
    agreement,
    batch_pair_term,
    cluster_contrast,
    marginal_entropy,
    one_way_column_contrast,
    row_entropy,
    soft_attract,
    soft_bce,
    soft_confidence,
)
from snscc_ray.neighbors import batch_neighbors, global_radius, local_radius, pairwise_distances


@dataclass(frozen=True)
class Neighborhood:
    """Neighbours of a global batch, found once for all heads; no gradients."""

    local_confidence_BK: Tensor
    local_BK: Tensor
    global_confidence_BK: Tensor
    global_BK: Tensor
    pair_confidence_BB: Tensor | None


def neighborhood(z_BD: Tensor, augmented_BD: Tensor, settings: TrainSettings) -> Neighborhood:
    """Local neighbours among the originals, global ones among the augmented (own view included)."""
    z_BD, augmented_BD = z_BD.detach(), augmented_BD.detach()
    near_BK, local_BK = batch_neighbors(z_BD, z_BD, settings.num_neighbors, same_rows=True)
    far_BK, global_BK = batch_neighbors(z_BD, augmented_BD, settings.num_neighbors, same_rows=False)
    radius_B = global_radius(z_BD, augmented_BD)
    pairs_BB = None
    if settings.objective == "released":
        pairs_BB = soft_confidence(pairwise_distances(z_BD, augmented_BD), radius_B)
    return Neighborhood(
        soft_confidence(near_BK, local_radius(near_BK)),
        local_BK,
        soft_confidence(far_BK, radius_B),
        global_BK,
        pairs_BB,
    )


@dataclass(frozen=True)
class Predictions:
    """One head's probabilities: original views, augmented views, one mined neighbour per row."""

    p_BC: Tensor
    augmented_BC: Tensor
    mined_BC: Tensor | None


Objective = Callable[[Predictions, Neighborhood, TrainSettings], dict[str, Tensor]]


def soft(p: Predictions, near: Neighborhood, settings: TrainSettings) -> dict[str, Tensor]:
    local = agreement(p.p_BC, p.p_BC, near.local_BK)
    wide = agreement(p.p_BC, p.augmented_BC, near.global_BK)
    kind = settings.agreement
    terms = {
        "local": settings.local_weight * soft_attract(local, near.local_confidence_BK, kind),
        "global": settings.global_weight * soft_attract(wide, near.global_confidence_BK, kind),
        "cluster": settings.cluster_weight
        * cluster_contrast(p.p_BC, p.augmented_BC, settings.temperature),
        "entropy": -settings.entropy_weight * marginal_entropy(p.p_BC),
    }
    if p.mined_BC is not None:
        terms["mined"] = settings.mined_weight * _mined(p, kind)
    return terms


def paper(p: Predictions, near: Neighborhood, settings: TrainSettings) -> dict[str, Tensor]:
    local = agreement(p.p_BC, p.p_BC, near.local_BK)
    wide = agreement(p.p_BC, p.augmented_BC, near.global_BK)
    return {
        "local": settings.local_weight * soft_bce(local, near.local_confidence_BK),
        "global": settings.global_weight * soft_bce(wide, near.global_confidence_BK),
        "cluster": settings.cluster_weight
        * cluster_contrast(p.p_BC, p.augmented_BC, settings.temperature),
        "entropy": -settings.entropy_weight * row_entropy(p.p_BC),
    }


def released(p: Predictions, near: Neighborhood, settings: TrainSettings) -> dict[str, Tensor]:
    assert near.pair_confidence_BB is not None
    terms = {
        "global": settings.global_weight
        * batch_pair_term(p.p_BC @ p.augmented_BC.T, near.pair_confidence_BB),
        "cluster": settings.cluster_weight * one_way_column_contrast(p.p_BC, p.augmented_BC),
        "entropy": -settings.entropy_weight * marginal_entropy(p.p_BC),
    }
    if p.mined_BC is not None:
        terms["mined"] = settings.mined_weight * _mined(p, "log")
    return terms


def _mined(p: Predictions, kind: Literal["linear", "log"]) -> Tensor:
    """Agreement with one mined neighbour, drawn by confidence: an unbiased `soft_attract`."""
    assert p.mined_BC is not None
    o_B1 = (p.p_BC * p.mined_BC).sum(1, keepdim=True)
    return soft_attract(o_B1, torch.ones_like(o_B1), kind)


OBJECTIVES: dict[str, Objective] = {"soft": soft, "paper": paper, "released": released}
