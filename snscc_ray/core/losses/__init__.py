"""Every loss of the paper, as pure functions of tensors and floats; lower is better.

The shape suffixes of all names in this package and its tests:

    B  rows of one step's batch (the caller has already gathered them over workers)
    M  rows searched (the batch, its augmented views, a queue, or the dataset)
    K  neighbours of a row
    C  clusters
    D  features
    N  rows of the dataset

A scalar without a suffix is a float. p, q are cluster probabilities, z features, d distances,
r radii, s soft confidences in [0, 1], o agreements <p_i, p_j>, y pseudo-labels (-1: none).

Losses compute in the dtype of their inputs, even under autocast. `reduction="mean"` gives a
scalar, `"none"` one value per row. A degenerate batch (no rows, no neighbours, no labels) gives an
exact zero with zero gradient, never a NaN.
"""

from __future__ import annotations

from snscc_ray.core.losses.clusters import (
    batch_pair_term,
    cluster_contrast,
    marginal_entropy,
    one_way_column_contrast,
    pseudo_label_cross_entropy,
    row_entropy,
)
from snscc_ray.core.losses.instance import byol_loss, info_nce, nt_xent
from snscc_ray.core.losses.neighbors import (
    agreement,
    boost_soft_loss,
    same_label_pairs,
    soft_attract,
    soft_bce,
    soft_confidence,
)

__all__ = [
    "agreement",
    "batch_pair_term",
    "boost_soft_loss",
    "byol_loss",
    "cluster_contrast",
    "info_nce",
    "marginal_entropy",
    "nt_xent",
    "one_way_column_contrast",
    "pseudo_label_cross_entropy",
    "row_entropy",
    "same_label_pairs",
    "soft_attract",
    "soft_bce",
    "soft_confidence",
]
