"""Whole runs on a set that stays in its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core import checkpoints
from snscc_ray.core.display import Display
from snscc_ray.data.loading.resident import Images, ResidentData
from snscc_ray.data.loading.streamed import StreamedData, threads_reader
from snscc_ray.data.loading.survey import survey
from snscc_ray.data.sources import list_rows, load_images
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.run import execute
from snscc_ray.training.workers import LocalWorker
from tests.conftest import TINY, digits_table, equal_states, shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 real digits as PNG in two shards of small row groups."""
    folder = tmp_path_factory.mktemp("shards")
    table = digits_table(203)
    for name, part in (("a", table.slice(0, 90)), ("b", table.slice(90))):
        pq.write_table(part, folder / f"{name}.parquet", row_group_size=16)
    return folder


@pytest.fixture
def recipe(digits_shards: Path) -> Recipe:
    settings = [*TINY, "data.limit=null", "data.source=shards", f"data.path={digits_shards}"]
    return override(recipes.get("digits"), [*settings, "data.memory_mb=1"])


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    of_time = ("images_per_second", "wait_share")
    return [
        {name: value for name, value in line.items() if name not in of_time}
        for line in lines
        if "warning" not in line
    ]


def test_a_streamed_run_is_the_run_in_memory_when_the_order_is_the_same(
    recipe: Recipe, tmp_path: Path
) -> None:
    streamed_set = survey(list_rows(recipe.data), recipe.data)
    streamed = StreamedData(streamed_set, CPU, threads_reader(streamed_set, 1, 2))
    images = load_images(recipe.data)
    resident = ResidentData(images.images, CPU, order=streamed.order)
    sets: dict[str, Images] = {"streamed": streamed, "resident": resident}
    for name, data in sets.items():
        folder = tmp_path / name
        monitor = RunMonitor(Journal(folder), Display(Console(quiet=True)))
        catalog = streamed_set.catalog if name == "streamed" else images.catalog
        execute(recipe, catalog, data, folder, LocalWorker(folder, CPU), monitor)
        monitor.finish()
    one, two = losses(tmp_path / "streamed"), losses(tmp_path / "resident")
    assert len(one) == 9
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for stage in STAGES:
        final = [
            checkpoints.load(tmp_path / name / stage / "final.pt")["network"]
            for name in ("streamed", "resident")
        ]
        assert equal_states(*final), stage


def run(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own that says how much memory it had at most."""
    code = (
        "import atexit\n"
        "from resource import RUSAGE_SELF, getrusage\n"
        "atexit.register(lambda: print('PEAK', getrusage(RUSAGE_SELF).ru_maxrss))\n"
        "from snscc_ray.cli import main\n"
        "main()"
    )
    words = [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(
        [sys.executable, "-c", code, "run", "images", "--out", str(folder), *words],
        capture_output=True,
        text=True,
        timeout=900,
        # What the program holds, not what allocators keep for later in each thread.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_TRIM_THRESHOLD_": "0",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        },
    )


def test_what_reads_images_at_random_is_refused(digits_shards: Path, tmp_path: Path) -> None:
    done = run(
        tmp_path / "run", f"data.path={digits_shards}", "data.mode=stream",
        "train.mined_from=images",
        "data.num_clusters=3", "data.image_size=8", "pretrain.batch_size=32",
        "train.batch_size=32", "boost.batch_size=32",
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train.mined_from=predictions" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """28 MB of decoded images, then 83, both within 16: all stages end, at about the same peak."""
    small = (
        f"data.path={shards('cifar10-jpeg')}", "data.num_clusters=10", "data.image_size=48",
        "data.mode=stream", "data.memory_mb=16", "encoder.name=convnet", "encoder.width=4",
        "pretrain.epochs=1", "train.epochs=1", "boost.epochs=1", "pretrain.batch_size=128",
        "train.batch_size=128", "boost.batch_size=128", "pretrain.projection_hidden=16",
        "pretrain.learning_rate=0.001", "pretrain.optimizer=adam", "runtime.device=cpu",
    )  # fmt: skip
    peaks = {}
    for rows in (4_000, 12_000):
        done = run(tmp_path / str(rows), *small, f"data.limit={rows}")
        assert done.returncode == 0, done.stderr
        peaks[rows] = int(done.stdout.rpartition("PEAK ")[2]) / 1024
    # What grows: ids, features, neighbours, and the scores of mining up to their own bound (25 MB
    # were seen for 20,000 rows more). Images would be 55 MB more.
    assert peaks[12_000] - peaks[4_000] < 40, peaks
