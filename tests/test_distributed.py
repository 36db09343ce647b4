from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from snscc_ray.core import distributed
from snscc_ray.core.clustering import mining
from tests.conftest import TINY, equal_states
from tests.two_processes import miner, one_step, process, resumed

UNEVEN = ["data.limit=97"]  # batches of 24 and 25: the last does not divide among 2 or 3
CASES = [
    ("pretrain", [], 2),
    ("pretrain", UNEVEN, 3),
    ("pretrain", ["pretrain.method=moco", "pretrain.queue_size=48"], 2),
    ("pretrain", ["pretrain.method=moco", "pretrain.queue_size=48", *UNEVEN], 2),
    ("pretrain", ["pretrain.method=byol", *UNEVEN], 2),
    ("train", [], 2),
    ("train", UNEVEN, 3),
    ("train", ["train.objective=paper", "train.head=linear"], 2),
    ("train", ["train.objective=released", "train.agreement=log"], 2),
    ("boost", ["boost.confidence_threshold=0.1"], 2),
    ("boost", ["boost.confidence_threshold=0.1", *UNEVEN], 3),
    ("boost", ["boost.selection=batch", "boost.confidence_threshold=0.1"], 2),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Where a case's step by a rank is; one group of processes makes all cases of its size."""

    @functools.cache
    def made(processes: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{processes}-processes")
        cases = {
            n: (stage, more) for n, (stage, more, size) in enumerate(CASES) if size == processes
        }
        mp.spawn(process, (processes, str(folder), cases), nprocs=processes)
        return folder

    return lambda number, rank: made(CASES[number][2]) / f"case{number}-rank{rank}.pt"


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join([c[0], *c[1]]) for c in CASES])
def test_several_processes_have_the_gradients_of_one(
    number: int, steps: Callable[[int, int], Path]
) -> None:
    stage, overrides, processes = CASES[number]
    one = one_step(stage, overrides)
    assert len(one["gradients"]) > 5
    assert any(float(g.abs().max()) > 1e-3 for g in one["gradients"].values())
    for rank in range(processes):
        two = torch.load(steps(number, rank), weights_only=False)
        for name, term in one["terms"].items():
            torch.testing.assert_close(two["terms"][name], term, rtol=0, atol=1e-9)
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-6)
        for name, value in one["buffers"].items():
            torch.testing.assert_close(two["buffers"][name], value, rtol=0, atol=1e-9)
        if "queue" in one["extra"]:
            torch.testing.assert_close(two["extra"]["queue"], one["extra"]["queue"])
        for name, value in one["extra"].get("target", {}).items():
            torch.testing.assert_close(two["extra"]["target"][name], value, rtol=0, atol=1e-9)


def test_a_resumed_run_of_four_processes_sums_in_the_same_order(tmp_path: Path) -> None:
    """Two numbers have one sum, four may have several: the order must not change after a start."""
    mp.spawn(resumed, (4, str(tmp_path)), nprocs=4)
    whole, *others = torch.load(tmp_path / "weights-rank0.pt")
    for other in others:
        assert equal_states(other, whole)


def test_several_processes_mine_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    centres_CD = torch.randn(9, 16, generator=generator)
    drawn = torch.randint(9, (3001,), generator=generator)
    rows_ND = centres_CD[drawn] + torch.randn(3001, 16, generator=generator) / 4
    monkeypatch.setattr(mining, "_EXACT_ROWS", 100)
    one = astuple(mining.mine(rows_ND, 5))
    assert 0.95 < one[3] < 1  # by cells
    mp.spawn(miner, (3, str(tmp_path), rows_ND), nprocs=3)
    for rank in range(3):
        own = torch.load(tmp_path / f"mined-rank{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(own[:3], one[:3], strict=True))
        assert own[3] == one[3]


def test_shares_cover_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.share_of(7) == [7]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert distributed.share_of(7) == [3, 2, 2]
    assert distributed.share_of(2) == [1, 1, 0]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.own_share(7) == (3, 5)


def test_a_run_under_torchrun_is_the_run_of_one(tmp_path: Path) -> None:
    settings = [x for field in TINY for x in ("--set", field)]
    run = ["-m", "snscc_ray", "run", "digits", "--stages", "pretrain,train", *settings]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    lines = {}
    for name, before in (("one", []), ("two", torchrun)):
        folder = tmp_path / name
        command = [sys.executable, *before, *run, "--out", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = (folder / "metrics.jsonl").read_text().splitlines()
        lines[name] = [json.loads(line) for line in text]
    assert len(lines["one"]) == len(lines["two"])
    for one, two in zip(lines["one"], lines["two"], strict=True):
        assert (one["stage"], one["epoch"]) == (two["stage"], two["epoch"])
        # Later epochs drift as float32 rounds differently; float64 is exact (see above).
        if one["epoch"] == 0:
            assert two["loss/total"] == pytest.approx(one["loss/total"], abs=2e-3)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        "-m", "snscc_ray", "run", "digits", "--out", str(tmp_path / "x"), "--set",
        "train.batch_size=33",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "train.batch_size=33 is global and cannot be split evenly among 2 workers" in done.stderr
    assert not (tmp_path / "x").exists()
