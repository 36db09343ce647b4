"""Spectral clustering of raw pixels or features (Zelnik-Manor & Perona, "Self-Tuning Spectral
Clustering", NeurIPS 2004), by scikit-learn; with a given number of clusters, found by k-means."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.manifold import spectral_embedding
from sklearn.metrics import pairwise_distances
from sklearn.preprocessing import normalize

from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.compare.subsample import cluster_some
from snscc_ray.core.clustering.kmeans import kmeans

# A row's scale is the distance to this neighbour: the paper's K.
NEIGHBOR = 7


def affinity(rows_RD: np.ndarray) -> np.ndarray:
    """Locally scaled affinity: exp(-d_ij² / (σ_i σ_j)), with 0 on the diagonal. Returns (R, R).

    σ_i is the distance to the 7th nearest row. If it is 0 (seven duplicates), only duplicates are
    similar.
    """
    square_RR = pairwise_distances(rows_RD, metric="sqeuclidean").astype(np.float64)
    nearest = min(NEIGHBOR, len(square_RR) - 1)
    scale_R = np.sqrt(np.partition(square_RR, nearest, axis=1)[:, nearest])
    scales_RR = np.maximum(np.outer(scale_R, scale_R), np.finfo(np.float64).tiny)
    alike_RR: np.ndarray = np.exp(-square_RR / scales_RR)
    np.fill_diagonal(alike_RR, 0)
    return alike_RR


def spectral(rows_RD: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Run k-means on the unit-length rows of the first eigenvectors. Returns (R,).

    Ng, Jordan & Weiss, NeurIPS 2001; the paper's algorithm differs from it only in the scaling.
    """
    embedding_RC = spectral_embedding(
        affinity(rows_RD), n_components=clusters, drop_first=False, random_state=seed
    )
    _, clusters_R = kmeans(torch.from_numpy(normalize(embedding_RC)), clusters, seed)
    return clusters_R.numpy()


def cluster(study: Study) -> MethodResult:
    seed = study.key("sc") % 2**32
    return cluster_some(study, "sc", lambda rows_RD: spectral(rows_RD, study.clusters, seed))
