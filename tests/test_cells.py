"""Approximate neighbours: recall as said, exact distances, and the same for any share of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snscc_ray.core.clustering import mining
from snscc_ray.core.clustering.cells import Cells, make_cells, search_cells
from snscc_ray.core.clustering.mining import mine
from snscc_ray.core.clustering.neighbors import knn


def groups(rows: int, dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres_CD = torch.randn(40, dim, generator=generator)
    drawn = torch.randint(40, (rows,), generator=generator)
    return centres_CD[drawn] + torch.randn(rows, dim, generator=generator) / 3


def searched(rows_ND: Tensor, cells: Cells, k: int) -> tuple[Tensor, Tensor]:
    """`search_cells`, in the order of the rows."""
    place_N = cells.row_N.argsort()
    d_NK, idx_NK = search_cells(rows_ND, cells, k)
    return d_NK[place_N], idx_NK[place_N]


def recall(idx_NK: Tensor, true_NK: Tensor) -> float:
    same = (idx_NK[:, :, None] == true_NK[:, None]).any(2)
    return float(same.double().mean())


def test_recall_is_what_it_says_and_distances_are_exact() -> None:
    rows_ND = torch.randn(12_000, 5, generator=torch.Generator().manual_seed(0))
    cells = make_cells(rows_ND, 10)
    d_NK, idx_NK = searched(rows_ND, cells, 10)
    true_d_NK, true_NK = knn(rows_ND, 10)
    assert recall(idx_NK, true_NK) == pytest.approx(cells.recall, abs=0.01)
    assert 0.95 <= cells.recall < 1 and cells.share < 0.5
    own_NK = (rows_ND[:, None] - rows_ND[idx_NK]).norm(dim=2)
    torch.testing.assert_close(d_NK, own_NK)
    assert (d_NK.diff(dim=1) >= 0).all() and (d_NK >= true_d_NK).all()
    assert not (idx_NK == torch.arange(len(rows_ND))[:, None]).any()


def test_all_cells_find_what_an_exact_search_finds() -> None:
    rows_ND = groups(3000)
    cells = make_cells(rows_ND, 7)
    whole = replace(cells, chosen=len(cells.centres_CD))
    found, expected = searched(rows_ND, whole, 7), knn(rows_ND, 7)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])


def test_shares_of_the_rows_make_the_whole() -> None:
    rows_ND = groups(5000)
    cells = make_cells(rows_ND, 5)
    parts = [search_cells(rows_ND, cells, 5, share) for share in ((0, 1700), (1700, 5000))]
    whole = search_cells(rows_ND, cells, 5)
    for place in (0, 1):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole[place])


def test_any_number_of_threads_gives_the_same() -> None:
    rows_ND, threads = groups(5000), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(search_cells(rows_ND, make_cells(rows_ND, 5), 5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_recall_is_right_where_the_rows_have_a_period() -> None:
    generator = torch.Generator().manual_seed(0)
    flat_ND = (
        0.1 * torch.randn(11_000, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    )
    full_ND = 0.5 * torch.randn(11_000, 16, generator=generator)
    every_tenth_N = torch.arange(11_000) % 10 == 0
    rows_ND = torch.where(every_tenth_N[:, None], flat_ND, full_ND)
    cells = make_cells(rows_ND, 5)
    _, idx_NK = searched(rows_ND, cells, 5)
    assert recall(idx_NK, knn(rows_ND, 5)[1]) == pytest.approx(cells.recall, abs=0.015)


def test_rows_closer_than_the_rounding_of_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_ND = groups(40, 64)[torch.arange(4000) % 40]
    rows_ND = rows_ND + 1e-4 * torch.randn(4000, 64, generator=generator)
    _, idx_NK = searched(rows_ND, make_cells(rows_ND, 6), 6)
    exact_NN = torch.cdist(rows_ND.double(), rows_ND.double()).fill_diagonal_(torch.inf)
    expected_NK = exact_NN.sort(dim=1).values[:, :6]
    found_NK = exact_NN.gather(1, idx_NK)
    assert ((found_NK / expected_NK - 1).abs() < 1e-3).double().mean() > 0.95


def test_equal_rows_and_rows_far_from_all_others() -> None:
    rows_ND = groups(2000)
    rows_ND[:900] = rows_ND[0]  # one cell with far more rows than others, others empty
    rows_ND[-3:] = torch.tensor([[1e3], [-1e3], [2e3]])  # cells with a single row
    cells = make_cells(rows_ND, 12)
    d_NK, idx_NK = searched(rows_ND, cells, 12)
    assert (d_NK[:900] == 0).all() and (idx_NK[:900] < 900).all()
    assert d_NK.isfinite().all() and (idx_NK >= 0).all()
    assert all(len(row.unique()) == 12 for row in idx_NK)


def test_mining_many_rows_says_how_much_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_ND = groups(4000)
    exact = mine(rows_ND, 6)
    assert exact.recall == 1
    monkeypatch.setattr(mining, "_EXACT_ROWS", 3000)
    told: dict[str, list[tuple[int, int]]] = {"cells": [], "neighbours": []}

    def count(task: str, done: int, total: int, unit: str = "rows") -> None:
        told[task].append((done, total))

    found = mine(rows_ND, 6, count)
    assert 0.95 <= found.recall <= 1
    assert recall(found.neighbors_NK, exact.neighbors_NK) == pytest.approx(found.recall, abs=0.02)
    for task, total in (("cells", 100), ("neighbours", 4000)):
        assert told[task][-1] == (total, total) and told[task] == sorted(told[task])
        assert len(told[task]) > 10
    with pytest.raises(ValueError, match="at least 1"):
        mine(rows_ND, 0)


def test_rows_whose_neighbours_are_everywhere_are_searched_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows_ND = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(mining, "_EXACT_ROWS", 3000)
    found = mine(rows_ND, 6)
    assert found.recall == 1 and torch.equal(found.neighbors_NK.long(), knn(rows_ND, 6)[1])
