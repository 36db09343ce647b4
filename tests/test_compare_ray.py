"""`snscc compare` on the workers of Ray, against the comparison in one process."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from snscc_ray.cli.recipe import recipe_of
from snscc_ray.core import checkpoints
from snscc_ray.models.libraries import DEFAULT, default_is_installed
from tests.conftest import TINY, digits_table, equal_states
from tests.ray_tools import (
    Ray,
    Running,
    assert_same_run,
    epochs,
    own_ray,
    refused,
    sets,
    starts,
    until,
)
from tests.test_cli import Snscc, content
from tests.test_cli import refused as refused_here
from tests.test_compare_features import FAST, photos
from tests.test_predict import images
from tests.test_ray_faults import Bucket, bucket

__all__ = ["bucket", "photos"]  # fixtures

EPOCHS = 60
SMALL = [
    *sets(*TINY, "data.limit=120", "pretrain.epochs=2", "boost.epochs=2", "train.num_heads=2"),
    *sets(f"train.epochs={EPOCHS}"),
]
METHODS = ("kmeans", "dae", "dec", "pretext", "scan", "snscc")
TRAINED = ("dae", "dec", "scan", "scan-self-label")
ONE = ["--workers", 1, "--cpus-per-worker", 1]
TWO = ["--workers", 2, "--cpus-per-worker", 1]
LAST_ATTEMPT = "seconds of the last attempt only"


def compare(folder: Path, methods: str, *more: object) -> list[object]:
    return ["compare", "digits", *SMALL, "--methods", methods, "--out", folder, *more]


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str]) -> Snscc:
    return Snscc(capsys)


@pytest.fixture
def ray() -> Iterator[Ray]:
    with own_ray() as started:
        yield started


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison in one process, to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole") / "c"
    with own_ray() as ray:
        ray.snscc(*compare(folder, ",".join(METHODS))).wait()
    return folder


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "compare.csv").open(newline="") as file:
        return {row.pop("method"): row for row in csv.DictReader(file)}


def timeless(folder: Path) -> dict[str, dict[str, str]]:
    """The table without the columns that tell of time."""
    rows = table(folder)
    for row in rows.values():
        row["note"] = row["note"].replace(LAST_ATTEMPT, "").removesuffix("; ")
        del row["seconds"]
    return rows


def assert_same(folder: Path, other: Path) -> None:
    """The rows of `folder`, and their assignments and weights bit for bit."""
    ours, theirs = timeless(folder), timeless(other)
    assert ours == {method: theirs[method] for method in ours}
    for method in ours:
        name = f"methods/{method}/assignments.parquet"
        assert (folder / name).read_bytes() == (other / name).read_bytes(), method
    for part in TRAINED:
        name = f"methods/{part}/final.pt"
        if (folder / name).exists():
            one, two = (checkpoints.load(place / name)["network"] for place in (folder, other))
            assert equal_states(one, two), part


def busy(ray: Ray) -> int:
    """How many methods are at work."""
    return len(ray.actors("_in_worker"))


def reaches(running: Running, folder: Path, method: str, epoch: int) -> int:
    return running.reaches(folder / "methods" / method, "train", epoch)


@pytest.mark.slow
def test_two_at_the_same_time_are_one_after_the_other(
    ray: Ray, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    command = compare(folder, ",".join(METHODS), *TWO)
    running = ray.snscc(*command)
    until(lambda: busy(ray) == 2 or running.process.poll() is not None, running.said)
    running.wait()
    assert_same(folder, whole)
    assert list(table(folder)) == list(METHODS)
    assert_same_run(folder / "snscc", whole / "snscc")
    said = running.out
    assert "on 2 Ray workers with a CPU share each" in said
    assert said.index("Pretrain: once, for pretext, scan, snscc") < said.index("Pretrain: done")
    for number, method in enumerate(METHODS, 1):
        begun, ended = (said.index(f"[{number}/6] {method}: {what}") for what in ("", "ACC "))
        assert begun < ended
        if method in ("pretext", "scan", "snscc"):
            assert said.index("Pretrain: done") < begun
    assert said.index("[2/6] dae: ACC") < said.index("[3/6] dec: DEC")
    assert not list(folder.rglob("latest.pt")) and not list(folder.rglob(".snscc*"))

    before = content(folder)
    again = ray.snscc(*command).wait()
    assert again.out.count("already done") == len(METHODS) and "once" not in again.out
    assert content(folder) == before
    # In one process, it is finished too.
    alone = ray.snscc(*compare(folder, ",".join(METHODS))).wait()
    assert alone.out.count("already done") == len(METHODS)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_goes_on(
    ray: Ray, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    running = ray.snscc(*compare(folder, "kmeans,dae,dec", *TWO))
    seen = {}
    for method in ("dae", "dec"):  # never at the same time
        seen[method] = reaches(running, folder, method, 5)
        (worker,) = ray.actors("_in_worker")
        worker.kill()
        assert not (folder / "methods" / method / "final.pt").exists()
    running.wait()
    for method, epoch in seen.items():
        assert running.out.count(f"{method}: its worker was lost; starting it again") == 1
        begun = starts(folder / "methods" / method, "train")
        assert len(begun) == 2 and begun[0] == 0 and begun[1] >= epoch - 1, (begun, seen)
        assert epochs(folder / "methods" / method, "train") == list(range(EPOCHS))
        assert LAST_ATTEMPT in table(folder)[method]["note"]
    assert_same(folder, whole)


@pytest.mark.slow
def test_a_worker_lost_too_often_is_a_row_and_the_same_command_goes_on(
    ray: Ray, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    command = compare(folder, "kmeans,dae,dec", *ONE, "--set", "runtime.max_failures=0")
    running = ray.snscc(*command)
    epoch = reaches(running, folder, "dae", 5)
    (worker,) = ray.actors("_in_worker")
    worker.kill()
    running.wait(1)
    refused(running, "failed: dae, dec;")
    rows = table(folder)
    for method in ("dae", "dec"):  # which starts from it
        assert rows[method]["note"].startswith("failed: its worker was lost (1 times)")
        assert "runtime.max_failures" in rows[method]["note"] and not rows[method]["acc"]
    assert rows["kmeans"]["acc"]
    again = ray.snscc(*command).wait()
    assert "[1/3] kmeans: already done" in again.out
    assert starts(folder / "methods" / "dae", "train")[1] >= epoch - 1
    assert_same(folder, whole)


@pytest.mark.slow
def test_a_stopped_and_a_killed_command_go_on(ray: Ray, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C, as a terminal sends it to all processes, and SIGKILL. The command is the same."""
    folder = tmp_path / "c"
    # Only a stop saves a checkpoint within a stage.
    command = compare(folder, "kmeans,dae,scan", *TWO, *sets("runtime.checkpoint_seconds=1000"))
    running = ray.snscc(*command)
    reaches(running, folder, "dae", 3)
    os.killpg(running.process.pid, signal.SIGINT)
    running.wait(130, 60)
    refused(running, "stopped; run the same command again to continue")
    until(lambda: not ray.alive(), ray.alive, 60)
    saved = checkpoints.load(folder / "methods" / "dae" / "train" / "latest.pt")
    assert saved["epoch"] >= 3
    running = ray.snscc(*command)
    epoch = reaches(running, folder, "dae", saved["epoch"] + 3)
    workers = ray.actors("_in_worker")
    for worker in workers:
        worker.suspend()  # it would live on for a moment, and could end its method in it
    running.send(signal.SIGKILL)
    running.wait(-signal.SIGKILL, 60)
    for worker in workers:
        worker.kill()
    until(lambda: not ray.alive(), ray.alive, 60)
    again = ray.snscc(*command).wait()
    assert "kmeans: already done" in again.out
    begun = starts(folder / "methods" / "dae", "train")
    assert begun[0] == 0 and begun[1] == begun[2] == saved["epoch"], (begun, epoch)
    assert_same(folder, whole)


@pytest.mark.slow
def test_methods_that_fail_are_rows_with_the_reason(ray: Ray, tmp_path: Path) -> None:
    """As in one process: dec starts from what dae trains, whose loss is no number."""
    places = [tmp_path / "ray", tmp_path / "here"]
    for folder, more in zip(places, (TWO, []), strict=True):
        high = sets("train.learning_rate=1e30", "train.epochs=3")
        call = compare(folder, "kmeans,dae,dec,pretext", *high, *more)
        refused(ray.snscc(*call).wait(1), "failed: dae, dec;")
    rows = timeless(places[0])
    assert rows == timeless(places[1])
    assert all("failed: TrainingError: nan-loss" in rows[name]["note"] for name in ("dae", "dec"))
    assert rows["kmeans"]["acc"] and rows["pretext"]["acc"]


@pytest.mark.slow
@pytest.mark.skipif(not default_is_installed(), reason=f"{DEFAULT} is not installed")
def test_a_frozen_encoders_features_are_computed_once(
    ray: Ray, photos: Path, tmp_path: Path
) -> None:
    places = [tmp_path / "ray" / "c", tmp_path / "here" / "c"]
    call = ["compare", "images", "--data", photos, "--encoder", DEFAULT, *sets(*FAST)]
    for folder, more in zip(places, (TWO, []), strict=True):
        done = ray.snscc(*call, "--methods", "kmeans,ac,scan,snscc", "--out", folder, *more).wait()
        assert done.out.count("features: once, for kmeans, ac, scan, snscc") == (more == TWO)
    assert_same(*places)
    banks = [place / "snscc" / "pretrain" / "bank" / "00000.npy" for place in places]
    assert banks[0].read_bytes() == banks[1].read_bytes()


@pytest.mark.slow
def test_a_comparison_in_an_object_store(
    ray: Ray, bucket: Bucket, whole: Path, tmp_path: Path
) -> None:
    """Killed there, it goes on; its folder is named as in `runs`."""
    call = [*compare(tmp_path, "kmeans,dae,pretext,scan", *TWO, "--storage", "s3://bucket/runs")]
    del call[call.index("--out") : call.index("--out") + 2]
    running = ray.snscc(*call, **bucket.environment)

    def trained() -> bool:
        assert running.process.poll() is None, running.said()
        path = "bucket/runs/digits-compare/methods/dae/metrics.jsonl"
        return bucket.store.exists(path) and '"epoch": 3,' in bucket.store.cat(path).decode()

    until(trained, running.said)
    running.send(signal.SIGKILL)
    running.wait(-signal.SIGKILL)
    until(lambda: not ray.actors("_in_worker"), ray.alive, 60)
    again = ray.snscc(*call, **bucket.environment).wait()
    assert "kmeans: already done" in again.out
    folder = bucket.copy("runs/digits-compare", tmp_path / "copy")
    assert starts(folder / "methods" / "dae", "train")[1] >= 3
    assert_same(folder, whole)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu"], ["--gpu needs Ray workers", "--workers N"]),
        (["--cpus-per-worker", 1], ["--cpus-per-worker needs Ray workers"]),
        (["--address", "auto"], ["--address needs Ray workers"]),
        (["--workers", "two"], ["--workers two", "MIN:MAX"]),
        (["--workers", 2, *sets("runtime.device=cuda")], ["runtime.device=cuda", "add --gpu"]),
        (["--storage", "b"], ["--out", "--storage", "one of them"]),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[object], says: list[str], snscc: Snscc, tmp_path: Path
) -> None:
    refused_here(snscc("compare", "digits", "--out", tmp_path / "c", *options), *says)
    assert not content(tmp_path)


def test_auto_is_what_fit_chooses_for_the_workers(tmp_path: Path) -> None:
    """Whatever this machine has."""
    digits = str(images(tmp_path / "digits", digits_table(60)))
    wanted = ["data.num_clusters=3"]
    chosen = [
        recipe_of("compare", "auto", None, wanted, digits, gpu).encoder for gpu in (False, True)
    ]
    assert [encoder.name for encoder in chosen] == ["convnet", "resnet18"]
