"""ASHA against the full grid: epochs spent, the winner of each, and how well the metric ranks.

    snscc sweep grid --samples 40 --out runs/full/grid
    snscc sweep grid --samples 40 --scheduler asha --out runs/asha/grid
    python -m benchmarks.asha runs/full/grid runs/asha/grid --out benchmarks/results/asha.json

Labels are used here only to judge a search that did not use them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.report import describe_machine, print_table, save
from snscc_ray.config.settings import STAGES
from snscc_ray.sweep.results import figure, seeds_of
from snscc_ray.sweep.verdicts import rank_correlation

ACC = "oracle/acc"
LABEL_FREE = ("score", "neighbor_agreement", "balance", "confidence", "confident_share")
Rows = Sequence[dict[str, Any]]


def epochs(rows: Rows) -> dict[str, int]:
    """Return the epochs of each stage that was trained, in full or not, by folder name."""
    return {
        row[f"{stage}/folder"]: row[f"{stage}/epochs"]
        for row in rows
        for stage in STAGES
        if row.get(f"{stage}/folder")
    }


def winner(rows: Rows, seed: int, metric: str) -> dict[str, Any]:
    """Return a seed's finished trial with the best metric after Boost."""
    finished = [row for row in rows if row["seed"] == seed and row["status"] == "finished"]
    return max(finished, key=lambda row: figure(row, "boost", metric) or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("full", type=Path)
    parser.add_argument("asha", type=Path)
    parser.add_argument("--metric", default="health/score")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    full: Rows = pq.read_table(given.full / "results.parquet").to_pylist()
    asha: Rows = pq.read_table(given.asha / "results.parquet").to_pylist()
    spent, whole = sum(epochs(asha).values()), sum(epochs(full).values())
    results: list[dict[str, Any]] = [
        {"what": "epochs, all stages", "full": whole, "asha": spent, "ratio": spent / whole}
    ]
    for seed in seeds_of(full):
        ours, theirs = winner(asha, seed, given.metric), winner(full, seed, given.metric)
        results.append(
            {
                "what": f"ACC of the winner by {given.metric}, seed {seed}",
                "full": theirs[f"boost/{ACC}"],
                "asha": ours[f"boost/{ACC}"],
                "difference": ours[f"boost/{ACC}"] - theirs[f"boost/{ACC}"],
                "full point": theirs["point"],
                "asha point": ours["point"],
                "best ACC of all": winner(full, seed, ACC)[f"boost/{ACC}"],
            }
        )
    for stage in ("train", "boost"):
        # Trials share stages: count each trained stage once.
        apart = list({row[f"{stage}/folder"]: row for row in full}.values())
        for name in LABEL_FREE:
            found = rank_correlation(apart, f"health/{name}", ACC, stage)
            results.append(
                {
                    "what": f"Spearman of health/{name} with ACC after {stage}",
                    "pooled": found.pooled,
                    "seeds": list(found.per_seed.values()),
                    "stages": found.trials,
                }
            )
    for result in results:
        print_table([result])
    if given.out:
        save(given.out, describe_machine(1), results)


if __name__ == "__main__":
    main()
