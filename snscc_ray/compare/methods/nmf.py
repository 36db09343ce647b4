"""Non-negative matrix factorisation of raw pixels (Lee & Seung, Nature 1999), by scikit-learn.

One component per cluster; a row belongs to its largest component (Xu, Liu & Gong, SIGIR 2003). The
paper cites a variant that also keeps neighbours together (Cai et al., IJCAI 2009).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from snscc_ray.compare.study import MethodResult, Study


def largest_part(weights_NC: np.ndarray, parts_CD: np.ndarray) -> np.ndarray:
    """Return the largest component of each row, (N,).

    Weights are multiplied by the component's norm, since its scale is arbitrary.
    """
    return np.asarray((weights_NC * np.linalg.norm(parts_CD, axis=1)).argmax(axis=1))


def cluster(study: Study) -> MethodResult:
    model = NMF(study.clusters, init="nndsvda", random_state=study.key("nmf") % 2**32)

    def factorise() -> Tensor:
        with threadpool_limits(1), warnings.catch_warnings():
            # The default 200 steps suffice: the largest component settles before convergence.
            warnings.simplefilter("ignore", ConvergenceWarning)
            weights_NC = model.fit_transform(study.pixels().numpy())
        return torch.from_numpy(largest_part(weights_NC, model.components_)).long()

    return MethodResult(study.timed(factorise))
