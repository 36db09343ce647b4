"""Instance-level losses (Eq. 1: NT-Xent, MoCo-v2's InfoNCE, BYOL's), and helpers of all losses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["mean", "none"]


def reduce_rows(loss_B: Tensor, reduction: Reduction) -> Tensor:
    """Return the mean over rows (exactly 0 if there are none), or the rows unchanged."""
    return loss_B if reduction == "none" else loss_B.sum() / max(len(loss_B), 1)


def safe_log(x: Tensor) -> Tensor:
    """log x with x clamped to at least eps: finite, and without gradient below eps.

    eps is far below any probability that matters, because the gradient below it is lost. It is far
    above the smallest float, so that 1/eps summed over many pairs cannot overflow.
    """
    eps = max(torch.finfo(x.dtype).tiny, 1e-19)
    return x.clamp(min=eps).log()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of the inputs, as autocast would round similarities to 8 bits."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def unit_rows(x_BD: Tensor, eps: float = 1e-12) -> Tensor:
    """x / ‖x‖ per row; a row shorter than eps becomes zeros and gets no gradient."""
    norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    # With <=, a NaN does not count as short: it stays a NaN, and the engine can detect it.
    short_B1 = norm_B1 <= eps
    return torch.where(short_B1, 0, x_BD / torch.where(short_B1, 1, norm_B1))


def nt_xent(
    z1_BD: Tensor, z2_BD: Tensor, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """Eq. 1: each of the 2B rows must find its other view among the 2B - 1 other rows.

    sim is the cosine similarity; rows are normalised here in any case. Returns a scalar, or (2B,):
    the rows of z1, then those of z2. B = 1 gives exactly 0.
    """
    B = len(z1_BD)
    if B == 0:
        return reduce_rows((z1_BD + z2_BD).sum(dim=1), reduction)
    z = unit_rows(torch.cat([z1_BD, z2_BD]))
    logits = matmul(z, z.T / temperature)
    logits.fill_diagonal_(-torch.inf)
    other_view = torch.arange(2 * B, device=z.device).roll(B)
    return reduce_rows(F.cross_entropy(logits, other_view, reduction="none"), reduction)


def info_nce(
    q_BD: Tensor,
    k_BD: Tensor,
    queue_MD: Tensor,
    temperature: float,
    reduction: Reduction = "mean",
) -> Tensor:
    """MoCo-v2: each query must tell its own key from the M keys of the queue.

    Uses cosine similarity, as `nt_xent` does. The caller passes keys and queue without gradient.
    An empty queue gives exactly 0. Returns a scalar, or (B,).
    """
    q, k, queue = unit_rows(q_BD), unit_rows(k_BD), unit_rows(queue_MD)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), matmul(q, queue.T)], dim=1) / temperature
    own_key = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return reduce_rows(F.cross_entropy(logits, own_key, reduction="none"), reduction)


def byol_loss(
    q1_BD: Tensor,
    q2_BD: Tensor,
    t1_BD: Tensor,
    t2_BD: Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    """BYOL (Grill et al., NeurIPS 2020, Eq. 2, symmetrised): q1 must match t2, and q2 t1.

    Per image ‖q1 - t2‖² + ‖q2 - t1‖² of unit rows, that is 4 - 2 cos(q1, t2) - 2 cos(q2, t1),
    from 0 to 8. q are the predictions for two views; t are the target's projections, passed
    without gradient. A row of zeros has cosine 0 and gets no gradient. Returns a scalar, or (B,).
    """
    cosine_B = (unit_rows(q1_BD) * unit_rows(t2_BD)).sum(dim=1)
    cosine_B = cosine_B + (unit_rows(q2_BD) * unit_rows(t1_BD)).sum(dim=1)
    return reduce_rows(4 - 2 * cosine_B, reduction)
