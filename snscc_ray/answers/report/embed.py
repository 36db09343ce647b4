"""Features in two dimensions, for plotting (the paper's Fig. 6)."""

from __future__ import annotations

import time

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

_DIMENSIONS = 50  # PCA reduces to this before t-SNE
_PERPLEXITY = 30.0
_DIGITS = 4
# The time is measured on so many rows and iterations; a whole map takes 1,000 iterations.
_TRIED_ROWS, _TRIED_ITERATIONS, _ITERATIONS = 500, 250, 1000


def embed(features_ND: Tensor, seed: int) -> list[list[float]]:
    """Embed rows by t-SNE (van der Maaten & Hinton, JMLR 2008): points in [0, 1]², (N, 2).

    t-SNE cannot place nearly identical rows, or fewer than four: they all go to the centre.
    """
    values = features_ND.double().numpy()
    if len(values) < 4 or values.std(0).max() < 1e-6:
        return [[0.5, 0.5]] * len(values)
    kept = min(_DIMENSIONS, len(values))
    if values.shape[1] > kept:
        values = PCA(kept, random_state=seed).fit_transform(values)
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed, max_iter=_ITERATIONS)
    return _into_unit_square(tsne.fit_transform(values.astype(np.float32)))


def seconds_of_maps(rows: int, maps: int) -> float:
    """Estimate the seconds of so many calls of `embed` here, by a short one on random rows."""
    tried = min(rows, _TRIED_ROWS)
    if tried < 4:
        return 0.0
    values = np.random.default_rng(0).normal(size=(tried, _DIMENSIONS)).astype(np.float32)
    tsne = TSNE(
        perplexity=min(_PERPLEXITY, (tried - 1) / 3), init="pca", max_iter=_TRIED_ITERATIONS
    )
    began = time.monotonic()
    tsne.fit_transform(values)
    scale = rows / tried * _ITERATIONS / _TRIED_ITERATIONS
    return (time.monotonic() - began) * scale * maps


def _into_unit_square(points: np.ndarray) -> list[list[float]]:
    """Shift and scale both axes by the same factor, to preserve shapes."""
    low, high = points.min(0), points.max(0)
    side = float((high - low).max()) or 1.0
    placed = (points - (low + high) / 2) / side + 0.5
    return [[round(float(x), _DIGITS), round(float(y), _DIGITS)] for x, y in placed]
