"""Whitening of features within pairs of rows that should be alike.

A trained encoder's features also tell what does not matter here: crop, colour, background. Relevant
component analysis (Bar-Hillel, Hertz, Shental & Weinshall, "Learning distance functions using
equivalence relations", ICML 2003) weakens the directions in which equivalent rows differ. In place
of known equivalences we take an image's augmented views and its nearest neighbours. The scatter is
shrunk towards a multiple of the identity (Friedman, "Regularized discriminant analysis", JASA
1989), as the neighbours are not all of one kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VIEWS_WEIGHT = 3.0  # of a pair of views, against a pair of neighbours
_SHRINKAGE = 0.5


def within_whitening(rows_NVD: Tensor, neighbors_NK: Tensor) -> Tensor:
    """Return the symmetric map W (D, D) float32 for `rows @ W`; the identity if all pairs agree.

    rows_NVD: the clean row and V - 1 views of each image. W is (S / v + λ I)^(-1/2), where S is
    the mean scatter of the pairs and v = tr(S) / D.
    """
    clean_ND = rows_NVD[:, 0]
    width = clean_ND.shape[1]
    scatter_DD = torch.zeros(width, width, dtype=torch.float64)
    for near_N in neighbors_NK.long().T:  # one at a time: all differences would be K times the rows
        scatter_DD += _scatter(clean_ND - clean_ND[near_N]) / neighbors_NK.shape[1]
    if rows_NVD.shape[1] > 1:
        scatter_DD += _VIEWS_WEIGHT * _scatter(rows_NVD[:, 1:] - clean_ND[:, None])
    mean_variance = scatter_DD.trace() / width
    if not mean_variance > 0:
        return torch.eye(width)
    shrunk_DD = scatter_DD / mean_variance + _SHRINKAGE * torch.eye(width, dtype=torch.float64)
    values_D, vectors_DD = torch.linalg.eigh(shrunk_DD)
    whitening_DD: Tensor = (vectors_DD * values_D.rsqrt()) @ vectors_DD.T
    return whitening_DD.float()


def _scatter(differences: Tensor) -> Tensor:
    """Return the mean outer product (D, D) of the differences (…, D), halved, in float64."""
    flat_ND = differences.flatten(0, -2)
    return (flat_ND.T @ flat_ND).double() / (2 * len(flat_ND))
