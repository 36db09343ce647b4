"""Spectral clustering on raw pixels (Zelnik-Manor & Perona, "Self-Tuning Spectral Clustering",
NeurIPS 2004), by scikit-learn; the number of clusters is given, and k-means finds them."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.manifold import spectral_embedding
from sklearn.metrics import pairwise_distances
from sklearn.preprocessing import normalize

from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.compare.subsample import cluster_some
from snscc_ray.core.clustering.kmeans import kmeans

# The neighbour whose distance is a row's scale: the paper's K.
NEIGHBOR = 7


def affinity(pixels_RD: np.ndarray) -> np.ndarray:
    """Its local scaling: exp(-d_ij² / (σ_i σ_j)), σ_i the distance to the 7th nearest row, and 0
    on the diagonal.

    Returns (R, R). Where a scale is 0 (seven duplicates) only duplicates are alike.
    """
    square_RR = pairwise_distances(pixels_RD, metric="sqeuclidean").astype(np.float64)
    nearest = min(NEIGHBOR, len(square_RR) - 1)
    scale_R = np.sqrt(np.partition(square_RR, nearest, axis=1)[:, nearest])
    scales_RR = np.maximum(np.outer(scale_R, scale_R), np.finfo(np.float64).tiny)
    alike_RR: np.ndarray = np.exp(-square_RR / scales_RR)
    np.fill_diagonal(alike_RR, 0)
    return alike_RR


def spectral(pixels_RD: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """k-means of the first eigenvectors' rows at unit length (Ng, Jordan & Weiss, NeurIPS 2001,
    which the paper's algorithm is but for the scaling). Returns (R,)."""
    embedding_RC = spectral_embedding(
        affinity(pixels_RD), n_components=clusters, drop_first=False, random_state=seed
    )
    _, clusters_R = kmeans(torch.from_numpy(normalize(embedding_RC)), clusters, seed)
    return clusters_R.numpy()


def cluster(study: Study) -> MethodResult:
    seed = study.key("sc") % 2**32
    return cluster_some(study, "sc", lambda pixels_RD: spectral(pixels_RD, study.clusters, seed))
