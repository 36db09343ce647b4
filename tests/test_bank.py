"""The bank of cached features, its files, and how runs share them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from snscc_ray.config.errors import UserError
from snscc_ray.core import distributed, rng
from snscc_ray.data.loading import bank as banks
from snscc_ray.data.loading.bank import (
    BankShape,
    bank_views,
    begin_bank,
    finish_bank,
    has_all_shards,
    identity_of,
    open_bank,
    shard_path,
    write_shard,
)
from snscc_ray.data.loading.order import shuffled
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.runs.banks import share_bank

CPU = torch.device("cpu")
SHAPE = BankShape(rows=103, views=2, width=5)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "SHARD_ROWS", 20)


def some(shape: BankShape = SHAPE, seed: int = 0) -> np.ndarray:
    drawing = np.random.default_rng(seed)
    return drawing.normal(size=(shape.rows, 1 + shape.views, shape.width)).astype(np.float16)


def write(folder: Path, features: np.ndarray, identity: str = "a") -> Path:
    shape = BankShape(len(features), features.shape[1] - 1, features.shape[2])
    begin_bank(folder, identity, shape)
    for number, (first, end) in enumerate(shape.edges()):
        write_shard(folder, number, features[first:end])
    finish_bank(folder, identity, shape)
    return folder


def flip(path: Path) -> None:
    """Flip one bit of the last number."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_the_edges_cover_all_rows_once() -> None:
    for rows in (1, 19, 20, 21, 103):
        edges = BankShape(rows, 0, 1).edges()
        assert [row for first, end in edges for row in range(first, end)] == list(range(rows))
        assert all(end - first == 20 for first, end in edges[:-1])


def test_a_bank_gives_what_was_written(tmp_path: Path) -> None:
    features = some()
    bank = open_bank(write(tmp_path / "bank", features), CPU)
    whole = torch.from_numpy(features)
    assert (len(bank), bank.views, bank.width) == (103, 2, 5)
    rows = torch.tensor([102, 0, 19, 20, 100, 20, 41])
    assert torch.equal(bank.take(rows), whole[rows])
    assert bank.take(rows[:0]).shape == (0, 3, 5)
    for first, last, size in ((0, 103, 103), (0, 103, 7), (18, 63, 20), (102, 103, 64)):
        parts = list(bank.slices(first, last, size))
        assert all(len(part) == size for part in parts[:-1])
        assert torch.equal(torch.cat(parts), whole[first:last])


@pytest.mark.parametrize("batch", [10, 25, 64])
def test_an_epoch_is_that_of_data_in_memory(batch: int, tmp_path: Path) -> None:
    """The same rows in the same batches as images in memory have, from any step on."""
    features = some()
    bank = open_bank(write(tmp_path / "bank", features), CPU)
    other = ResidentData(torch.from_numpy(features), CPU)
    assert bank.steps(batch) == other.steps(batch)
    for start in (0, 1):
        pairs = zip(bank.epoch(batch, 7, start), other.epoch(batch, 7, start), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours.rows_B, theirs.rows_B)
            assert torch.equal(ours.inputs, theirs.inputs)
            assert ours.size == theirs.size
    rows = torch.cat([held.rows_B for held in bank.epoch(batch, 7)])
    assert torch.equal(rows, shuffled(103, 7)) and sorted(rows.tolist()) == list(range(103))


@pytest.mark.parametrize("workers", [2, 3])
def test_the_shares_of_workers_are_the_batches_of_one(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = open_bank(write(tmp_path / "bank", some()), CPU)
    whole = list(bank.epoch(25, 3, viewer=lambda x, rows: (x[:, 1] + rows[:, None],)))
    monkeypatch.setattr(distributed, "world_size", lambda: workers)
    shares = []
    for rank in range(workers):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        viewer = lambda x, rows: (x[:, 1] + rows[:, None],)  # noqa: E731
        shares.append(list(bank.epoch(25, 3, viewer=viewer)))
    for one, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.rows_B for part in parts]), one.rows_B)
        assert torch.equal(torch.cat([part.inputs for part in parts]), one.inputs)
        assert one.views is not None
        views = [part.views[0] for part in parts if part.views is not None]
        assert torch.equal(torch.cat(views), one.views[0])
        assert {part.size for part in parts} == {one.size}


def test_views_are_drawn_by_key_and_row() -> None:
    rows, V = torch.arange(400), 3
    features = torch.arange(400 * 4 * 2).reshape(400, 4, 2) % 2048
    features = features.half()
    clean, one, two, again = bank_views(
        features, rows, drawn=(False, True, True, True), keys=(0, 1, 2, 1)
    )
    assert torch.equal(clean, features[:, 0].float()) and one.dtype == torch.float32
    assert torch.equal(one, again) and not torch.equal(one, two)
    which = (rng.uniform(rows, 1, 1)[:, 0] * V).long()
    assert torch.equal(one, features[rows, 1 + which].float())
    assert torch.bincount(which, minlength=V).min() > 100  # each about as often
    # A row's view does not depend on the other rows of the batch.
    some_rows = torch.tensor([399, 5, 17])
    (alone,) = bank_views(features[some_rows], some_rows, drawn=(True,), keys=(1,))
    assert torch.equal(alone, one[some_rows])


def test_a_bank_without_augmented_views_has_clean_ones() -> None:
    features = torch.rand(6, 1, 4).half()
    drawn, clean = bank_views(features, torch.arange(6), drawn=(True, False), keys=(1, 2))
    assert torch.equal(drawn, clean) and torch.equal(clean, features[:, 0].float())


# -------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    "spoil",
    [
        flip,
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b""),
        lambda path: np.save(path, np.zeros((20, 3, 4), np.float16)),
        lambda path: np.save(path, np.zeros((20, 3, 5), np.float32)),
        lambda path: np.save(path, np.zeros((19, 3, 5), np.float16)),
        lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_refused_and_then_mended(spoil: object, tmp_path: Path) -> None:
    features = some()
    folder = write(tmp_path / "bank", features)
    assert callable(spoil)
    spoil(shard_path(folder, 2))
    with pytest.raises(UserError, match=r"00002\.npy is missing or damaged: remove it") as refusal:
        open_bank(folder, CPU)
    assert "\n" not in str(refusal.value)
    assert not begin_bank(folder, "a", SHAPE)
    assert identity_of(folder) == "a" and identity_of(folder, complete=True) is None
    there = [number for number in range(6) if shard_path(folder, number).exists()]
    assert there == [0, 1, 3, 4, 5]
    write_shard(folder, 2, features[40:60])
    finish_bank(folder, "a", SHAPE)
    assert begin_bank(folder, "a", SHAPE)
    assert torch.equal(torch.cat(list(open_bank(folder, CPU).slices(0, 103, 50))),
                       torch.from_numpy(features))  # fmt: skip


def test_an_unfinished_bank_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    assert identity_of(folder) is None and not has_all_shards(folder)
    assert not begin_bank(folder, "a", SHAPE)
    write_shard(folder, 0, some()[:20])
    with pytest.raises(UserError, match="missing or damaged"):
        open_bank(folder, CPU)
    with pytest.raises(UserError, match=r"00001\.npy is missing"):
        finish_bank(folder, "a", SHAPE)
    assert identity_of(folder, complete=True) is None
    assert not begin_bank(folder, "a", SHAPE) and shard_path(folder, 0).exists()


def test_shards_of_another_bank_and_leftovers_are_removed(tmp_path: Path) -> None:
    folder = write(tmp_path / "bank", some())
    left = folder / ".00003.npy.abcd1234"
    left.write_bytes(b"half")
    assert begin_bank(folder, "a", SHAPE) and has_all_shards(folder)
    assert not left.exists() and shard_path(folder, 3).exists()
    assert not begin_bank(folder, "b", SHAPE) and not has_all_shards(folder)
    assert [path.name for path in folder.iterdir()] == ["bank.json"]


@pytest.mark.parametrize("held", ["", "[]", "{}", '{"identity": "a"}', "\x00"])
def test_a_damaged_list_of_shards_is_no_bank(held: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "bank", some())
    (folder / "bank.json").write_text(held)
    assert identity_of(folder, complete=True) is None
    with pytest.raises(UserError, match=r"bank\.json is missing or damaged"):
        open_bank(folder, CPU)
    assert not begin_bank(folder, "b", SHAPE)


# ------------------------------------------------------------------------- runs beside one another


def in_run(place: Path, name: str) -> Path:
    return place / name / "pretrain" / "bank"


def test_a_run_shares_the_files_of_its_neighbour(tmp_path: Path) -> None:
    first, second = in_run(tmp_path, "first"), in_run(tmp_path, "second")
    write(first, some())
    assert share_bank(second, "b", tmp_path) is None and not second.exists()
    assert share_bank(second, "a", tmp_path) == tmp_path / "first"
    for path in first.iterdir():
        assert path.samefile(second / path.name)
    assert share_bank(second, "a", tmp_path) is None  # it is there already
    for path in first.iterdir():
        path.unlink()
    assert len(open_bank(second, CPU)) == 103


def test_a_change_of_one_run_does_not_reach_the_other(tmp_path: Path) -> None:
    first, second = in_run(tmp_path, "first"), in_run(tmp_path, "second")
    write(first, some())
    share_bank(second, "a", tmp_path)
    write(second, some(seed=1), "b")
    assert torch.equal(open_bank(first, CPU).take(torch.arange(103)), torch.from_numpy(some()))
    assert identity_of(first) == "a" and identity_of(second) == "b"


def test_a_damaged_bank_of_a_neighbour_is_not_taken(tmp_path: Path) -> None:
    second = in_run(tmp_path, "second")
    flip(shard_path(write(in_run(tmp_path, "bad1"), some()), 4))
    shard_path(write(in_run(tmp_path, "bad2"), some()), 0).unlink()
    unfinished = write(in_run(tmp_path, "bad3"), some()) / "bank.json"
    unfinished.write_text(json.dumps(json.loads(unfinished.read_text()) | {"checksums": []}))
    (write(in_run(tmp_path, "bad4"), some()) / "bank.json").write_text("{")
    assert share_bank(second, "a", tmp_path) is None
    assert not second.exists()
    write(in_run(tmp_path, "good"), some())
    assert share_bank(second, "a", tmp_path) == tmp_path / "good"


def test_without_hard_links_the_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    first, second = write(in_run(tmp_path, "first"), some()), in_run(tmp_path, "second")
    assert share_bank(second, "a", tmp_path) == tmp_path / "first"
    assert not shard_path(first, 0).samefile(shard_path(second, 0))
    assert len(open_bank(second, CPU)) == 103
