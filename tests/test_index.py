"""The index of a run's images: recall as said, exact distances, and one answer per row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snscc_ray.core.clustering.index import make_index, query
from snscc_ray.core.clustering.neighbors import knn


def surface(rows: int, seed: int = 0) -> Tensor:
    """Rows near a curved surface of 5 dimensions, in 32."""
    map_generator = torch.Generator().manual_seed(99)
    generator = torch.Generator().manual_seed(seed)
    flat_ND = torch.randn(rows, 5, generator=generator)
    return (flat_ND @ torch.randn(5, 32, generator=map_generator)).sin()


def test_it_finds_the_share_that_it_says_and_distances_are_exact() -> None:
    rows_ND, new_QD = surface(20_000), surface(3000, seed=1)
    index = make_index(rows_ND, 10)
    d_QK, idx_QK = query(index, rows_ND, new_QD, 10)
    true_d_QK, true_QK = knn(rows_ND, 10, queries=new_QD)
    recall = float((idx_QK[:, :, None] == true_QK[:, None]).any(2).double().mean())
    assert recall == pytest.approx(index.recall, abs=0.015) and 0.97 < index.recall < 1
    assert index.share < 0.5
    torch.testing.assert_close(d_QK, (new_QD[:, None] - rows_ND[idx_QK]).norm(dim=2))
    assert (d_QK.diff(dim=1) >= 0).all() and (d_QK >= true_d_QK).all()


def test_all_cells_find_what_an_exact_search_finds() -> None:
    rows_ND, new_QD = surface(5000), surface(700, seed=1)
    index = make_index(rows_ND, 5)
    whole = replace(index, searched=len(index.centres_CD))
    found, expected = query(whole, rows_ND, new_QD, 5), knn(rows_ND, 5, queries=new_QD)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])


def test_an_answer_does_not_depend_on_the_other_rows_nor_on_threads() -> None:
    rows_ND, new_QD, threads = surface(6000), surface(300, seed=1), torch.get_num_threads()
    index = make_index(rows_ND, 4)
    together = query(index, rows_ND, new_QD, 4)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        alone = [query(index, rows_ND, row_D[None], 4) for row_D in new_QD]
    finally:
        torch.set_num_threads(threads)
    for place in (0, 1):
        assert torch.equal(torch.cat([one[place] for one in alone]), together[place])


def test_a_row_of_the_dataset_finds_itself_and_its_copies_first() -> None:
    rows_ND = surface(3000)
    rows_ND[100:104] = rows_ND[7]
    d_QK, idx_QK = query(make_index(rows_ND, 5), rows_ND, rows_ND[7:8], 5)
    assert idx_QK[0].tolist() == [7, 100, 101, 102, 103] and (d_QK == 0).all()


def test_cells_with_too_few_rows_are_no_limit() -> None:
    rows_ND = surface(2000)
    rows_ND[-2:] = torch.tensor([[1e3], [-1e3]])  # cells with a single row
    index = replace(make_index(rows_ND, 3), searched=1)
    d_QK, idx_QK = query(index, rows_ND, torch.full((1, 32), 999.0), 3)
    assert idx_QK[0, 0] == 1998 and len(set(idx_QK[0].tolist())) == 3 and d_QK.isfinite().all()


def test_equal_rows_are_indexed() -> None:
    rows_ND = torch.ones(3000, 8)
    d_QK, idx_QK = query(make_index(rows_ND, 3), rows_ND, torch.zeros(2, 8), 3)
    assert (d_QK - 8**0.5).abs().max() < 1e-5 and len(set(idx_QK[0].tolist())) == 3
