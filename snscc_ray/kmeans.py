"""k-means with scikit-learn, the same on every run: it starts prototypes and is the baseline."""

from __future__ import annotations

import warnings

import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

# Above this many numbers Lloyd's ten starts take minutes; mini-batches find centres as good.
_FULL_SIZE = 5_000_000


def kmeans(rows_ND: Tensor, clusters: int, seed: int, starts: int = 10) -> tuple[Tensor, Tensor]:
    """(centres (C, D) float32, assignment (N,) int64), both on the CPU; best of the starts."""
    rows = rows_ND.detach().cpu().float().numpy()
    if rows.size <= _FULL_SIZE:
        model = KMeans(clusters, n_init=starts, random_state=seed % 2**32)
    else:
        model = MiniBatchKMeans(clusters, n_init=starts, batch_size=4096, random_state=seed % 2**32)
    # On several threads scikit-learn adds partial sums in the order they finish: the last bits
    # would differ from run to run, and a resumed run from an uninterrupted one.
    with threadpool_limits(1), warnings.catch_warnings():
        # Of images that are the same; that is said of the images, see `imageset`.
        warnings.simplefilter("ignore", ConvergenceWarning)
        assignment = model.fit_predict(rows)
    centres = torch.from_numpy(model.cluster_centers_).float()
    return centres, torch.from_numpy(assignment).long()
