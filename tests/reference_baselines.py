"""The losses of other methods again, slowly: float64, one loop per sum sign, from their papers.

As `reference`: shares no code with the package, and values carry gradients.
"""

from __future__ import annotations

from torch import Tensor

from tests.reference import contrast, dot, log, mean


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
