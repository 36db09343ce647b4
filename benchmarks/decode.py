"""Images per second read and decoded, with one thread and with two.

    python -m benchmarks.decode --data PATH [--image-size S] [--out FILE]

This times the whole path, from Parquet shards or a folder on disk to the finished ImageSet. If
--image-size (default 32) is the images' own size, nothing is resampled. The best of three passes
counts, because other programs can only slow a pass down. The rate per CPU second is also given: it
shows what one core does, even if cores are shared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.report import describe_machine, print_table, save
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.sources import load_images

PASSES = 3


def measure(data: DataSettings, workers: int) -> dict[str, float]:
    wall, cpu = float("inf"), float("inf")
    for _ in range(PASSES):
        started, used = time.perf_counter(), time.process_time()
        images = len(load_images(data, workers=workers))
        wall = min(wall, time.perf_counter() - started)
        cpu = min(cpu, time.process_time() - used)
    return {
        "workers": workers,
        "images": images,
        "images_per_second": round(images / wall, 1),
        "images_per_cpu_second": round(images / cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Parquet shards or a folder of images")
    parser.add_argument("--image-size", type=int, default=32, help="side, in pixels")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    given = parser.parse_args()
    data = DataSettings(
        source="auto", path=given.data, num_clusters=10, image_size=given.image_size
    )
    load_images(data.model_copy(update={"limit": 100}))  # warm up imports and the disk
    rows = [
        {"data": Path(given.data).name, "image_size": given.image_size, **measure(data, workers)}
        for workers in (1, 2)
    ]
    print_table(rows)
    if given.out is not None:
        save(given.out, describe_machine(torch.get_num_threads()), rows)


if __name__ == "__main__":
    main()
