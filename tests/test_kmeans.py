"""k-means: as good as scikit-learn's, and the same for any number of threads."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor

from snscc_ray.core.clustering import kmeans as module
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.metrics import oracle


def inertia(rows_ND: Tensor, centres_CD: Tensor) -> float:
    return float(torch.cdist(rows_ND.double(), centres_CD.double()).min(1).values.square().sum())


@pytest.mark.parametrize("clusters", [2, 10, 37])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_good_as_scikit_learn(clusters: int, seed: int) -> None:
    rows_ND = torch.from_numpy(load_digits().data).float()
    centres_CD, assignment_N = kmeans(rows_ND, clusters, seed, starts=10)
    theirs = KMeans(clusters, n_init=10, random_state=seed).fit(rows_ND.numpy())
    assert inertia(rows_ND, centres_CD) <= 1.01 * theirs.inertia_
    nearest_N = torch.cdist(rows_ND, centres_CD).argmin(1)
    assert (nearest_N == assignment_N).float().mean() > 0.999
    assert len(assignment_N.unique()) == clusters


def test_far_apart_groups_are_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(500) % 7
    rows_ND = 1000 + 100 * torch.eye(7, 12)[labels_N] + torch.randn(500, 12, generator=generator)
    assert oracle(labels_N, kmeans(rows_ND, 7, 3, starts=2)[1])["oracle/acc"] == 1


def test_the_same_seed_gives_the_same_bits_in_any_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_ND = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    first, again = kmeans(rows_ND, 6, 5, starts=3), kmeans(rows_ND, 6, 5, starts=3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    monkeypatch.setattr(module, "_TILE", {"cpu": 6 * 3 * 64})
    tiled = kmeans(rows_ND, 6, 5, starts=3)
    torch.testing.assert_close(tiled[0], first[0])
    assert torch.equal(tiled[1], first[1])
    other = kmeans(rows_ND, 6, 6, starts=1)
    assert not torch.equal(other[0], first[0])


def test_equal_rows_and_as_many_clusters_as_rows() -> None:
    rows_ND = torch.tensor([[0.0, 0], [0, 0], [0, 0], [5, 5]])
    centres_CD, assignment_N = kmeans(rows_ND, 3, 0, starts=2)
    assert centres_CD.isfinite().all() and inertia(rows_ND, centres_CD) == 0
    assert assignment_N[0] == assignment_N[1] == assignment_N[2] != assignment_N[3]
    distinct_ND = torch.arange(12.0).view(6, 2)
    assert len(kmeans(distinct_ND, 6, 0, starts=2)[1].unique()) == 6


def test_any_number_of_threads_gives_the_same_bits() -> None:
    rows_ND = torch.randn(40_000, 9, generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kmeans(rows_ND, 30, 1))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for centres_CD, assignment_N in found[1:]:
        assert torch.equal(centres_CD, found[0][0]) and torch.equal(assignment_N, found[0][1])


@pytest.mark.parametrize(("rows", "clusters", "starts"), [(60_000, 10, 10), (40_000, 300, 1)])
def test_many_rows_and_many_clusters_are_as_good_as_scikit_learns(
    rows: int, clusters: int, starts: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    centres_CD = torch.randn(2 * clusters, 8, generator=generator)
    drawn = torch.randint(len(centres_CD), (rows,), generator=generator)
    rows_ND = centres_CD[drawn] + torch.randn(rows, 8, generator=generator) / 2
    found_CD, assignment_N = kmeans(rows_ND, clusters, 0, starts)
    theirs = KMeans(clusters, n_init=starts, random_state=0).fit(rows_ND.numpy())
    assert inertia(rows_ND, found_CD) <= 1.02 * theirs.inertia_
    assert torch.equal(torch.cdist(rows_ND.double(), found_CD.double()).argmin(1), assignment_N)


def test_one_row_far_away_does_not_blur_the_others() -> None:
    rows_ND = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    for outlier in (1e4, 1e6, 1e10):
        rows_ND[3] = outlier
        centres_CD, assignment_N = kmeans(rows_ND, 5, 0)
        nearest_N = torch.cdist(rows_ND.double(), centres_CD.double()).argmin(1)
        assert (nearest_N == assignment_N).double().mean() > 0.998, outlier


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e25])
def test_any_scale_gives_the_same_clusters(scale: float) -> None:
    rows_ND = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    expected = kmeans(rows_ND.double(), 7, 0)[1]
    found = kmeans(rows_ND.double() * scale, 7, 0)[1]
    assert oracle(expected, found)["oracle/acc"] > 0.99


def test_what_cannot_be_clustered_is_refused() -> None:
    rows_ND = torch.ones(9, 2)
    for rows, clusters in ((rows_ND[:0], 3), (rows_ND, 0)):
        with pytest.raises(ValueError, match="cannot be put into"):
            kmeans(rows, clusters, 0)
    for value in (float("nan"), float("inf")):
        rows_ND[4, 1] = value
        with pytest.raises(ValueError, match="NaN or an infinity"):
            kmeans(rows_ND, 3, 0)


@pytest.mark.parametrize(("rows", "clusters"), [(40_000, 5), (2000, 1), (2000, 300), (600, 257)])
def test_progress_ends_at_the_total(rows: int, clusters: int) -> None:
    told: list[tuple[int, int]] = []
    rows_ND = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    kmeans(rows_ND, clusters, 0, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1] and len(told) >= 2


def test_a_cluster_that_lost_its_rows_takes_the_farthest_row() -> None:
    rows_ND = torch.tensor([[0.0], [1], [2], [30]])
    centres_SCD = torch.tensor([[[1.0], [-50]]])
    means_SCD, _, _ = module._step(
        rows_ND, rows_ND.square().sum(1), centres_SCD, map, lambda share: None
    )
    assert means_SCD.flatten().tolist() == [8.25, 30]
