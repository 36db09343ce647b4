"""Cluster-level losses: Eqs. 7-9 and 13, and the terms of the released code's objective."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from snscc_ray.core.losses.instance import (
    Reduction,
    matmul,
    nt_xent,
    reduce_rows,
    safe_log,
    unit_rows,
)


def cluster_contrast(
    p_BC: Tensor, q_BC: Tensor, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """Eq. 7: NT-Xent over the 2C columns of two views' predictions; each column is an anchor.

    An all-zero column (an unused cluster) has similarity 0 to every other and gets no gradient.
    Returns a scalar, or (2C,): the columns of p, then those of q.
    """
    return nt_xent(p_BC.T, q_BC.T, temperature, reduction)


def one_way_column_contrast(p_BC: Tensor, q_BC: Tensor, reduction: Reduction = "mean") -> Tensor:
    """The released code's Eq. 7: match each column of p to its own among q's C; no temperature.

    Returns a scalar, or (C,).
    """
    logits_CC = matmul(unit_rows(p_BC.T), unit_rows(q_BC.T).T)
    own_C = torch.arange(len(logits_CC), device=p_BC.device)
    return reduce_rows(F.cross_entropy(logits_CC, own_C, reduction="none"), reduction)


def batch_pair_term(o_BM: Tensor, w_BM: Tensor) -> Tensor:
    """The released code's batch-wide term: mean over pairs of w·o + (1 - w)(1 - o).

    o is the agreement of every pair, w its soft confidence. Minimising it *lowers* the agreement
    where w is high: the sign is opposite to the paper's, and kept so here. Returns a scalar.
    """
    return (w_BM * o_BM + (1 - w_BM) * (1 - o_BM)).sum() / max(o_BM.numel(), 1)


def row_entropy(p_BC: Tensor) -> Tensor:
    """Eq. 8 to the letter: the mean of the rows' entropies, ≥ 0. Returns a scalar.

    Eq. 9 subtracts ε times this, which pushes every row towards uniform.
    """
    return reduce_rows(-(p_BC * safe_log(p_BC)).sum(dim=1), "mean")


def marginal_entropy(p_BC: Tensor) -> Tensor:
    """Eq. 8 as the paper's text describes it: the entropy of the mean prediction, ≥ 0. A scalar.

    Eq. 9 subtracts ε times this, which keeps the clusters balanced.
    """
    mean_1C = p_BC.sum(dim=0, keepdim=True) / max(len(p_BC), 1)
    return row_entropy(mean_1C)


def pseudo_label_cross_entropy(
    logits_BC: Tensor, y_B: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Eq. 13 as a positive cross-entropy (the paper's leading minus would maximise it).

    Rows with y = -1 have no pseudo-label and are ignored: the mean is over the labelled rows,
    exactly 0 if there are none. Returns a scalar, or (B,) with 0 for unlabelled rows.
    """
    loss_B = F.cross_entropy(logits_BC, y_B, ignore_index=-1, reduction="none")
    return loss_B if reduction == "none" else loss_B.sum() / (y_B >= 0).sum().clamp(min=1)
