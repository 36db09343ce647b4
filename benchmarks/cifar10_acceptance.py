"""CIFAR-10 through all stages within a time, unattended: the command for the day a GPU is at hand.

    python -m benchmarks.cifar10_acceptance --minutes 30 --data DIR --out runs/c10

The same command goes on where a kill left it, and does nothing but say the figures once it is
done. With `--split-checkpoints 15` checkpoints above 15 MiB also lie in pieces, from which they are
put together again: a run folder without the files that have pieces is enough to go on elsewhere.
The figures are in OUT/acceptance.json. Labels only measure. No Ray and no faiss is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.report import describe_machine, print_table, revision
from snscc_ray import checkpoints
from snscc_ray.config import STAGES, Recipe
from snscc_ray.engine import Interrupted
from snscc_ray.errors import TrainingError, UserError
from snscc_ray.local import run_here
from snscc_ray.overrides import override
from snscc_ray.pieces import MIB, join_missing, split_large
from snscc_ray.run import Request
from snscc_ray.run_folder import read_recipe, write_recipe
from snscc_ray.workers import LocalWorker

_SITTINGS, _REPORT = "sittings.json", "acceptance.json"


class _Sitting:
    """How long this process has worked on the run, kept with every checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _SITTINGS
        self.former = checkpoints.read_json(self.path) if self.path.exists() else []
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.began = time.monotonic()
        self.device = "?"

    def note(self) -> None:
        own = {
            "started": self.started,
            "seconds": round(time.monotonic() - self.began, 1),
            "device": self.device,
            "revision": revision(),
        }
        checkpoints.write_json(self.path, [*self.former, own])


class _Worker(LocalWorker):
    def __init__(
        self, folder: Path, device: torch.device, *, sitting: _Sitting, piece: int | None
    ) -> None:
        super().__init__(folder, device)
        self.sitting, self.piece = sitting, piece
        cuda = device.type == "cuda"
        sitting.device = torch.cuda.get_device_name(device) if cuda else device.type

    def report(
        self, stage: str, metrics: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        super().report(stage, metrics, checkpoint)
        if checkpoint is not None:
            self.sitting.note()
            if self.piece:
                split_large(self.folder, self.piece)


def request_for(arguments: argparse.Namespace) -> Request:
    """A new run within the time, or the one in the folder, its images read from where they are.

    Raises UserError where the folder's run is of other settings.
    """
    folder: Path = arguments.out
    place = f"data.path={json.dumps(str(arguments.data))}"
    settings = [*arguments.settings, f"seed={arguments.seed}", place]
    if not (folder / "recipe.json").exists():
        return Request(arguments.recipe, settings, folder, budget=60 * arguments.minutes)
    held = override(read_recipe(folder), [place])
    lasting = [setting for setting in settings if ".epochs=" not in setting]  # those were chosen
    if held.name != arguments.recipe or override(held, lasting) != held:
        raise UserError(f"{folder} holds a run of other settings; use another --out")
    join_missing(folder)
    write_recipe(folder, held)
    return Request(None, [], folder, resume=True)


def rows_of(figures: dict[str, Any], folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """A line for k-means on pixels, and for each stage (Pretrain: k-means on its features)."""
    rows = []
    if baseline := figures["baselines"].get("kmeans_pixels"):
        rows.append({"what": "kmeans_pixels", **_row(baseline), "epochs": 0})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage, name in zip(STAGES, ("pretrain+kmeans", "train", "boost"), strict=True):
        speeds = sorted(
            line["images_per_second"]
            for line in lines
            if line["stage"] == stage and "images_per_second" in line
        )
        row = {"what": name, **_row(figures["stages"][stage])}
        row["epochs"] = getattr(recipe, stage).epochs
        row["images_per_second"] = speeds[len(speeds) // 2] if speeds else None
        rows.append(row)
    return rows


def _row(figures: dict[str, Any]) -> dict[str, Any]:
    names = {"acc": "oracle/acc", "nmi": "oracle/nmi", "ari": "oracle/ari"}
    labelled = {short: figures.get(name) for short, name in names.items()}
    label_free = {"score": figures.get("health/score")}
    return {**labelled, **label_free, "seconds": figures.get("seconds")}


def run(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.out
    request = request_for(arguments)
    if (folder / _REPORT).exists():
        _show(checkpoints.read_json(folder / _REPORT), folder)
        return
    sitting = _Sitting(folder)
    piece = arguments.split_checkpoints * MIB if arguments.split_checkpoints else None
    make_worker = partial(_Worker, sitting=sitting, piece=piece)
    result = run_here(request, Console(), make_worker)
    assert result is not None
    sitting.note()
    if piece:
        split_large(folder, piece)
    recipe = read_recipe(folder)
    sittings = checkpoints.read_json(folder / _SITTINGS)
    rows = rows_of(result.figures, folder, recipe)
    report = {
        **describe_machine(torch.get_num_threads()),
        "device": sitting.device,
        "revision": revision(),
        "images": str(arguments.data.name),
        "rows": result.figures["rows"],
        "seed": recipe.seed,
        "minutes_asked": arguments.minutes,
        "seconds_in_all": round(sum(one["seconds"] for one in sittings), 1),
        # Of more than one: a stage's seconds are those of the sitting that finished it.
        "sittings": sittings,
        "settings": recipe.model_dump(mode="json", exclude={"data": {"path"}}),
        "results": rows,
    }
    checkpoints.write_json(folder / _REPORT, report)
    _show(report, folder)


def _show(report: dict[str, Any], folder: Path) -> None:
    print_table(report["results"])
    print(f"{report['seconds_in_all']:.0f} s in {len(report['sittings'])} sitting(s); {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, required=True, help="that all of it may take")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: shards, or torchvision")
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split-checkpoints", type=int, metavar="MIB", help="pieces of this size")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="F=V")
    try:
        run(parser.parse_args())
    except (UserError, TrainingError) as error:
        sys.exit(f"cifar10_acceptance: {error}")
    except (Interrupted, KeyboardInterrupt):
        sys.exit("cifar10_acceptance: stopped; the same command goes on")


if __name__ == "__main__":
    main()
