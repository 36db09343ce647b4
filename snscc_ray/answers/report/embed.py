"""Features in two dimensions, for plotting (the paper's Fig. 6)."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

_DIMENSIONS = 50  # PCA reduces to this before t-SNE
_PERPLEXITY = 30.0
_DIGITS = 4


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
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return _into_unit_square(tsne.fit_transform(values.astype(np.float32)))


def _into_unit_square(points: np.ndarray) -> list[list[float]]:
    """Shift and scale both axes by the same factor, to preserve shapes."""
    low, high = points.min(0), points.max(0)
    side = float((high - low).max()) or 1.0
    placed = (points - (low + high) / 2) / side + 0.5
    return [[round(float(x), _DIGITS), round(float(y), _DIGITS)] for x, y in placed]
