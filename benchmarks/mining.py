"""Mining neighbours: seconds, and peak memory above that of the features, per backend.

    python -m benchmarks.mining --out benchmarks/results/mining.json

Default: 60,000 × 512 float32 and K = 20, CIFAR-10's size at ResNet-18's width. Each backend runs in
its own process, so that the peak is its own. The clock starts after imports and after the features
are made.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch

from benchmarks.report import describe_machine, print_table, save
from snscc_ray.core.clustering.neighbors import knn

ROOT = Path(__file__).resolve().parents[1]
Backend = Literal["torch", "faiss"]
BACKENDS: tuple[Backend, ...] = ("torch", "faiss")


def measure(backend: Backend, rows: int, dim: int, k: int) -> dict[str, float]:
    """Mine once in this process; return seconds, and peak memory above that of the features."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, dim, generator=generator)
    features = torch.randn(rows, dim, generator=generator)
    for part in features.split(4096):
        part += centres[torch.randint(10, (len(part),), generator=generator)]
        part /= part.norm(dim=1, keepdim=True)
    knn(features[:200], 5, backend=backend)  # warm up imports and thread pools
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    d_NK, idx_NK = knn(features, k, backend=backend)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 2),
        "peak_mb_above_features": round((peak - before) / 1024, 1),
        "threads": torch.get_num_threads(),
        # Equal sums show that the backends agree.
        "distance_sum": float(d_NK.double().sum()),
        "index_sum": int(idx_NK.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON with the figures, versions and CPU name")
    parser.add_argument("--backend", choices=BACKENDS, help="this one only, in this process")
    args = parser.parse_args()
    if args.backend:
        print(json.dumps(measure(args.backend, args.rows, args.dim, args.k)))
        return
    shape = [f"--rows={args.rows}", f"--dim={args.dim}", f"--k={args.k}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    machine = describe_machine(torch.get_num_threads())
    rows = []
    for backend in BACKENDS:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.mining", f"--backend={backend}", *shape],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if child.returncode == 0:
            rows.append({"backend": backend, **json.loads(child.stdout)})
        else:
            print(f"{backend} failed (not installed?)")
    print_table(rows)
    if args.out:
        save(args.out, machine, rows)


if __name__ == "__main__":
    main()
