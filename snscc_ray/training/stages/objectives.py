"""The three Train objectives, each a small function of the same loss terms.

soft      works in practice: attract-only neighbours, entropy of the mean prediction, mined
          neighbours.
paper     Eqs. 3, 6, 7, 8 and 9 to the letter. Holds agreement near s, so that no row becomes
          confident; summed over K it outweighs the entropy and tends to collapse.
released  the objective of the authors' released code: mined neighbours by -log O, one-way column
          contrast, and a batch-wide pair term with the opposite sign of the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from snscc_ray.config.settings import TrainSettings
from snscc_ray.core.clustering.imbalance import enough_entropy
from snscc_ray.core.clustering.neighbors import (
    batch_neighbors,
    global_radius,
    local_radius,
    pairwise_distances,
)
from snscc_ray.core.losses import (
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
from snscc_ray.core.losses.instance import matmul


@dataclass(frozen=True)
class Neighborhood:
    """Neighbours in a global batch, found once for all heads; no gradients."""

    local_confidence_BK: Tensor
    local_BK: Tensor
    global_confidence_BK: Tensor
    global_BK: Tensor
    pair_confidence_BB: Tensor | None


def neighborhood(z_BD: Tensor, augmented_BD: Tensor, settings: TrainSettings) -> Neighborhood:
    """Find local neighbours in the original views, global ones in the augmented (own included)."""
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
    """Probabilities of H heads: original views, augmented views, one mined neighbour per row."""

    p_HBC: Tensor
    augmented_HBC: Tensor
    mined_HBC: Tensor | None


Objective = Callable[[Predictions, Neighborhood, TrainSettings], dict[str, Tensor]]


def soft(p: Predictions, near: Neighborhood, settings: TrainSettings) -> dict[str, Tensor]:
    (local, local_confidence), (wide, wide_confidence) = _local_and_global(p, near)
    kind = settings.agreement
    terms = {
        "local": settings.local_weight * soft_attract(local, local_confidence, kind),
        "global": settings.global_weight * soft_attract(wide, wide_confidence, kind),
        "cluster": settings.cluster_weight * _cluster(p, settings),
        "entropy": -settings.entropy_weight * _mean(_spread(settings), p.p_HBC),
    }
    if p.mined_HBC is not None:
        terms["mined"] = settings.mined_weight * _mined(p, kind)
    return terms


def paper(p: Predictions, near: Neighborhood, settings: TrainSettings) -> dict[str, Tensor]:
    (local, local_confidence), (wide, wide_confidence) = _local_and_global(p, near)
    return {
        "local": settings.local_weight * soft_bce(local, local_confidence),
        "global": settings.global_weight * soft_bce(wide, wide_confidence),
        "cluster": settings.cluster_weight * _cluster(p, settings),
        "entropy": -settings.entropy_weight * _mean(row_entropy, p.p_HBC),
    }


def released(p: Predictions, near: Neighborhood, settings: TrainSettings) -> dict[str, Tensor]:
    pairs_BB = near.pair_confidence_BB
    assert pairs_BB is not None
    terms = {
        "global": settings.global_weight
        * _mean(
            lambda p_BC, q_BC: batch_pair_term(matmul(p_BC, q_BC.T), pairs_BB),
            p.p_HBC,
            p.augmented_HBC,
        ),
        "cluster": settings.cluster_weight
        * _mean(one_way_column_contrast, p.p_HBC, p.augmented_HBC),
        "entropy": -settings.entropy_weight * _mean(marginal_entropy, p.p_HBC),
    }
    if p.mined_HBC is not None:
        terms["mined"] = settings.mined_weight * _mined(p, "log")
    return terms


def _local_and_global(p: Predictions, near: Neighborhood) -> list[tuple[Tensor, Tensor]]:
    """Return (agreements, confidences) of the local and the global neighbours, each (H·B, K).

    The heads' rows are stacked, so that a mean over rows is the mean over heads. Both kinds come
    from one product per head: on small batches the calls cost more than the arithmetic.
    """
    H, B, _ = p.p_HBC.shape
    split = near.local_BK.shape[1]
    both_BK = torch.cat([near.local_BK, near.global_BK + B], dim=1)
    searched_HMC = torch.cat([p.p_HBC, p.augmented_HBC], dim=1)
    o = torch.cat(
        [agreement(p_BC, q_MC, both_BK) for p_BC, q_MC in zip(p.p_HBC, searched_HMC, strict=True)]
    )
    return [
        (o[:, :split], near.local_confidence_BK.repeat(H, 1)),
        (o[:, split:], near.global_confidence_BK.repeat(H, 1)),
    ]


def _spread(settings: TrainSettings) -> Callable[[Tensor], Tensor]:
    """Return the entropy of the mean prediction, clamped to that of the allowed imbalance."""

    def entropy(p_BC: Tensor) -> Tensor:
        enough = enough_entropy(p_BC.shape[1], settings.max_imbalance)
        return marginal_entropy(p_BC).clamp(max=enough)

    return marginal_entropy if settings.max_imbalance == 1 else entropy


def _mean(loss: Callable[..., Tensor], *heads: Tensor) -> Tensor:
    """Return the mean over heads of a loss of one head's probabilities."""
    values = [loss(*parts) for parts in zip(*heads, strict=True)]
    return torch.stack(values).mean()


def _cluster(p: Predictions, settings: TrainSettings) -> Tensor:
    return _mean(
        lambda p_BC, q_BC: cluster_contrast(p_BC, q_BC, settings.temperature),
        p.p_HBC,
        p.augmented_HBC,
    )


def _mined(p: Predictions, kind: Literal["linear", "log"]) -> Tensor:
    """Agreement with one mined neighbour drawn by confidence: an unbiased `soft_attract`."""
    assert p.mined_HBC is not None
    o = (p.p_HBC * p.mined_HBC).sum(2).view(-1, 1)
    return soft_attract(o, torch.ones_like(o), kind)


OBJECTIVES: dict[str, Objective] = {"soft": soft, "paper": paper, "released": released}
