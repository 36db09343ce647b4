"""The paper's experiments (Section IV-D and IV-E) on four datasets, and each of its claims judged.

python -m benchmarks.science DATA --out runs/science

DATA holds the folders imagenette-96, cifar10-jpeg and cifar100-jpeg; digits needs none. On the
photographs the encoder is frozen and was trained on ImageNet with labels: EfficientNet-Lite0 on
Imagenette, Lite2 on the smaller photographs of CIFAR, of which the first 15,000 are used. Its
features are computed once per dataset, by `snscc fit`, and every sweep starts from them. A dataset
that is not there is left out, and the table says so. The same command continues a stopped one.

Writes claims.json; science.md, with a table of the claims (whether each holds on each dataset, and
by how much) and one for each experiment; and a figure for each experiment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet as pq
import torch

from benchmarks.report import describe_machine, revision
from snscc_ray.config import recipes
from snscc_ray.config.settings import Recipe
from snscc_ray.runs.folder import read_recipe
from snscc_ray.sweep.results import ORACLE, STAGE_NAMES, by_seed, labels_of
from snscc_ray.sweep.verdicts import judge
from tune_spaces import load
from tune_spaces.space import Space

matplotlib.use("Agg")
from matplotlib import pyplot

SPACES = ("epsilon", "gamma", "sigma", "neighbors", "ablation-train", "ablation-boost",
          "train-longer")  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    name: str
    folder: str | None  # in DATA; None: the recipe `digits`
    clusters: int
    options: tuple[str, ...] = ()  # of `snscc fit`


CIFAR = ("--encoder", "pip:efficientnet_lite2", "--set", "data.limit=15000")
DATASETS = (
    Dataset("digits", None, 10),
    Dataset("imagenette", "imagenette-96", 10),
    Dataset("cifar10", "cifar10-jpeg", 10, CIFAR),
    Dataset("cifar100-20", "cifar100-jpeg", 20, CIFAR),
)


def snscc(*words: object) -> None:
    """Run a command with its output shown. Raises CalledProcessError if it fails."""
    print("$ snscc", *words, flush=True)
    subprocess.run([sys.executable, "-m", "snscc_ray", *map(str, words)], check=True)


def run(dataset: Dataset, data: Path, out: Path, seeds: int, spaces: list[str]) -> None:
    """Compute the features of a dataset, and run every sweep on them."""
    recipe: str | Path = "digits"
    if dataset.folder is not None:
        recipe = out / dataset.name
        snscc(
            "fit", data / dataset.folder, "--clusters", dataset.clusters, "--labels",
            "--out", recipe, *dataset.options,
        )  # fmt: skip
    for space in spaces:
        folder = out / f"{dataset.name}-{space}"
        snscc("sweep", space, "--recipe", recipe, "--seeds", seeds, "--out", folder)


def verdicts(dataset: Dataset, out: Path, spaces: list[str]) -> list[dict[str, Any]]:
    """Judge the claims of each finished sweep, by ACC."""
    found = []
    for space in spaces:
        if not (rows := rows_of(dataset, out, space)):
            continue
        for claim in load(space)(recipe_of(dataset, out)).claims:
            verdict = asdict(judge(claim, rows, "oracle/acc"))
            found.append(
                {"dataset": dataset.name, "space": space, "claim": claim.text, **verdict}
                | {"best": claim.best, "where": claim.where}
            )
    return found


def rows_of(dataset: Dataset, out: Path, space: str) -> list[dict[str, Any]]:
    """Return the trials of a finished sweep; none if it has not run."""
    path = out / f"{dataset.name}-{space}" / "results.parquet"
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist() if path.exists() else []
    return found


def recipe_of(dataset: Dataset, out: Path) -> Recipe:
    return recipes.get("digits") if dataset.folder is None else read_recipe(out / dataset.name)


def markdown(found: list[dict[str, Any]], left_out: list[str]) -> str:
    """Return a table with a line per claim and a column per dataset."""
    names = list(dict.fromkeys(one["dataset"] for one in found))
    lines = [f"| claim | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for where, claim in dict.fromkeys((one["where"], one["claim"]) for one in found):
        cells = {one["dataset"]: cell(one) for one in found if one["claim"] == claim}
        lines.append(f"| {claim} ({where}) | {' | '.join(cells.get(n, '–') for n in names)} |")
    lines += [f"\nLeft out, as it is not there: {name}." for name in left_out]
    return "\n".join(lines) + "\n"


def cell(one: dict[str, Any]) -> str:
    """Return the outcome, and by how much the claimed point is better than the best other one."""
    if one["difference"] is None:
        return str(one["outcome"])
    interval = "" if one["interval"] is None else f" ± {one['interval']:.3f}"
    return f"{one['outcome']}: {one['difference']:+.3f}{interval} against {one['rival']}"


def experiment(name: str, datasets: Sequence[Dataset], out: Path) -> str:
    """Draw an experiment on all datasets; return its table of ACC, mean ± deviation over seeds."""
    spaces = [load(name)(recipe_of(one, out)) for one in datasets]
    trials = [rows_of(one, out, name) for one in datasets]
    # The labels of some points differ, as they hold the recipe's epochs.
    labels = [labels_of(rows) for rows in trials]
    points = [" / ".join(dict.fromkeys(same)) for same in zip(*labels, strict=True)]
    stages = spaces[0].stages
    heads = [f"{one.name}, {STAGE_NAMES[stage]}" for one in datasets for stage in stages]
    columns = [
        [list(by_seed(rows, label, stage, "oracle/acc").values()) for label in own]
        for rows, own in zip(trials, labels, strict=True)
        for stage in stages
    ]
    lines = [f"| {spaces[0].axis} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for place, point in enumerate(points):
        cells = [spread(column, place) for column in columns]
        lines.append(f"| {point} | {' | '.join(cells)} |")
    draw(spaces[0], points, heads, columns, out / f"{name}.png")
    return f"## {spaces[0].title} ({spaces[0].where})\n\n" + "\n".join(lines)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(column: list[list[float]], place: int) -> str:
    """Return mean ± deviation of a point; the highest mean of the column is bold."""
    means = [statistics.mean(values) for values in column]
    text = f"{means[place]:.3f} ± {deviation(column[place]):.3f}"
    return f"**{text}**" if means[place] == max(means) else text


def draw(
    space: Space,
    points: Sequence[str],
    heads: Sequence[str],
    columns: Sequence[list[list[float]]],
    path: Path,
) -> None:
    """Draw one panel per column: a dot for each seed, and a line through the means."""
    figure, panels = pyplot.subplots(
        1, len(heads), figsize=(2.6 * len(heads), 2.8), squeeze=False, layout="constrained"
    )
    short = [point.replace(" + ", "\n+ ").replace(" / ", "\n") for point in points]
    for panel, head, column in zip(panels[0], heads, columns, strict=True):
        for place, values in enumerate(column):
            panel.plot([place] * len(values), values, "o", color="C0", alpha=0.6, markersize=4)
        panel.plot([statistics.mean(values) for values in column], "-", color="C0")
        panel.set_title(head, fontsize=9)
        panel.set_xticks(range(len(points)), short, fontsize=7)
        panel.tick_params(axis="y", labelsize=7)
        panel.set_xlabel(space.axis, fontsize=8)
    panels[0][0].set_ylabel("ACC", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(datasets: list[Dataset], left_out: list[str], out: Path, spaces: list[str]) -> str:
    """Judge the finished sweeps, and write the files. Returns the text of science.md."""
    found = [one for dataset in datasets for one in verdicts(dataset, out, spaces)]
    record = {
        "machine": describe_machine(torch.get_num_threads()),
        "revision": revision(),
        "verdicts": found,
        "trials": [
            {"dataset": dataset.name, "space": space, "point": row["point"], "seed": row["seed"]}
            | {name: row[name] for name in row if name.endswith(ORACLE) and row[name] is not None}
            for dataset in datasets
            for space in spaces
            for row in rows_of(dataset, out, space)
        ],
    }
    (out / "claims.json").write_text(json.dumps(record, indent=1) + "\n")
    parts = [markdown(found, left_out)]
    for space in spaces:
        swept = [dataset for dataset in datasets if rows_of(dataset, out, space)]
        if swept:
            parts.append(experiment(space, swept, out))
    text = "\n\n".join(parts) + "\n"
    (out / "science.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the datasets")
    parser.add_argument("--out", type=Path, default=Path("runs/science"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--datasets", default=",".join(one.name for one in DATASETS))
    parser.add_argument("--spaces", default=",".join(SPACES))
    arguments = parser.parse_args()
    spaces = arguments.spaces.split(",")
    asked = [one for one in DATASETS if one.name in arguments.datasets.split(",")]
    there = [one for one in asked if one.folder is None or (arguments.data / one.folder).is_dir()]
    for dataset in there:
        run(dataset, arguments.data, arguments.out, arguments.seeds, spaces)
    print(write(there, [one.name for one in asked if one not in there], arguments.out, spaces))


if __name__ == "__main__":
    main()
