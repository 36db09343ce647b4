"""Figures of finished runs of one dataset, by seed: median, lowest and highest.

for seed in 0 1 2; do
    snscc fit DATA --clusters 10 --labels --seed $seed --out runs/imagenette-$seed
done
python -m benchmarks.frozen runs/imagenette-* --out benchmarks/results/frozen-imagenette.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import describe_machine, revision

FIGURES = ("oracle/acc", "oracle/nmi", "oracle/ari", "oracle/knn_acc", "health/score", "seconds")


def summary(runs: list[Path]) -> dict[str, Any]:
    """Return the settings of the first run, and each stage's figures over all runs."""
    recipes = [json.loads((run / "recipe.json").read_text())["recipe"] for run in runs]
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    stages: dict[str, Any] = {}
    for stage in metrics[0]["stages"]:
        found = [one["stages"][stage] for one in metrics]
        stages[stage] = {
            name: {
                "median": statistics.median(figures[name] for figures in found),
                "runs": [figures[name] for figures in found],
            }
            for name in FIGURES
            if all(name in figures for figures in found)
        }
    first = recipes[0]
    return {
        "machine": describe_machine(torch.get_num_threads()),
        "revision": revision(),
        "rows": metrics[0]["rows"],
        "seeds": [recipe["seed"] for recipe in recipes],
        "settings": {name: first[name] for name in ("encoder", "train", "boost")}
        | {"image_size": first["data"]["image_size"]},
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = summary(arguments.runs)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    for stage, figures in found["stages"].items():
        shown = ", ".join(f"{name} {value['median']:.3f}" for name, value in figures.items())
        print(f"{stage}: {shown}")


if __name__ == "__main__":
    main()
