"""Every equation again, slowly: float64, one loop per sum sign, straight from the paper.

Shares no code with the package and uses nothing from it. Values carry gradients, so that those
can be compared too. Suffixes as in `snscc_ray.core.losses`. Logarithms of probabilities are held at
log(1e-19), the one thing the paper leaves open.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def zero_like(x: Tensor) -> Tensor:
    return x.new_zeros(())


def log(x: Tensor) -> Tensor:
    """log x, a constant below 1e-19."""
    return x.log() if x.item() >= 1e-19 else x.new_tensor(math.log(1e-19))


def dot(a_D: Tensor, b_D: Tensor) -> Tensor:
    total = zero_like(a_D)
    for a, b in zip(a_D, b_D, strict=True):
        total = total + a * b
    return total


def sim(a_D: Tensor, b_D: Tensor) -> Tensor:
    """Cosine similarity; 0 if either has no direction."""
    if not a_D.any() or not b_D.any():
        return zero_like(a_D)
    return dot(a_D, b_D) / (dot(a_D, a_D) * dot(b_D, b_D)).sqrt()


def contrast(positive: Tensor, others: list[Tensor], temperature: float) -> Tensor:
    """-log of exp(positive / τ) over the sum of exp(other / τ), the positive being one of them."""
    total = zero_like(positive)
    for other in others:
        total = total + (other / temperature).exp()
    return total.log() - positive / temperature


def mean(terms: list[Tensor], like: Tensor) -> Tensor:
    total = zero_like(like)
    for term in terms:
        total = total + term
    return total / max(len(terms), 1)


def eq1_rows(z1_BD: Tensor, z2_BD: Tensor, temperature: float) -> list[Tensor]:
    u = list(z1_BD) + list(z2_BD)
    B = len(z1_BD)
    losses = []
    for i in range(2 * B):
        partner = i + B if i < B else i - B
        others = [sim(u[i], u[j]) for j in range(2 * B) if j != i]
        losses.append(contrast(sim(u[i], u[partner]), others, temperature))
    return losses


def eq1(z1_BD: Tensor, z2_BD: Tensor, temperature: float) -> Tensor:
    return mean(eq1_rows(z1_BD, z2_BD, temperature), z1_BD)


def info_nce(q_BD: Tensor, k_BD: Tensor, queue_MD: Tensor, temperature: float) -> Tensor:
    losses = []
    for q, k in zip(q_BD, k_BD, strict=True):
        positive = sim(q, k)
        losses.append(contrast(positive, [positive] + [sim(q, n) for n in queue_MD], temperature))
    return mean(losses, q_BD)


def byol_rows(q1_BD: Tensor, q2_BD: Tensor, t1_BD: Tensor, t2_BD: Tensor) -> list[Tensor]:
    """Eq. 2 of Grill et al. as 2 - 2 cos, for each view in turn."""
    losses = []
    for i in range(len(q1_BD)):
        losses.append(2 - 2 * sim(q1_BD[i], t2_BD[i]) + 2 - 2 * sim(q2_BD[i], t1_BD[i]))
    return losses


def distance(a_D: Tensor, b_D: Tensor) -> float:
    return math.sqrt(sum((a.item() - b.item()) ** 2 for a, b in zip(a_D, b_D, strict=True)))


def nearest(
    z_BD: Tensor, ref_MD: Tensor, k: int, same_rows: bool, allowed_BM: Tensor | None = None
) -> list[list[tuple[float, int]]]:
    """For each row its (distance, index) pairs, nearest first, at most k of them."""
    lists = []
    for i, z in enumerate(z_BD):
        pairs = []
        for j, ref in enumerate(ref_MD):
            if same_rows and i == j:
                continue
            if allowed_BM is not None and not allowed_BM[i, j]:
                continue
            pairs.append((distance(z, ref), j))
        lists.append(sorted(pairs)[:k])
    return lists


def eq2(d: float, r: float) -> float:
    """Eqs. 2 and 5."""
    if r == 0:
        return 1.0 if d == 0 else 0.0
    return min(max(1 - (d - r) / r, 0.0), 1.0)


def eq4(z_D: Tensor, zaug_D: Tensor) -> float:
    return distance(z_D, zaug_D)


def bce_term(s: float, o: Tensor) -> Tensor:
    return s * log(o) + (1 - s) * log(1 - o)


def eq3(p_BC: Tensor, z_BD: Tensor, k: int) -> Tensor:
    total = zero_like(p_BC)
    for i, pairs in enumerate(nearest(z_BD, z_BD, k, same_rows=True)):
        for d, j in pairs:
            total = total + bce_term(eq2(d, pairs[0][0]), dot(p_BC[i], p_BC[j]))
    return -total / len(p_BC)


def eq6(p_BC: Tensor, paug_BC: Tensor, z_BD: Tensor, zaug_BD: Tensor, k: int) -> Tensor:
    """Neighbours and their predictions from the augmented rows, own view included."""
    total = zero_like(p_BC)
    for i, pairs in enumerate(nearest(z_BD, zaug_BD, k, same_rows=False)):
        radius = eq4(z_BD[i], zaug_BD[i])
        for d, j in pairs:
            total = total + bce_term(eq2(d, radius), dot(p_BC[i], paug_BC[j]))
    return -total / len(p_BC)


def attract(p_BC: Tensor, z_BD: Tensor, k: int, kind: str) -> Tensor:
    """The attract-only reading of Eq. 3: per row -Σ s f(O) / Σ s, mean over rows with Σ s > 0."""
    losses = []
    for i, pairs in enumerate(nearest(z_BD, z_BD, k, same_rows=True)):
        total, weight = zero_like(p_BC), 0.0
        for d, j in pairs:
            s = eq2(d, pairs[0][0])
            o = dot(p_BC[i], p_BC[j])
            total = total + s * (log(o) if kind == "log" else o)
            weight += s
        if weight > 0:
            losses.append(-total / weight)
    return mean(losses, p_BC)


def eq7(p_BC: Tensor, q_BC: Tensor, temperature: float) -> Tensor:
    columns = [p_BC[:, c] for c in range(p_BC.shape[1])]
    columns += [q_BC[:, c] for c in range(q_BC.shape[1])]
    C = p_BC.shape[1]
    losses = []
    for i in range(2 * C):
        others = [sim(columns[i], columns[j]) for j in range(2 * C) if j != i]
        losses.append(contrast(sim(columns[i], columns[(i + C) % (2 * C)]), others, temperature))
    return mean(losses, p_BC)


def one_way(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    C = p_BC.shape[1]
    losses = []
    for c in range(C):
        sims = [sim(p_BC[:, c], q_BC[:, e]) for e in range(C)]
        losses.append(contrast(sims[c], sims, 1.0))
    return mean(losses, p_BC)


def entropy(p_C: Tensor) -> Tensor:
    total = zero_like(p_C)
    for p in p_C:
        total = total - p * log(p)
    return total


def eq8(p_BC: Tensor) -> Tensor:
    return mean([entropy(p) for p in p_BC], p_BC)


def eq8_marginal(p_BC: Tensor) -> Tensor:
    columns = [mean(list(p_BC[:, c]), p_BC) for c in range(p_BC.shape[1])]
    return entropy(torch.stack(columns))


def eq9(p_BC: Tensor, q_BC: Tensor, temperature: float, entropy_weight: float) -> Tensor:
    return eq7(p_BC, q_BC, temperature) - entropy_weight * eq8(p_BC)


def eq11(p_NC: Tensor, threshold: float, top_fraction: float) -> list[int]:
    candidates: dict[int, list[tuple[float, int]]] = {}
    for i, p in enumerate(p_NC):
        values = p.tolist()
        best = max(values)
        if best >= threshold:
            candidates.setdefault(values.index(best), []).append((-best, i))
    y = [-1] * len(p_NC)
    for c, rows in candidates.items():
        keep = math.ceil(round(len(rows) * top_fraction, 6))
        for _, i in sorted(rows)[:keep]:
            y[i] = c
    return y


def eq12(p_BC: Tensor, z_BD: Tensor, y: list[int], k: int) -> Tensor:
    """Literal Eq. 12 over the k nearest rows of the same pseudo-label."""
    allowed = torch.zeros(len(y), len(y), dtype=torch.bool)
    for i in range(len(y)):
        for j in range(len(y)):
            allowed[i, j] = y[i] == y[j] and y[i] >= 0
    total = zero_like(p_BC)
    for i, pairs in enumerate(nearest(z_BD, z_BD, k, True, allowed)):
        for d, j in pairs:
            total = total + bce_term(eq2(d, pairs[0][0]), dot(p_BC[i], p_BC[j]))
    return -total / len(p_BC)


def eq13(logits_BC: Tensor, y: list[int]) -> Tensor:
    losses = []
    for logits, label in zip(logits_BC, y, strict=True):
        if label >= 0:
            losses.append(contrast(logits[label], list(logits), 1.0))
    return mean(losses, logits_BC)
