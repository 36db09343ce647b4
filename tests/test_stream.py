"""Ray Data reads a set: the same rows as in memory, and always at an end."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from snscc_ray.config.errors import UserError
from snscc_ray.core import distributed
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.loading.streamed import StreamedData
from snscc_ray.data.loading.survey import StreamedSet, survey
from snscc_ray.data.sources import list_rows, load_images
from tests.test_streamed import (
    CPU,
    KINDS,
    VIEWER,
    assert_equal_batches,
    assert_equal_sets,
    data_settings,
    png,
    write,
)

ray = pytest.importorskip("ray")

from snscc_ray.data.loading.ray_stream import ray_reader, ray_resident, ray_survey, resident_images  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # Ray's sockets lie below the folder, and their names may not be long.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory("r", "s") as short:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", short)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    images = [png(seed) for seed in range(220)]
    images[80:100] = [b"not an image"] * 20  # among them all rows of a slice
    root = tmp_path_factory.mktemp("stream")
    return {kind: write(root / kind, kind, images) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_ray_brings_what_a_resident_set_holds(kind: str, places: dict[str, Path]) -> None:
    data = data_settings(places[kind], skip_corrupt=True, folders_are_labels=True)
    resident = load_images(data)
    streamed = ray_survey(list_rows(data), data)
    assert_equal_sets(streamed, resident)
    assert streamed.slices == survey(list_rows(data), data).slices

    batches = StreamedData(streamed, CPU, ray_reader(streamed, data.memory_mb))
    same = ResidentData(resident.images, CPU, order=batches.order)
    assert assert_equal_batches(batches.epoch(32, 5), same.epoch(32, 5)) == 7
    viewed = batches.epoch(32, 5, 4, VIEWER)
    assert assert_equal_batches(viewed, same.epoch(32, 5, 4, VIEWER)) == 3
    assert torch.equal(torch.cat([*batches.slices(3, 199, 60)]), resident.images[3:199])

    dataset, held = ray_resident(list_rows(data), data)
    assert_equal_sets(held, resident)
    assert torch.equal(resident_images(dataset, held), resident.images)


def test_a_corrupt_image_is_refused_in_one_line(places: dict[str, Path]) -> None:
    data = data_settings(places["shards"])
    for read in (ray_survey, ray_resident):
        with pytest.raises(UserError) as caught:
            read(list_rows(data), data)
        assert "row 80" in str(caught.value) and "\n" not in str(caught.value)


class Consumer:
    """A training worker, but for the training."""

    def __init__(self, streamed: StreamedSet, rank: int, world: int) -> None:
        distributed.rank = lambda: rank
        distributed.world_size = lambda: world
        self.data = StreamedData(streamed, CPU, ray_reader(streamed, 1))

    def rows(self, start: int, place: Path) -> list[list[int]]:
        batches = self.data.epoch(32, 5, start, partial(sign, place=place))
        return [batch.rows_B.tolist() for batch in batches]


def sign(images: torch.Tensor, rows: torch.Tensor, place: Path) -> tuple[torch.Tensor, ...]:
    (place / str(os.getpid())).touch()
    return (images.float(),)


@pytest.mark.slow
def test_consumers_that_hold_every_cpu_get_every_row_once(
    places: dict[str, Path], tmp_path: Path
) -> None:
    data = data_settings(places["shards"], skip_corrupt=True)
    streamed = survey(list_rows(data), data)
    order = StreamedData(streamed, CPU, ray_reader(streamed, 1)).order(5, 32)
    consumer = ray.remote(Consumer).options(num_cpus=1)
    consumers = [consumer.remote(streamed, rank, 2) for rank in range(2)]
    ray.get([one.__ray_ready__.remote() for one in consumers])
    assert ray.available_resources().get("CPU", 0) == 0
    processes = []
    for start in (0, 3):
        place = tmp_path / str(start)
        place.mkdir()
        shares = ray.get([one.rows.remote(start, place) for one in consumers], timeout=120)
        steps = [first + second for first, second in zip(*shares, strict=True)]
        assert len(steps) == 7 - start
        rows = torch.tensor([row for step in steps for row in step])
        assert torch.equal(rows, order[-len(rows) :])
        assert start or len(rows) == 200
        processes.append({file.name for file in place.iterdir()})
        time.sleep(3)  # Ray looks for idle processes to end once a second
    # Starting one anew takes longer than a small set's epoch.
    assert processes[1] <= processes[0] and processes[1]
    for one in consumers:
        ray.kill(one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_can_no_longer_be_read_is_named(kind: str, tmp_path: Path) -> None:
    data = data_settings(write(tmp_path / kind, kind, [png(seed) for seed in range(60)]))
    rows = list_rows(data)
    streamed = survey(rows, data)
    file = Path(streamed.slices[-1].files[-1])
    file.write_bytes(b"PAR1" + bytes(200))
    epoch = StreamedData(streamed, CPU, ray_reader(streamed, 1)).epoch(8, 1)
    for read in (
        lambda: list(epoch),
        lambda: ray_survey(rows, data),
        lambda: ray_resident(rows, data),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert file.name in str(caught.value) and "\n" not in str(caught.value)


def slow(images: torch.Tensor, rows: torch.Tensor, place: Path) -> tuple[torch.Tensor, ...]:
    (place / f"{int(rows[0])}-{time.time_ns()}").touch()
    time.sleep(0.1)
    return (images.float(),)


def test_a_consumer_that_stops_early_ends_the_pipeline(
    places: dict[str, Path], tmp_path: Path
) -> None:
    data = data_settings(places["folder"], skip_corrupt=True)
    streamed = survey(list_rows(data), data)
    wanted = [piece for piece in streamed.slices for _ in range(16)]
    before = set(threading.enumerate())
    batches = ray_reader(streamed, 1)(wanted, partial(slow, place=tmp_path))
    next(batches)
    batches.close()
    # Its fetching thread is not joined, and ends by itself.
    _wait_for(lambda: _names(before) <= {"Prefetcher"})
    begun = -1
    while begun < (begun := len(list(tmp_path.iterdir()))):
        time.sleep(1)
    assert 0 < begun < len(wanted) // 2


def _names(but: set[threading.Thread]) -> set[str]:
    return {thread.name for thread in set(threading.enumerate()) - but}


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(60):
        if condition():
            return
        time.sleep(0.5)
    raise AssertionError(f"no end to it: {threading.enumerate()}")
