"""Soft-neighbour losses: Eqs. 2, 3, 5, 6 and 12, and the default attract-only form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from snscc_ray.core.losses.instance import Reduction, matmul, reduce_rows, safe_log


def soft_confidence(d_BK: Tensor, r_B: Tensor) -> Tensor:
    """Eqs. 2 and 5: s = clip(1 - (d - r) / r, 0, 1): 1 up to the radius, 0 from twice the radius.

    r = 0 (a duplicate) gives 1 where d = 0, else 0. d = inf (no such neighbour) gives 0. The
    gradient is 0 where s is clipped, and finite in between. Returns (B, K).
    """
    r_B1 = r_B[:, None]
    inside = d_BK <= r_B1
    # Divide only strictly in between, so that 0/0 and inf/inf never enter the graph. A NaN is
    # neither inside nor outside, so it stays a NaN.
    between = ~inside & ~(d_BK >= 2 * r_B1)
    d, r = torch.where(between, d_BK, 1), torch.where(between, r_B1, 1)
    s = torch.where(between, 1 - (d - r) / r, inside.to(d_BK.dtype))
    return torch.where(torch.isposinf(d_BK), 0, s)


def agreement(p_BC: Tensor, q_MC: Tensor, idx_BK: Tensor) -> Tensor:
    """O of Eqs. 3 and 6: o[i, k] = <p_i, q_idx[i, k]>. Returns (B, K).

    Computes all B×M products and picks K per row, so that runs repeat bit by bit. The backward of
    the shorter p[:, None] * q[idx] adds into one row of q from several threads, in no fixed order.
    Here the backward writes each (row, neighbour) cell once, since a row's neighbours are distinct,
    and a matmul, whose order is fixed, does the sum.
    """
    return matmul(p_BC, q_MC.T).gather(1, idx_BK)


def soft_bce(
    o_BK: Tensor, s_BK: Tensor, mask_BK: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Eqs. 3 and 6 to the letter: -Σ_k [s log o + (1 - s) log(1 - o)], mean over all B rows.

    Pairs outside the mask contribute nothing. Mask every neighbour that does not exist (d = inf):
    it has s = 0 and would be pushed away. If a logarithm's argument is 0 (or below 1e-19), the
    pair's value is large but finite and its gradient is 0; o = s = 0 and o = s = 1 give exactly 0.
    Returns a scalar, or (B,).
    """
    loss_BK = -(s_BK * safe_log(o_BK) + (1 - s_BK) * safe_log(1 - o_BK))
    if mask_BK is not None:
        loss_BK = torch.where(mask_BK, loss_BK, 0)
    return reduce_rows(loss_BK.sum(dim=1), reduction)


def soft_attract(
    o_BK: Tensor,
    s_BK: Tensor,
    kind: Literal["linear", "log"],
    mask_BK: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Eqs. 3 and 6, attraction only: per row -Σ s·f(o) / Σ s, f the identity or the logarithm.

    The mean is over the rows with any non-zero weight, and exactly 0 if there are none. With s = 1
    and K = 1, `log` is the released code's -log <p, p_neighbour>. Returns a scalar, or (B,) with 0
    for rows without weight.
    """
    if mask_BK is not None:
        s_BK = torch.where(mask_BK, s_BK, 0)
    total_B = s_BK.sum(dim=1)
    weighted_B = total_B != 0
    f_BK = safe_log(o_BK) if kind == "log" else o_BK
    loss_B = -(s_BK * f_BK).sum(dim=1) / torch.where(weighted_B, total_B, 1)
    return loss_B if reduction == "none" else loss_B.sum() / weighted_B.sum().clamp(min=1)


def same_label_pairs(y_B: Tensor, y_M: Tensor) -> Tensor:
    """The pairs {j | y_i = y_j} of Eq. 12, as (B, M) bool; rows with y = -1 have none."""
    return (y_B[:, None] == y_M) & (y_B >= 0)[:, None]


def boost_soft_loss(
    o_BK: Tensor,
    d_BK: Tensor,
    kind: Literal["linear", "log", "bce"],
    reduction: Reduction = "mean",
) -> Tensor:
    """Eq. 12: the soft-neighbour loss among the nearest rows with the same pseudo-label.

    d are sorted distances from `neighbors.batch_neighbors` with `allowed_BM=same_label_pairs(...)`,
    inf where a row has fewer than K such neighbours; o is the agreement with the same rows. `bce`
    is the paper's form (`soft_bce`), the others are `soft_attract`. Returns a scalar, or (B,).
    """
    exists_BK = ~torch.isposinf(d_BK)
    radius_B = d_BK[:, :1].sum(dim=1)  # the nearest; 0 if K = 0
    s_BK = soft_confidence(d_BK, radius_B)
    if kind == "bce":
        return soft_bce(o_BK, s_BK, exists_BK, reduction)
    return soft_attract(o_BK, s_BK, kind, exists_BK, reduction)
