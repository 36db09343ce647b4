"""Which function is which method."""

from __future__ import annotations

from collections.abc import Callable

from snscc_ray.compare.methods import (
    ac,
    ae,
    cc,
    dae,
    dec,
    iic,
    kmeans,
    nmf,
    ours,
    pica,
    sc,
    scan,
    vae,
)
from snscc_ray.compare.study import Found, Study

METHODS: dict[str, Callable[[Study], Found]] = {
    "kmeans": kmeans.cluster,
    "sc": sc.cluster,
    "ac": ac.cluster,
    "nmf": nmf.cluster,
    "ae": ae.cluster,
    "dae": dae.cluster,
    "vae": vae.cluster,
    "dec": dec.cluster,
    "iic": iic.cluster,
    "pica": pica.cluster,
    "cc": cc.cluster,
    "pretext": ours.pretext_kmeans,
    "scan": scan.cluster,
    "snscc": ours.cluster,
}
