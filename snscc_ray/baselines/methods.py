"""Which function is which method."""

from __future__ import annotations

from collections.abc import Callable

from snscc_ray.baselines import kmeans, ours, scan
from snscc_ray.baselines.study import Found, Study

METHODS: dict[str, Callable[[Study], Found]] = {
    "kmeans": kmeans.cluster,
    "pretext": ours.pretext_kmeans,
    "scan": scan.cluster,
    "snscc": ours.cluster,
}
