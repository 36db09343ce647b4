"""The paper's experiments (Section IV-D and IV-E) on four datasets, and each of its claims judged.

python -m benchmarks.science DATA --out runs/science

DATA holds the folders imagenette-96, cifar10-jpeg and cifar100-jpeg; digits needs none. On the
photographs the encoder is frozen and was trained on ImageNet with labels: EfficientNet-Lite0 on
Imagenette, Lite2 on the smaller photographs of CIFAR, of which the first 15,000 are used. Its
features are computed once per dataset, by `snscc fit`, and every sweep starts from them. A dataset
that is not there is left out, and the table says so. The same command continues a stopped one.

Writes claims.json and claims.md: for each claim and dataset, whether it holds and by how much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.report import describe_machine, revision
from snscc_ray.config import recipes
from snscc_ray.config.settings import Recipe
from snscc_ray.runs.folder import read_recipe
from snscc_ray.sweep.verdicts import judge
from tune_spaces import load

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
        rows = pq.read_table(out / f"{dataset.name}-{space}" / "results.parquet").to_pylist()
        for claim in load(space)(recipe_of(dataset, out)).claims:
            verdict = asdict(judge(claim, rows, "oracle/acc"))
            found.append(
                {"dataset": dataset.name, "space": space, "claim": claim.text, **verdict}
                | {"best": claim.best, "where": claim.where}
            )
    return found


def recipe_of(dataset: Dataset, out: Path) -> Recipe:
    return recipes.get("digits") if dataset.folder is None else read_recipe(out / dataset.name)


def markdown(found: list[dict[str, Any]], left_out: list[str]) -> str:
    """Return a table with a line per claim and a column per dataset."""
    names = list(dict.fromkeys(one["dataset"] for one in found))
    lines = [f"| claim | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for where, claim in dict.fromkeys((one["where"], one["claim"]) for one in found):
        cells = []
        for name in names:
            for one in found:
                if (one["dataset"], one["claim"]) == (name, claim):
                    cells.append(cell(one))
        lines.append(f"| {claim} ({where}) | {' | '.join(cells)} |")
    lines += [f"\nLeft out, as it is not there: {name}." for name in left_out]
    return "\n".join(lines) + "\n"


def cell(one: dict[str, Any]) -> str:
    """Return the outcome, and by how much the claimed point is better than the best other one."""
    if one["difference"] is None:
        return str(one["outcome"])
    interval = "" if one["interval"] is None else f" ± {one['interval']:.3f}"
    return f"{one['outcome']}: {one['difference']:+.3f}{interval} against {one['rival']}"


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
    found = [one for dataset in there for one in verdicts(dataset, arguments.out, spaces)]
    record = {
        "machine": describe_machine(torch.get_num_threads()),
        "revision": revision(),
        "seeds": arguments.seeds,
        "verdicts": found,
    }
    (arguments.out / "claims.json").write_text(json.dumps(record, indent=2) + "\n")
    table = markdown(found, [one.name for one in asked if one not in there])
    (arguments.out / "claims.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
