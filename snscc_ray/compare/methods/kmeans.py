"""K-Means on raw pixels or features (MacQueen, 1967), by scikit-learn."""

from __future__ import annotations

from snscc_ray.compare.rows import rows_of
from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.core.clustering.kmeans import kmeans


def cluster(study: Study) -> MethodResult:
    rows_ND = rows_of(study)
    key = study.key("kmeans") if study.frozen else study.key("kmeans", "pixels")
    _, clusters_N = study.timed(lambda: kmeans(rows_ND, study.clusters, key))
    return MethodResult(clusters_N)
