"""Runs under Ray Train against the run in one process, as a person starts them; and refusals."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from snscc_ray.config.settings import STAGES
from tests.conftest import digits_table
from tests.ray_tools import (
    FEW_CHECKPOINTS,
    Cluster,
    assert_same_run,
    free_port,
    lines,
    own_ray,
    refused,
    sets,
)
from tests.test_cli import PHOTOS, Snscc
from tests.test_cli import refused as refused_here

SNSCC = [sys.executable, "-m", "snscc_ray"]
DIGITS = ["run", "digits", *sets(*FEW_CHECKPOINTS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe in one process (`local`), and under Ray with one and with two workers."""
    folder = tmp_path_factory.mktemp("launch")
    with own_ray() as first, own_ray() as second:
        running = [
            first.snscc(*DIGITS, "--out", folder / "local"),
            first.snscc(*DIGITS, "--out", folder / "one", "--workers", 1, "--cpus-per-worker", 1),
            second.snscc(
                *DIGITS, "--out", folder / "two", "--workers", 2, "--cpus-per-worker", 0.5
            ),
        ]
        for command in running:
            said = command.wait()
            assert "Run folder" in said.out and said.err == "", said.said()
    return folder


def test_one_worker_under_ray_equals_the_run_in_one_process(runs: Path) -> None:
    assert_same_run(runs / "one", runs / "local")


def agree(folder: Path, other: Path) -> None:
    """The losses of the first two epochs of each stage to 1e-5, and all the assignments.

    The sums are float32 and taken in another order, which training then magnifies.
    """
    ours, theirs = lines(folder), lines(other)
    places = [(line["stage"], line["epoch"]) for line in ours]
    assert places == [(stage, epoch) for stage in STAGES for epoch in range(3)]
    assert places == [(line["stage"], line["epoch"]) for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        losses = {name: value for name, value in one.items() if name.startswith("loss/")}
        assert "loss/total" in losses
        if one["epoch"] < 2:
            found = {name: two[name] for name in losses}
            assert found == pytest.approx(losses, rel=0, abs=1e-5), (one["stage"], one["epoch"])
    answers = [pq.read_table(place / "assignments.parquet") for place in (folder, other)]
    for column in ("id", "cluster", "label"):
        assert answers[0][column].equals(answers[1][column]), column


def test_two_workers_equal_one(runs: Path) -> None:
    agree(runs / "two", runs / "one")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_shards_under_ray_equal_the_run_in_one_process(mode: str, tmp_path: Path) -> None:
    """Read, decoded and handed over by Ray Data, and trained on: the very same weights."""
    table = digits_table(203)
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, part in (("a", table.slice(0, 90)), ("b", table.slice(90))):
        pq.write_table(part, shards / f"{name}.parquet", row_group_size=16)
    more = sets("data.limit=null", "data.source=shards", f"data.path={shards}", f"data.mode={mode}")
    with own_ray() as own:
        local = own.snscc(*DIGITS, *more, "--out", tmp_path / "local").wait()
        one = ["--workers", 1, "--cpus-per-worker", 1]
        under = own.snscc(*DIGITS, *more, *one, "--out", tmp_path / "ray").wait()
        assert f"images {mode}" in under.out
        assert ("images stream" in local.out) == (mode == "stream")
    assert_same_run(tmp_path / "ray", tmp_path / "local")


def test_what_ray_train_kept_is_gone_once_the_run_is_finished(runs: Path) -> None:
    def files(name: str) -> set[str]:
        folder = runs / name
        return {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and "tfevents" not in path.name
        }

    assert files("one") == files("two") == files("local")


@pytest.mark.slow
def test_one_to_two_workers_run_and_end(runs: Path, tmp_path: Path) -> None:
    with own_ray() as own:
        elastic = ["--workers", "1:2", "--cpus-per-worker", 0.5]
        running = own.snscc(*DIGITS, *elastic, "--out", tmp_path / "r").wait()
        assert "on 1 to 2 Ray workers" in running.out, running.said()
    agree(tmp_path / "r", runs / "one")


# --------------------------------------------------------------------------- what it refuses


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str]) -> Snscc:
    return Snscc(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "0:2"], ["--workers 0:2", "MIN:MAX as in 2:8"]),
        (["--workers", "-1"], ["--workers -1", "MIN:MAX as in 2:8"]),
        (["--workers", "x"], ["--workers x", "MIN:MAX as in 2:8"]),
        (["--workers", "3:2"], ["--workers 3:2", "MIN:MAX as in 2:8"]),
        (["--gpu"], ["--gpu needs Ray workers", "add --workers N"]),
        (["--address", "auto"], ["--address needs Ray workers", "add --workers N"]),
        (["--workers", "1", "--storage", "here"], ["--out", "--storage", "give one"]),
        (["--workers", "1", "--wait", "-3"], ["--wait"]),
        (["--workers", "1", "--cpus-per-worker", "0"], ["--cpus-per-worker"]),
        (["--workers", "1", *sets("train.epoch=3")], ["did you mean train.epochs?"]),
        (["--workers", "1", "--resume"], ["holds no run", "leave --resume out"]),
    ],
)
def test_a_mistake_is_refused_before_ray_is_started(
    arguments: list[str],
    says: list[str],
    snscc: Snscc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    done = snscc("run", "digits", *sets(*FEW_CHECKPOINTS), *arguments, "--out", tmp_path / "r")
    refused_here(done, *says)
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nobody_listens(snscc: Snscc, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    done = snscc(*DIGITS, "--workers", 1, "--address", address, "--out", tmp_path / "r")
    refused_here(done, f"--address {address}: no answer", "leave --address out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--workers", 2, "--cpus-per-worker", os.cpu_count()],
            ["--workers 2 of", "do not fit on this machine", "CPU free; use --workers 1, or"],
        ),
        (
            ["--workers", 1, "--cpus-per-worker", 9999],
            ["--workers 1 of 9999 CPU", "ask for fewer --cpus-per-worker", "--address"],
        ),
        (["--workers", 1, "--gpu"], ["1 GPU", "leave --gpu out"]),
    ],
)
def test_more_than_this_machine_has(
    arguments: list[object], says: list[str], tmp_path: Path
) -> None:
    with own_ray() as own:
        refused(own.snscc(*DIGITS, *arguments, "--out", tmp_path / "r").wait(2), *says)
        assert own.alive() == []
    assert list(tmp_path.iterdir()) == []


HIDE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"']


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one node of the cluster does not see."""
    folder = tmp_path_factory.mktemp("hidden")
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    tried = subprocess.run([*HIDE, folder, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a file system of one process's own is not permitted: {tried.stderr.strip()}")
    return folder


@pytest.fixture(scope="module")
def cluster(hidden: Path) -> Iterator[Cluster]:
    """Two nodes of one CPU each, and a head without; from one of them `hidden` cannot be seen."""
    with own_ray() as own:
        started = Cluster(own)
        started.add()
        started.add(*HIDE, hidden)
        yield started


def refuses(cluster: Cluster, says: list[str], folder: Path, *command: object, **more: str) -> None:
    """The command on the cluster ends with one line and leaves no run folder behind."""
    address = ["--address", cluster.address]
    refused(cluster.ray.start(*command, *address, **more).wait(2), *says)
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--workers", 4, "--wait", 3],
            ["4 workers of 1 CPU", "within 3 s", "2 of 2 CPU free", "--wait", "ray status"],
        ),
        (
            ["--workers", 1, "--gpu", "--wait", 3],
            ["1 worker of 1 CPU and 1 GPU", "no running node", "0 GPU", "leave --gpu out"],
        ),
        (  # there are two, on two nodes
            ["--workers", 1, "--cpus-per-worker", 2, "--wait", 3],
            ["no running node is large enough for one (at most 1 CPU", "--cpus-per-worker"],
        ),
        (
            ["--workers", 2, *sets("train.batch_size=33")],
            ["train.batch_size=33 is global", "among 2 workers", "--set train.batch_size=32"],
        ),
        (["--workers", 1, *sets("data.limit=9")], ["data.num_clusters=10", "9 images there are"]),
    ],
)
def test_what_a_cluster_cannot_do(
    arguments: list[object], says: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    refuses(cluster, says, folder, *SNSCC, *DIGITS, *arguments, "--out", folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--cpus-per-trial", 2], ["at most 1 CPU on a node", "lower --cpus-per-trial"]),
        (["--workers-per-trial", 3], ["2 of 2 CPU free", "use fewer --workers-per-trial"]),
    ],
)
def test_what_a_cluster_cannot_do_for_a_sweep(
    more: list[object], says: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """The wait, which no option of a sweep sets, is shortened."""
    soon = (
        "from dataclasses import replace; from snscc_ray.sweep import session\n"
        "was = session.Options.scale\n"
        "session.Options.scale = lambda options: replace(was(options), wait=3)\n"
        "from snscc_ray.cli import main; main()"
    )
    sizes = [f"{stage}.batch_size=30" for stage in ("pretrain", "train", "boost")]
    sweep = ["sweep", "gamma", *sets(*FEW_CHECKPOINTS, *sizes), *more, "--out", tmp_path / "r"]
    refuses(cluster, says, tmp_path / "r", sys.executable, "-c", soon, *sweep)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), [("run", "digits"), ("compare", "digits-compare")])
def test_a_storage_that_a_node_does_not_see(
    command: str, name: str, cluster: Cluster, hidden: Path
) -> None:
    folder = hidden / "runs" / name
    says = ["does not see", str(folder), "--storage", "s3://BUCKET/runs"]
    storage = ["--workers", 1, "--storage", folder.parent]
    refuses(cluster, says, folder, *SNSCC, command, *DIGITS[1:], *storage)


@pytest.mark.slow
def test_shards_that_a_node_does_not_see(cluster: Cluster, hidden: Path, tmp_path: Path) -> None:
    shard = hidden / "photos" / "0.parquet"
    shard.parent.mkdir()
    images = []
    for _ in range(40):
        file = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "png")
        images.append(file.getvalue())
    pq.write_table(pa.table({"image": images}), shard)
    run = ["run", "images", "--data", shard.parent, *sets(*PHOTOS), "--out", tmp_path / "r"]
    says = ["cannot read", str(shard), "No such file", "every node sees"]
    refuses(cluster, says, tmp_path / "r", *SNSCC, *run, "--workers", 1)


@pytest.mark.slow
def test_a_wrong_token(cluster: Cluster, tmp_path: Path) -> None:
    says = [f"the cluster at {cluster.address} refused the token", "RAY_AUTH_TOKEN_PATH"]
    command = [*SNSCC, *DIGITS, "--workers", 1, "--out", tmp_path / "r"]
    refuses(cluster, says, tmp_path / "r", *command, RAY_AUTH_TOKEN="0" * 64)


@pytest.mark.slow
def test_another_version_of_ray(cluster: Cluster, tmp_path: Path) -> None:
    other = "import ray; ray.__version__ = '9.9.9'; from snscc_ray.cli import main; main()"
    says = ["another version of Ray or Python than this machine", "Ray: 9.9.9", "install the same"]
    command = [sys.executable, "-c", other, *DIGITS, "--workers", 1, "--out", tmp_path / "r"]
    refuses(cluster, says, tmp_path / "r", *command)
