"""Eq. 11: select the rows whose cluster is certain enough to serve as a pseudo-label."""

from __future__ import annotations

import torch
from torch import Tensor


def select_pseudo_labels(p_NC: Tensor, threshold: float, top_fraction: float) -> Tensor:
    """Eq. 11: return y_N int64, the cluster of each selected row, -1 for the others.

    Candidates are the rows whose highest probability is at least `threshold` (γ). Of a cluster's n
    candidates, the ceil(σ·n) most confident are kept, where σ is `top_fraction`: at least one if
    there are any (unless σ = 0), all for σ = 1. Equally confident rows are taken in row order.
    """
    N, C = p_NC.shape
    confidence_N, y_N = p_NC.max(dim=1)
    class_N = torch.where(confidence_N >= threshold, y_N, C)  # C: not a candidate
    by_confidence = confidence_N.argsort(descending=True, stable=True)
    order_N = by_confidence[class_N[by_confidence].argsort(stable=True)]
    # Not bincount, which waits for the largest number on a GPU.
    count = class_N.new_zeros(C + 1).scatter_add_(0, class_N, torch.ones_like(class_N))
    # 0.07 * 100 is slightly above 7: without the slack it would keep 8.
    keep = (count.double() * top_fraction - 1e-9).ceil().long()
    keep[C] = 0
    sorted_class_N = class_N[order_N]
    first = count.cumsum(0) - count
    rank_N = torch.arange(N, device=p_NC.device) - first[sorted_class_N]
    kept_N = torch.zeros(N, dtype=torch.bool, device=p_NC.device)
    kept_N[order_N] = rank_N < keep[sorted_class_N]
    return torch.where(kept_N, y_N, -1)
