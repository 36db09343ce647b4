"""Spectral clustering on raw pixels with local scales (Zelnik-Manor & Perona, "Self-Tuning
Spectral Clustering", NeurIPS 2004), by scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import SpectralClustering
from sklearn.metrics import pairwise_distances

from snscc_ray.baselines.study import Found, Study
from snscc_ray.baselines.subsample import cluster_some

# The neighbour whose distance is a row's scale: the paper's K.
NEIGHBOR = 7


def affinity(pixels_RD: np.ndarray) -> np.ndarray:
    """Eq. 2: exp(-d_ij² / (σ_i σ_j)), σ_i the distance to the 7th nearest row; 0 on the diagonal.

    Returns (R, R). Where a scale is 0 (seven duplicates) only duplicates are alike.
    """
    square_RR = pairwise_distances(pixels_RD, metric="sqeuclidean").astype(np.float64)
    nearest = min(NEIGHBOR, len(square_RR) - 1)
    scale_R = np.sqrt(np.partition(square_RR, nearest, axis=1)[:, nearest])
    scales_RR = np.maximum(np.outer(scale_R, scale_R), np.finfo(np.float64).tiny)
    alike_RR = np.exp(-square_RR / scales_RR)
    np.fill_diagonal(alike_RR, 0)
    return alike_RR


def cluster(study: Study) -> Found:
    model = SpectralClustering(
        study.clusters, affinity="precomputed", random_state=study.key("sc") % 2**32
    )
    return cluster_some(study, "sc", lambda pixels_RD: model.fit_predict(affinity(pixels_RD)))
