"""Processes and nodes are really killed: runs under Ray end by themselves, and end the same."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snscc_ray.config.settings import STAGES
from tests.ray_tools import (
    FEW_CHECKPOINTS,
    Cluster,
    Ray,
    Running,
    assert_same_run,
    epochs,
    free_port,
    own_ray,
    refused,
    sets,
    starts,
    until,
)

pytestmark = pytest.mark.slow

EPOCHS = 30
# Seven steps an epoch: a checkpoint at the end of each.
LONG = [
    "run", "digits", *sets(*FEW_CHECKPOINTS, "runtime.checkpoint_steps=7"),
    *sets(*(f"{stage}.epochs={EPOCHS}" for stage in STAGES)),
]  # fmt: skip
ONE = ["--workers", 1, "--cpus-per-worker", 1]
LOST = "workers were lost; starting them again"


@pytest.fixture
def ray() -> Iterator[Ray]:
    with own_ray() as started:
        yield started


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with own_ray() as ray:
        ray.snscc(*LONG, "--out", folder).wait()
    return folder


def under_way(folder: Path, stage: str) -> bool:
    return not (folder / stage / "stage.json").exists()


def test_a_worker_killed_in_each_stage_changes_nothing(
    ray: Ray, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    running = ray.snscc(*LONG, *ONE, "--out", folder)
    seen: dict[str, int] = {}
    for stage in STAGES:
        seen[stage] = running.reaches(folder, stage, 3)
        (worker,) = ray.train_workers()
        worker.kill()
        assert under_way(folder, stage)
    running.wait()
    assert running.out.count(LOST) == len(STAGES), running.said()
    assert_same_run(folder, whole)
    for stage in STAGES:
        begun = starts(folder, stage)
        # The last epoch seen had not been saved yet, and of the one before, Ray may not have
        # heard: a worker goes on while one report waits.
        assert len(begun) == 2 and begun[0] == 0 and begun[1] >= seen[stage] - 1, (begun, seen)
        assert epochs(folder, stage) == list(range(EPOCHS))


def test_a_stopped_and_a_killed_command_go_on(ray: Ray, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM, then SIGKILL; then nothing any more. The command is always the same."""
    folder = tmp_path / "run"
    command = [*LONG, *ONE, "--out", folder]
    resumed: dict[str, int] = {}
    stops = {"pretrain": signal.SIGINT, "train": signal.SIGTERM, "boost": signal.SIGKILL}
    written: dict[Path, int] = {}
    for stage, number in stops.items():
        running = ray.snscc(*command)
        resumed[stage] = running.reaches(folder, stage, 3) - 1
        running.send(number)
        if number == signal.SIGKILL:
            running.wait(-signal.SIGKILL, 60)
        else:
            running.wait(130, 60)
            refused(running, f"stopped; continue with: snscc run --resume --out {folder}")
        assert under_way(folder, stage)
        until(lambda: not ray.alive(), ray.alive, 60)
        finished = [path for path in folder.glob("*/*") if path.name in ("stage.json", "final.pt")]
        assert len(finished) == 2 * STAGES.index(stage)
        for path in finished:  # a finished stage is not run again
            changed = path.stat().st_mtime_ns
            assert written.setdefault(path, changed) == changed, path
    ray.snscc(*command).wait()
    assert_same_run(folder, whole)
    for stage in STAGES:
        begun = starts(folder, stage)
        assert len(begun) == 2 and begun[0] == 0 and begun[1] >= resumed[stage], (begun, resumed)
    assert {path.stat().st_mtime_ns == changed for path, changed in written.items()} == {True}


def test_lost_nodes_change_nothing(ray: Ray, whole: Path, tmp_path: Path) -> None:
    """The worker's node is lost while there is another, and that one before there is a third."""
    folder = tmp_path / "run"
    cluster = Cluster(ray)
    nodes = [cluster.add(), cluster.add()]
    running = ray.snscc(*LONG, *ONE, "--address", cluster.address, "--out", folder)
    hosts = []
    for stage in ("pretrain", "train"):
        running.reaches(folder, stage, 3)
        (worker,) = ray.train_workers()
        hosts.append(cluster.node_of(worker, nodes))
        # What tells this command of the run must not be lost with a node.
        (relay,) = ray.actors("Relay")
        assert cluster.node_of(relay, [cluster.head, *nodes]) is cluster.head
        cluster.lose(hosts[-1])
        assert under_way(folder, stage)
    assert set(hosts) == set(nodes)
    cluster.add()
    running.wait()
    assert running.out.count(LOST) == 2, running.said()
    assert_same_run(folder, whole)


FULL = """
import ray
from snscc_ray import cli
from snscc_ray.{package} import {module}
def full(*_):
    raise ray.exceptions.{error}("from Ray")
{module}.share_images = lambda *_: ray.get(ray.remote(full).remote())
cli.main()
"""


DISK = ["Ray's object store is full, and so is the disk", "free some space"]
MEMORY = ["a node ran out of memory", "use fewer --workers"]


@pytest.mark.parametrize(
    ("package", "module", "words", "error", "says"),
    [
        ("cluster", "run", ["run", "digits", *ONE], "OutOfDiskError", DISK),
        ("sweep", "session", ["sweep", "gamma"], "OutOfDiskError", DISK),
        ("cluster", "run", ["run", "digits", *ONE], "OutOfMemoryError", MEMORY),
    ],
    ids=["run", "sweep", "memory"],
)
def test_a_full_store_or_memory_is_one_line(
    package: str,
    module: str,
    words: list[object],
    error: str,
    says: list[str],
    ray: Ray,
    tmp_path: Path,
) -> None:
    """As the task of Ray Data that reads images ends where Ray cannot make room in time."""
    asked = [*words, *sets(*FEW_CHECKPOINTS), "--out", tmp_path / "out"]
    code = FULL.format(package=package, module=module, error=error)
    running = ray.start(sys.executable, "-c", code, *asked).wait(2)
    refused(running, *says)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- an object store


class Bucket:
    """s3://bucket of an S3 server on this machine."""

    def __init__(self, ray: Ray) -> None:
        import s3fs

        port = free_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        server = ray.start(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port)
        until(lambda: "Running on" in server.err, server.said, 60)
        self.store = s3fs.S3FileSystem(
            key="test", secret="test", endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            use_listings_cache=False, skip_instance_cache=True,
        )  # fmt: skip
        self.store.mkdir("bucket")

    def files(self, place: str) -> dict[str, bytes]:
        """By their path below bucket/`place`. Workers of a killed driver may still remove some."""
        root, found = f"bucket/{place}/", {}
        for path in self.store.find(root):
            with suppress(FileNotFoundError):
                found[path[len(root) :]] = self.store.cat(path)
        return found

    def copy(self, place: str, folder: Path) -> Path:
        for name, content in self.files(place).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def reaches(self, running: Running, place: str, stage: str, epoch: int) -> None:
        """Wait until the run in `place` has trained an epoch of a stage."""

        def there() -> bool:
            assert running.process.poll() is None, running.said()
            path = f"bucket/{place}/metrics.jsonl"
            told = self.store.cat(path).decode() if self.store.exists(path) else ""
            return f'{{"stage": "{stage}", "epoch": {epoch},' in told

        until(there, running.said)


@pytest.fixture
def bucket(ray: Ray) -> Bucket:
    for package in ("moto.server", "s3fs", "upath"):
        pytest.importorskip(package)
    return Bucket(ray)


# A checkpoint every third epoch.
SPARING = [*LONG, "--set", "runtime.checkpoint_steps=21"]


def kept(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }


@pytest.mark.parametrize(
    ("place", "begin", "go_on"),
    [
        ("here/run", [*SPARING, "--out", "s3://bucket/here/run"],
         ["run", "--resume", "--out", "s3://bucket/here/run"]),
        ("runs/digits", [*SPARING, *ONE, "--storage", "s3://bucket/runs"],
         [*SPARING, *ONE, "--storage", "s3://bucket/runs"]),
    ],
    ids=["in one process", "on Ray"],
)  # fmt: skip
def test_a_killed_run_in_an_object_store_goes_on(
    place: str,
    begin: list[object],
    go_on: list[object],
    ray: Ray,
    bucket: Bucket,
    whole: Path,
    tmp_path: Path,
) -> None:
    running = ray.snscc(*begin, **bucket.environment)
    bucket.reaches(running, place, "train", 7)
    running.send(signal.SIGKILL)
    running.wait(-signal.SIGKILL)
    before = bucket.files(place)
    assert "pretrain/stage.json" in before and "train/stage.json" not in before
    ray.snscc(*go_on, **bucket.environment).wait()
    folder = bucket.copy(place, tmp_path / "run")
    assert (folder / "pretrain" / "stage.json").read_bytes() == before["pretrain/stage.json"]
    assert_same_run(folder, whole)
    assert kept(folder) == kept(whole)
    assert starts(folder, "pretrain") == [0]
    first, second = starts(folder, "train")
    assert first == 0 and second >= 3
