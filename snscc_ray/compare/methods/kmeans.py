"""K-Means on raw pixels (MacQueen, 1967), by scikit-learn."""

from __future__ import annotations

from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.core.clustering.kmeans import kmeans


def cluster(study: Study) -> MethodResult:
    key = study.key("kmeans", "pixels")
    _, clusters_N = study.timed(lambda: kmeans(study.pixels(), study.clusters, key))
    return MethodResult(clusters_N)
