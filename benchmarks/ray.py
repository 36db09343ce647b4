"""The cost of Ray: the digits recipe with one Ray worker against the same in one process.

`python -m benchmarks.ray` makes pairs of runs, one after the other. `ratio` is images/s with Ray
over images/s without; `start_seconds` is how much longer the whole command takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.report import describe_machine, print_table, save

STAGES = ("pretrain", "train")


class Run(NamedTuple):
    seconds: float  # of the whole command
    speeds: dict[str, float]  # images/s by stage: the median over all epochs but the first


def run(folder: Path, epochs: int, threads: int, *more: str) -> Run:
    """Run the digits recipe as a separate command."""
    settings = [f"{stage}.epochs={epochs}" for stage in STAGES]
    settings += ["boost.epochs=0", "runtime.checkpoint_seconds=1000"]
    command = [sys.executable, "-m", "snscc_ray", "run", "digits", "--out", str(folder), *more]
    for setting in settings:
        command += ["--set", setting]
    began = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = {
        stage: statistics.median(
            line["images_per_second"]
            for line in lines
            if line["stage"] == stage and line["epoch"] > 0 and "warning" not in line
        )
        for stage in STAGES
    }
    return Run(seconds, speeds)


def measure(repeats: int, epochs: int, threads: int) -> list[dict[str, object]]:
    pairs = []
    worker = ["--workers", "1", "--cpus-per-worker", str(threads)]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            local = run(Path(folder, f"local{number}"), epochs, threads)
            pairs.append((local, run(Path(folder, f"ray{number}"), epochs, threads, *worker)))
    starts = [ray.seconds - local.seconds for local, ray in pairs]
    rows: list[dict[str, object]] = []
    for stage in STAGES:
        ratios = [ray.speeds[stage] / local.speeds[stage] for local, ray in pairs]
        rows.append(
            {
                "stage": stage,
                "threads": threads,
                "local_images_per_second": statistics.median(a.speeds[stage] for a, _ in pairs),
                "ray_images_per_second": statistics.median(b.speeds[stage] for _, b in pairs),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "start_seconds": statistics.median(starts),
                "start_seconds_min": min(starts),
                "start_seconds_max": max(starts),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="save the figures as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    rows = measure(arguments.repeats, arguments.epochs, arguments.threads)
    print_table(rows)
    if arguments.out:
        save(arguments.out, describe_machine(arguments.threads), rows)


if __name__ == "__main__":
    main()
