"""Searches against brute force in NumPy, whichever backend; and the mined file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.core.clustering import mining, neighbors
from snscc_ray.core.clustering.mining import MinedNeighbors, mine
from snscc_ray.core.clustering.neighbors import (
    batch_neighbors,
    global_radius,
    knn,
    local_radius,
    pairwise_distances,
)
from snscc_ray.core.losses import soft_confidence
from tests import reference

BACKENDS = ["torch", "faiss"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_duplicates(N: int, D: int) -> Tensor:
    z = torch.nn.functional.normalize(rows(N, D))
    z[N // 2 : N // 2 + 5] = z[1]
    z[-1] = z[0]
    return z


def brute_force(ref: Tensor, queries: Tensor | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All distances in float64, self excluded by its index, ties to the lower index."""
    a = (ref if queries is None else queries).double().numpy()
    d = np.sqrt(((a[:, None] - ref.double().numpy()) ** 2).sum(axis=2))
    if queries is None:
        np.fill_diagonal(d, np.inf)
    idx = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d, idx, axis=1), idx


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_knn_is_brute_force(backend: str, chunk: int | None) -> None:
    z = with_duplicates(150, 8)
    d, idx = knn(z, 10, backend=backend, chunk=chunk)
    expected_d, expected_idx = brute_force(z, None, 10)
    assert d.dtype == torch.float32 and idx.dtype == torch.int64
    np.testing.assert_allclose(d, expected_d, atol=1e-6)
    np.testing.assert_array_equal(idx, expected_idx)
    assert not (idx == torch.arange(150)[:, None]).any()
    assert (d[1, :5] == 0).all() and idx[1, :5].tolist() == [75, 76, 77, 78, 79]


@pytest.mark.parametrize("backend", BACKENDS)
def test_knn_of_queries_may_find_themselves(backend: str) -> None:
    z, queries = with_duplicates(150, 8), with_duplicates(150, 8)[40:63]
    d, idx = knn(z, 4, queries=queries, backend=backend, chunk=10)
    expected_d, expected_idx = brute_force(z, queries, 4)
    np.testing.assert_allclose(d, expected_d, atol=1e-6)
    np.testing.assert_array_equal(idx, expected_idx)
    assert (d[:, 0] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_knn_of_many_rows_by_groups(backend: str) -> None:
    """Enough rows that the search goes by groups of columns; 4,003 is no multiple of a group."""
    z = rows(4003, 16)
    queries = torch.cat([z[:20], z[-20:], rows(20, 16, seed=1)])
    d, idx = knn(z, 20, queries=queries, backend=backend)
    expected_d, expected_idx = brute_force(z, queries, 20)
    np.testing.assert_allclose(d, expected_d, atol=1e-5)
    np.testing.assert_array_equal(idx, expected_idx)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_knn_far_from_the_origin(backend: str) -> None:
    """A product of raw rows would lose the distances in the rounding of the squares."""
    z = (1000 + rows(300, 8).double()).float()
    d, idx = knn(z, 5, backend=backend)
    expected_d, expected_idx = brute_force(z, None, 5)
    np.testing.assert_allclose(d, expected_d, rtol=1e-5)
    np.testing.assert_array_equal(idx, expected_idx)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_a_set_of_duplicates(backend: str) -> None:
    z = torch.ones(50, 4)
    d, idx = knn(z, 20, backend=backend)
    assert (d == 0).all()
    assert not (idx == torch.arange(50)[:, None]).any()
    assert all(len(set(row)) == 20 for row in idx.tolist())


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_knn_wants_enough_rows(backend: str) -> None:
    z = rows(4, 3)
    assert knn(z, 3, backend=backend)[1].sort().values[0].tolist() == [1, 2, 3]
    assert knn(z, 4, queries=z, backend=backend)[1].shape == (4, 4)
    assert knn(z, 4, queries=z[:0], backend=backend)[1].shape == (0, 4)
    for k, queries in ((4, None), (5, z), (0, None)):
        with pytest.raises(ValueError):
            knn(z, k, queries=queries, backend=backend)
    with pytest.raises(ValueError, match="3 neighbours asked for, but a row has 1 other"):
        mine(rows(2, 3), 3)


@pytest.mark.parametrize("spread", [1e-3, 3e-4, 1e-5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_closer_than_the_rounding_of_a_product(spread: float, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    centres_CD = torch.nn.functional.normalize(torch.randn(8, 64, generator=generator), dim=1)
    rows_ND = centres_CD[torch.arange(800) % 8] + spread * torch.randn(800, 64, generator=generator)
    rows_ND = torch.nn.functional.normalize(rows_ND, dim=1)
    d_NK, idx_NK = knn(rows_ND, 10, backend=backend)
    exact_NN = torch.cdist(rows_ND.double(), rows_ND.double())
    exact_NN.fill_diagonal_(torch.inf)
    expected_NK = exact_NN.sort(dim=1).values[:, :10]
    torch.testing.assert_close(exact_NN.gather(1, idx_NK), expected_NK, rtol=1e-4, atol=0)
    torch.testing.assert_close(d_NK.double(), expected_NK, rtol=1e-4, atol=0)


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    z = rows(60, 5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert knn(z, 6)[1].shape == (60, 6)
    with pytest.raises(ImportError):
        knn(z, 6, backend="faiss")


def test_faiss_is_not_imported_with_the_package() -> None:
    code = "import sys, snscc_ray.core.clustering.neighbors; sys.exit('faiss' in sys.modules)"
    root = Path(neighbors.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99),
    st.sampled_from(["torch", "faiss"]),
)  # fmt: skip
def test_knn_on_a_grid_full_of_ties(N: int, D: int, k: int, seed: int, backend: str) -> None:
    k = min(k, N - 1)
    z = torch.randint(3, (N, D), generator=torch.Generator().manual_seed(seed)).float()
    d, idx = knn(z, k, backend=backend, chunk=9)
    np.testing.assert_allclose(d, brute_force(z, None, k)[0], atol=1e-6)
    torch.testing.assert_close(d, (z[idx] - z[:, None]).norm(dim=2))
    assert all(len(set(row)) == k and i not in row for i, row in enumerate(idx.tolist()))


def test_pairwise_distances_and_radii() -> None:
    z, zaug = with_duplicates(40, 16), with_duplicates(40, 16) + 0.1 * rows(40, 16, seed=1)
    zaug[3] = z[3]
    d = pairwise_distances(z, zaug)
    for i in (0, 3, 39):
        for j in (0, 3, 20):
            expected = reference.distance(z[i], zaug[j])
            assert d[i, j].item() == pytest.approx(expected, abs=1e-6)
    assert d[3, 3] == 0
    assert (pairwise_distances(z, z).diagonal() == 0).all()
    radius = global_radius(z, zaug)
    torch.testing.assert_close(radius, d.diagonal())
    assert radius[3] == 0
    nearest, _ = batch_neighbors(z, z, 3, same_rows=True)
    assert torch.equal(local_radius(nearest), nearest[:, 0])
    assert local_radius(torch.empty(2, 0)).tolist() == [torch.inf] * 2


@pytest.mark.parametrize("same_rows", [True, False])
@pytest.mark.parametrize(("B", "M", "k"), [(1, 1, 1), (2, 2, 5), (9, 9, 4), (30, 30, 29)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_neighbors(B: int, M: int, k: int, same_rows: bool, dtype: torch.dtype) -> None:
    z = with_duplicates(max(B, 12), 4)[-B:].to(dtype).requires_grad_()
    ref = z if same_rows else rows(M, 4, seed=2).to(dtype)
    d, idx = batch_neighbors(z, ref, k, same_rows=same_rows)
    assert d.shape == idx.shape == (B, min(k, M - same_rows))
    assert d.dtype == dtype and not d.requires_grad
    for i, pairs in enumerate(reference.nearest(z.double(), ref.double(), k, same_rows)):
        assert idx[i].tolist() == [j for _, j in pairs]
        assert d[i].tolist() == pytest.approx([distance for distance, _ in pairs], abs=1e-6)


def test_batch_neighbors_among_other_rows() -> None:
    z, ref = rows(5, 3), rows(17, 3, seed=1)
    d, idx = batch_neighbors(z, ref, 6, same_rows=False)
    expected_d, expected_idx = brute_force(ref, z, 6)
    np.testing.assert_allclose(d, expected_d, atol=1e-6)
    np.testing.assert_array_equal(idx, expected_idx)
    assert batch_neighbors(z[:0], ref, 6, same_rows=False)[0].shape == (0, 6)
    assert batch_neighbors(z, ref[:0], 6, same_rows=False)[0].shape == (5, 0)
    with pytest.raises(ValueError, match="5 and 17"):
        batch_neighbors(z, ref, 6, same_rows=True)
    with pytest.raises(ValueError, match="at least 1"):
        batch_neighbors(z, ref, 0, same_rows=False)


def test_batch_neighbors_that_are_allowed() -> None:
    z = with_duplicates(20, 4)
    allowed = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    allowed[4] = False
    d, idx = batch_neighbors(z, z, 6, same_rows=True, allowed_BM=allowed)
    for i, pairs in enumerate(reference.nearest(z.double(), z.double(), 6, True, allowed)):
        found = len(pairs)
        assert idx[i, :found].tolist() == [j for _, j in pairs]
        assert d[i, :found].isfinite().all() and torch.isposinf(d[i, found:]).all()
    assert ((idx >= 0) & (idx < 20)).all()
    s = soft_confidence(d, local_radius(d))
    assert (s[torch.isposinf(d)] == 0).all() and s.isfinite().all()


def test_near_duplicates_have_their_own_distances() -> None:
    """2 - 2cos in float32 cannot tell 0 from 3e-4; Eq. 2's radius depends on it."""
    z = torch.nn.functional.normalize(rows(8, 64))
    z[1] = z[0]
    z[2] = z[0] + 1e-5 * torch.nn.functional.normalize(rows(1, 64, seed=5))[0]
    d, idx = batch_neighbors(z, z, 2, same_rows=True)
    assert d[0, 0] == 0 and idx[0].tolist() == [1, 2]
    assert d[0, 1].item() == pytest.approx(1e-5, rel=0.05)
    assert soft_confidence(d, local_radius(d))[0].tolist() == [1, 0]


def test_autocast_does_not_round_the_search() -> None:
    z = rows(64, 16)
    expected = batch_neighbors(z, z, 5, same_rows=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d, idx = batch_neighbors(z, z, 5, same_rows=True)
        mined_idx = knn(z, 5, backend="torch")[1]
    assert torch.equal(d, expected[0]) and torch.equal(idx, expected[1])
    assert torch.equal(mined_idx, expected[1])


def test_a_broken_feature_is_not_hidden() -> None:
    z = rows(6, 3)
    z[2] = torch.nan
    d, _ = batch_neighbors(z, z, 3, same_rows=True)
    assert d[2].isnan().any()
    for backend in ("torch", "faiss"):
        with pytest.raises(ValueError, match="NaN"):
            knn(z, 3, backend=backend)


def test_mine_and_the_file(tmp_path: Path) -> None:
    z = with_duplicates(90, 6)
    mined = mine(z.requires_grad_(), 7)
    d, idx = knn(z, 7)
    assert torch.equal(mined.neighbors_NK, idx.int()) and torch.equal(mined.distances_NK, d)
    for i in range(90):
        expected = [reference.eq2(x, d[i, 0].item()) for x in d[i].tolist()]
        assert mined.confidence_NK[i].tolist() == pytest.approx(expected, abs=1e-5)
    path = tmp_path / "new" / "mined.parquet"
    mined.save(path)
    again = MinedNeighbors.load(path)
    for name in ("neighbors_NK", "distances_NK", "confidence_NK"):
        before, after = getattr(mined, name), getattr(again, name)
        assert after.dtype == before.dtype and torch.equal(after, before)
    assert [p.name for p in path.parent.iterdir()] == ["mined.parquet"]
    table = pq.ParquetFile(path).read()
    assert table.column_names == ["row", "neighbors", "distances", "confidence"]
    assert table["row"].to_pylist() == list(range(90))
    assert table["neighbors"].to_pylist()[3] == mined.neighbors_NK[3].tolist()


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mined.parquet"
    with pytest.raises(UserError, match="no mined neighbours at"):
        MinedNeighbors.load(path)
    mine(rows(50, 4), 3).save(path)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            MinedNeighbors.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(whole)
    good = pq.ParquetFile(path).read()
    for table in (
        pa.table({"row": [1]}),
        good.drop_columns("confidence"),
        good.set_column(1, "neighbors", good["neighbors"].cast(pa.list_(pa.int64(), 3))),
        good.set_column(2, "distances", pa.array([[1.0, 2.0]] * 50, pa.list_(pa.float32(), 2))),
    ):
        pq.write_table(table, path)
        with pytest.raises(UserError, match="does not hold mined neighbours"):
            MinedNeighbors.load(path)


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mined.parquet"
    old = mine(rows(50, 4), 3)
    old.save(path)

    def half(table: pa.Table, file: object, **how: object) -> None:
        file.write(b"PAR1 and then the power went")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(mining.pq, "write_table", half)
    with pytest.raises(KeyboardInterrupt):
        mine(rows(50, 4, seed=1), 3).save(path)
    assert torch.equal(MinedNeighbors.load(path).neighbors_NK, old.neighbors_NK)
    assert [p.name for p in tmp_path.iterdir()] == ["mined.parquet"]
