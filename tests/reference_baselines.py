"""The losses of other methods again, slowly: float64, one loop per sum sign, from their papers.

As `reference`: shares no code with the package, and values carry gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference import contrast, dot, eq7, log, mean, sim, zero_like


def scan_consistency(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """SCAN, Eq. 2, first term, one neighbour per row."""
    return mean([-log(dot(p, q)) for p, q in zip(p_BC, q_BC, strict=True)], p_BC)


def scan_self_labelling(p_BC: Tensor, logits_BC: Tensor, threshold: float) -> Tensor:
    """SCAN, Section 2.3: the mean over the classes that occur of their rows' mean loss."""
    by_class: dict[int, list[Tensor]] = {}
    for p, logits in zip(p_BC.tolist(), logits_BC, strict=True):
        if max(p) > threshold:
            label = p.index(max(p))
            by_class.setdefault(label, []).append(contrast(logits[label], list(logits), 1.0))
    return mean([mean(losses, logits_BC) for losses in by_class.values()], logits_BC)


def dec_assignment(z_BD: Tensor, centres_CD: Tensor) -> Tensor:
    """DEC, Eq. 1, one degree of freedom."""
    rows = []
    for z in z_BD:
        kernels = [1 / (1 + dot(z - centre, z - centre)) for centre in centres_CD]
        total = zero_like(z_BD)
        for kernel in kernels:
            total = total + kernel
        rows.append(torch.stack([kernel / total for kernel in kernels]))
    return torch.stack(rows)


def dec_target(q_NC: Tensor) -> Tensor:
    """DEC, Eq. 3."""
    N, C = q_NC.shape
    frequency = [sum(q_NC[i, j].item() for i in range(N)) for j in range(C)]
    p_NC = torch.zeros_like(q_NC)
    for i in range(N):
        sharp = [q_NC[i, j].item() ** 2 / frequency[j] if frequency[j] else 0.0 for j in range(C)]
        for j in range(C):
            p_NC[i, j] = sharp[j] / sum(sharp)
    return p_NC


def dec_divergence(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """DEC, Eq. 2."""
    rows = []
    for p_C, q_C in zip(p_BC.detach(), q_BC, strict=True):
        total = zero_like(q_BC)
        for p, q in zip(p_C, q_C, strict=True):
            total = total + p * (log(p) - log(q))
        rows.append(total)
    return mean(rows, q_BC)


def cc_cluster_level(p_BC: Tensor, q_BC: Tensor, temperature: float) -> Tensor:
    """CC: contrast of the columns, less the entropy of both views' cluster sizes."""
    total = eq7(p_BC, q_BC, temperature)
    return total - sizes_entropy(p_BC) - sizes_entropy(q_BC)


def sizes_entropy(p_BC: Tensor) -> Tensor:
    """CC and PICA: the entropy of the columns' sums, each a share of the sum of them all."""
    B, C = p_BC.shape
    sizes = [zero_like(p_BC) for _ in range(C)]
    whole = zero_like(p_BC)
    for i in range(B):
        for c in range(C):
            sizes[c] = sizes[c] + p_BC[i, c]
            whole = whole + p_BC[i, c]
    total = zero_like(p_BC)
    for size in sizes:
        total = total - size / whole * log(size / whole)
    return total


def iic_information(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """IIC, Eqs. 2 and 3."""
    B, C = p_BC.shape
    joint: list[list[Tensor]] = [[zero_like(p_BC)] * C for _ in range(C)]
    for i in range(B):
        for c in range(C):
            for d in range(C):
                both = (p_BC[i, c] * q_BC[i, d] + p_BC[i, d] * q_BC[i, c]) / 2
                joint[c][d] = joint[c][d] + both / B
    total = zero_like(p_BC)
    for c in range(C):
        for d in range(C):
            row, column = zero_like(p_BC), zero_like(p_BC)
            for e in range(C):
                row = row + joint[c][e]
                column = column + joint[e][d]
            total = total + joint[c][d] * (log(joint[c][d]) - log(row) - log(column))
    return total


def pica_uncertainty(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """PICA: softmax over the cosines of one column of p with all columns of q."""
    C = p_BC.shape[1]
    losses = []
    for c in range(C):
        cosines = [sim(p_BC[:, c], q_BC[:, d]) for d in range(C)]
        losses.append(contrast(cosines[c], cosines, 1.0))
    return mean(losses, p_BC)


def pica_imbalance(p_BC: Tensor) -> Tensor:
    """PICA: log C - H of the sizes."""
    return math.log(p_BC.shape[1]) - sizes_entropy(p_BC)


def vae_negative_elbo(made_BV: Tensor, x_BV: Tensor, mean_BD: Tensor, logvar_BD: Tensor) -> Tensor:
    """VAE, Eq. 10 with one sample, unit variance, and Appendix B; without the constant."""
    rows = []
    for made_V, x_V, mean_D, logvar_D in zip(made_BV, x_BV, mean_BD, logvar_BD, strict=True):
        total = zero_like(x_BV)
        for made, x in zip(made_V.flatten(), x_V.flatten(), strict=True):
            total = total + (made - x) * (made - x) / 2
        for mu, logvar in zip(mean_D, logvar_D, strict=True):
            total = total - (1 + logvar - mu * mu - logvar.exp()) / 2
        rows.append(total)
    return mean(rows, x_BV)


def squared_error(made_BV: Tensor, x_BV: Tensor) -> Tensor:
    errors = []
    for made, x in zip(made_BV.flatten(), x_BV.flatten(), strict=True):
        errors.append((made - x) * (made - x))
    return mean(errors, x_BV)
