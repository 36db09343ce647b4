"""Images per second read, decoded, augmented and handed over, compared with a plain loop.

    python -m benchmarks.stream --data PATH [--image-size S] [--out FILE]

Two processes with one core each decode half of the images and make one SimCLR view of each, in
three ways: in a plain loop over their files (`plain`); from Ray Data, in training workers that hold
both CPUs (`ray`); and, in one process, from the threads of a local run (`threads`). Only the middle
of an epoch counts, from 20 to 80 % of its rows, while no queue is being filled or emptied. `start`
is the wait for the first batch; `first_start` is the same in the first epoch, when processes start.
The three are measured in turn, and the best of three passes counts, because other programs can only
slow a pass down. The rate per CPU second (of all processes, over the whole epoch) is also given: it
shows what the work costs, even if cores are shared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from benchmarks.report import describe_machine, print_table, save
from snscc_ray.config.settings import DataSettings, SimclrView
from snscc_ray.core import distributed
from snscc_ray.core.views import Normalize, make_view
from snscc_ray.data.loading.resident import Images
from snscc_ray.data.loading.slices import decode_slice
from snscc_ray.data.loading.streamed import StreamedData, threads_reader
from snscc_ray.data.loading.survey import StreamedSet, survey
from snscc_ray.data.sources import list_rows

WORKERS = 2
PASSES = 3
BATCH = 512  # global
NORMALIZE = Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Figures(NamedTuple):
    """Figures of one process."""

    rate: float  # images a second, in the middle of an epoch
    start: float  # seconds until the first batch
    cpu: float  # seconds, over the whole epoch
    peak: float  # MB of memory


def measure(batches: Iterator[tuple[Tensor, Tensor]], rows: int) -> Figures:
    """Make views of batches of (images, rows), `rows` in all, as the only work of a worker."""
    began, used = time.perf_counter(), time.process_time()
    ends: list[tuple[int, float]] = []
    seen = 0
    for images_BCHW, rows_B in batches:
        if not ends:
            start = time.perf_counter() - began
        make_view(images_BCHW, rows_B, SimclrView(), 1, NORMALIZE)
        seen += len(rows_B)
        ends.append((seen, time.perf_counter()))
    assert seen == rows
    first, last = (next(end for end in ends if end[0] >= part * rows) for part in (0.2, 0.8))
    rate = (last[0] - first[0]) / (last[1] - first[1])
    return Figures(rate, start, time.process_time() - used, _peak_mb())


def _peak_mb() -> float:
    """Return this process's peak memory; getrusage may report the parent's."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) / 1024 if peak else float("nan")


def plain(rank: int, streamed: StreamedSet) -> Figures:
    torch.set_num_threads(1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        held: list[Tensor] = []
        for piece in pieces:
            held.append(torch.from_numpy(decode_slice(piece, streamed.channels, streamed.size)))
            if sum(map(len, held)) * WORKERS >= BATCH or piece is pieces[-1]:
                images = torch.cat(held)
                held.clear()
                yield images, torch.arange(len(images))

    pieces = streamed.slices[rank::WORKERS]
    return measure(batches(), sum(map(len, pieces)))


def epoch(data: Images, key: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in data.epoch(BATCH, key):
        yield batch.inputs, batch.rows_B


def by_threads(streamed: StreamedSet, memory_mb: int, key: int) -> Figures:
    reader = threads_reader(streamed, memory_mb, WORKERS)
    return measure(epoch(StreamedData(streamed, torch.device("cpu"), reader), key), len(streamed))


class Worker:
    """A training worker in Ray that holds one CPU."""

    def __init__(self, rank: int, streamed: StreamedSet, memory_mb: int) -> None:
        from snscc_ray.data.loading.ray_stream import ray_reader

        torch.set_num_threads(1)
        distributed.rank = lambda: rank
        distributed.world_size = lambda: WORKERS
        reader = ray_reader(streamed, memory_mb)
        self.data = StreamedData(streamed, torch.device("cpu"), reader)

    def epoch(self, key: int) -> Figures:
        begin, end = zip(
            *(distributed.own_share(size) for size in self._batch_sizes()), strict=True
        )
        return measure(epoch(self.data, key), sum(end) - sum(begin))

    def _batch_sizes(self) -> list[int]:
        from snscc_ray.data.loading.order import batch_edges

        return list(map(int, batch_edges(len(self.data), BATCH).diff()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Parquet shards or a folder of images")
    parser.add_argument("--image-size", type=int, default=32, help="side, in pixels")
    parser.add_argument("--memory-mb", type=int, default=256, help="data.memory_mb")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    torch.set_num_threads(1)
    data = DataSettings(
        source="auto",
        path=given.data,
        num_clusters=10,
        image_size=given.image_size,
        memory_mb=given.memory_mb,
    )
    streamed = survey(list_rows(data), data)

    import ray

    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    make = ray.remote(Worker).options(num_cpus=1)
    workers = [make.remote(rank, streamed, given.memory_mb) for rank in range(WORKERS)]

    def in_processes(key: int) -> list[Figures]:
        with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
            return pool.starmap(plain, [(rank, streamed) for rank in range(WORKERS)])

    def in_one_process(key: int) -> list[Figures]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return [pool.apply(by_threads, (streamed, given.memory_mb, key))]

    def by_ray(key: int) -> list[Figures]:
        used = _cpu_of_children()
        found = ray.get([worker.epoch.remote(key) for worker in workers])
        each = (_cpu_of_children() - used) / WORKERS  # includes the tasks and Ray itself
        return [figures._replace(cpu=each) for figures in found]

    ways: dict[str, Callable[[int], list[Figures]]] = {
        "plain": in_processes,
        "ray": by_ray,
        "threads": in_one_process,
    }
    passes = [{name: way(key) for name, way in ways.items()} for key in range(PASSES)]
    ray.shutdown()
    rate = {name: max(_rate(found[name]) for found in passes) for name in ways}
    cpu = {name: min(sum(one.cpu for one in found[name]) for found in passes) for name in ways}
    start = {name: [max(one.start for one in found[name]) for found in passes] for name in ways}
    rows = [
        {
            "data": Path(given.data).name,
            "image_size": given.image_size,
            "images": len(streamed),
            "memory_mb": given.memory_mb,
            "way": name,
            "images_per_second": round(rate[name], 1),
            "of_plain": round(rate[name] / rate["plain"], 3),
            "images_per_cpu_second": round(len(streamed) / cpu[name], 1),
            "cpu_of_plain": round(cpu["plain"] / cpu[name], 3),
            "first_start": round(start[name][0], 2),
            "start": round(min(start[name]), 2),
            "peak_mb": round(max(one.peak for found in passes for one in found[name])),
        }
        for name in ways
    ]
    print_table(rows)
    if given.out is not None:
        save(given.out, describe_machine(1), rows)


def _rate(found: list[Figures]) -> float:
    return sum(one.rate for one in found)


def _cpu_of_children() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(time.user + time.system for time in times))


if __name__ == "__main__":
    main()
