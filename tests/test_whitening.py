"""Whitening within pairs, against a slow float64 reference and on degenerate rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.neighbors import knn
from snscc_ray.core.clustering.whitening import within_whitening


def reference(rows_NVD: np.ndarray, neighbors_NK: np.ndarray) -> np.ndarray:
    """(S + tr(S)/2D I)^(-1/2) up to its factor, pair by pair; S = Σ_neighbours + 3 Σ_views."""
    rows, views, width = rows_NVD.shape
    near, own = np.zeros((width, width)), np.zeros((width, width))
    for i in range(rows):
        for j in neighbors_NK[i]:
            gap = rows_NVD[i, 0] - rows_NVD[j, 0]
            near += np.outer(gap, gap) / 2 / neighbors_NK.size
        for v in range(1, views):
            gap = rows_NVD[i, v] - rows_NVD[i, 0]
            own += np.outer(gap, gap) / 2 / (rows * (views - 1))
    scatter = near + 3 * own
    scatter /= np.trace(scatter) / width
    values, vectors = np.linalg.eigh(scatter + 0.5 * np.eye(width))
    return np.asarray(vectors @ np.diag(values**-0.5) @ vectors.T)


@pytest.mark.parametrize(("rows", "views", "width"), [(40, 1, 6), (30, 2, 9), (7, 4, 12)])
def test_it_is_the_inverse_root_of_the_scatter_of_the_pairs(
    rows: int, views: int, width: int
) -> None:
    drawing = np.random.default_rng(rows)
    values = drawing.normal(size=(rows, views, width)) * 0.7 ** np.arange(width)
    near = np.stack([drawing.permutation(rows)[:5] for _ in range(rows)])
    found = within_whitening(torch.from_numpy(values).float(), torch.from_numpy(near))
    np.testing.assert_allclose(found, reference(values, near), rtol=1e-4, atol=1e-5)


def test_rows_that_all_agree_are_left_as_they_are() -> None:
    same = torch.ones(10, 3, 4)
    near = torch.arange(10)[:, None].roll(1)
    assert torch.equal(within_whitening(same, near), torch.eye(4))


def test_a_nuisance_that_views_differ_in_no_longer_hides_the_kinds() -> None:
    """Two kinds along the first number; the second, of large variance, is the background."""
    drawing = torch.Generator().manual_seed(0)
    kinds = torch.arange(400) % 2
    views = torch.randn((400, 2, 6), generator=drawing) * 0.3
    views[..., 0] += 2 * kinds[:, None] - 1
    views[..., 1] += 4 * torch.randn((400, 2), generator=drawing)

    def purity(rows_ND: torch.Tensor) -> float:
        found = kmeans(F.normalize(rows_ND, dim=1), 2, seed=0)[1]
        same = float((found == kinds).float().mean())
        return max(same, 1 - same)

    near = knn(views[:, 0], 10)[1]
    assert purity(views[:, 0]) < 0.7
    assert purity(views[:, 0] @ within_whitening(views, near)) > 0.97
