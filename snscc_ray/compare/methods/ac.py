"""Agglomerative clustering of raw pixels or features with Ward's criterion (Ward, 1963).

By scikit-learn. The paper cites Gowda & Krishna, 1978.
"""

from __future__ import annotations

from sklearn.cluster import AgglomerativeClustering

from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.compare.subsample import cluster_some


def cluster(study: Study) -> MethodResult:
    model = AgglomerativeClustering(study.clusters, linkage="ward")
    return cluster_some(study, "ac", model.fit_predict)
