"""Phase 3: CIFAR-10 through Pretrain, Train and Boost, over several sittings if needed.

The first sitting fixes the epochs of all stages, so that the learning-rate schedule spans all
sittings. SIGTERM stops at the next step, with a checkpoint. Labels only measure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.report import revision
from snscc_ray.config import recipes
from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core import storage
from snscc_ray.runs.folder import read_recipe, write_recipe
from snscc_ray.runs.local import run_here
from snscc_ray.runs.run import Request
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import LocalWorker

_RECIPE = "cifar10_best"
_SITTINGS = "sittings.json"
# The target, reduced in proportion if the sittings are too short for it.
EPOCHS = {"pretrain": 500, "train": 50, "boost": 30}
# Time of a sitting outside epochs: imports, decoding, k-means, mining.
_ONCE_SECONDS = 30.0
STOPPED = 75  # exit status of a run to be resumed in another sitting

# Batch sizes that divide 60,000, so that all steps of a stage have the same shape.
_SETTINGS = (
    "pretrain.batch_size=500",
    "train.batch_size=500",
    "boost.batch_size=1000",
    "train.mined_from=predictions",
    "runtime.checkpoint_seconds=30",
)
_TINY = (
    "encoder.name=convnet",
    "encoder.width=8",
    "pretrain.projection_hidden=32",
    "pretrain.projection_dim=16",
    "pretrain.batch_size=100",
    "train.batch_size=100",
    "boost.batch_size=200",
    "data.limit=600",
    "runtime.checkpoint_seconds=1",
)


def recipe_for(*, tiny: bool) -> Recipe:
    """Return the recipe of this phase; tiny: a network and dataset that take a CPU a minute."""
    return override(recipes.get(_RECIPE), [*_SETTINGS, *(_TINY if tiny else ())])


def epochs_that_fit(
    speeds: dict[str, float], rows: int, seconds: float, sittings: int
) -> dict[str, int]:
    """Return EPOCHS, reduced in proportion if needed to fit `sittings` sittings of `seconds`.

    speeds: measured images per second of each stage; if one is missing, EPOCHS is returned.
    """
    if not all(stage in speeds for stage in STAGES):
        return dict(EPOCHS)
    needed = sum(rows * EPOCHS[stage] / speeds[stage] for stage in STAGES)
    share = min(1.0, sittings * max(seconds - _ONCE_SECONDS, 1) / needed)
    return {stage: max(1, int(share * epochs)) for stage, epochs in EPOCHS.items()}


def speeds_in(file: Path) -> dict[str, float]:
    """Read images per second of our stages from the file that phase 2 wrote."""
    if not file.exists():
        return {}
    rows = json.loads(file.read_text())["results"]
    return {row["what"]: row["images_per_second"] for row in rows if row["what"] in STAGES}


def pays(file: Path) -> bool:
    """Return whether phase 2 measured the compiled network as over a twentieth faster."""
    if not file.exists():
        return False
    rows = json.loads(file.read_text())["results"]
    speed = {row["what"]: row["images_per_second"] for row in rows}
    return bool(speed.get("pretrain compiled", 0) > 1.05 * speed.get("pretrain", torch.inf))


class _Sitting(LocalWorker):
    """A worker that records with every checkpoint how long this sitting has run."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        path = folder / _SITTINGS
        self.former = storage.read_json(path) if path.exists() else []
        self.began = time.monotonic()
        self.own: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "revision": revision(),
        }

    def report(
        self, stage: str, metrics: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        super().report(stage, metrics, checkpoint)
        self.own["seconds"] = round(time.monotonic() - self.began, 1)
        storage.write_json(self.folder / _SITTINGS, [*self.former, self.own])


def request_for(arguments: argparse.Namespace) -> Request:
    """Make a request for a new run with epochs that fit, or to resume the one in the folder."""
    run: Path = arguments.run
    place = [f"data.path={json.dumps(str(arguments.data))}"]
    if (run / "recipe.json").exists():
        write_recipe(run, override(read_recipe(run), place))
        return Request(None, [], run, resume=True)
    recipe = recipe_for(tiny=arguments.tiny)
    rows = recipe.data.limit or 60_000
    fits = epochs_that_fit(speeds_in(arguments.speed), rows, arguments.seconds, arguments.sittings)
    if arguments.tiny:
        fits = {"pretrain": 40, "train": 10, "boost": 5}
    settings = [f"{stage}.epochs={epochs}" for stage, epochs in fits.items()]
    tiny = _TINY if arguments.tiny else ()
    compiled = f"runtime.compile={str(pays(arguments.speed)).lower()}"
    return Request(_RECIPE, [*_SETTINGS, *tiny, *settings, *place, compiled], run)


def progress(run: Path) -> dict[str, Any]:
    """Return the state of a run: epochs done and figures of each stage so far."""
    if not (run / "recipe.json").exists():
        return {"finished": False, "stages": {}}
    recipe = read_recipe(run)
    lines = []
    if (run / "metrics.jsonl").exists():
        text = (run / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    stages: dict[str, Any] = {}
    for stage in STAGES:
        own = [line for line in lines if line["stage"] == stage and "images_per_second" in line]
        if not own:
            continue
        speeds = sorted(line["images_per_second"] for line in own)
        record = run / stage / "stage.json"
        stages[stage] = {
            "epochs_done": len({line["epoch"] for line in own}),
            "epochs": getattr(recipe, stage).epochs,
            "images_per_second": speeds[len(speeds) // 2],
            "figures": storage.read_json(record)["figures"] if record.exists() else None,
            "last_epoch": own[-1],
        }
    held = run / _SITTINGS
    return {
        "finished": (run / "metrics.json").exists(),
        "seed": recipe.seed,
        "sittings": storage.read_json(held) if held.exists() else [],
        "stages": stages,
        "settings": recipe.model_dump(mode="json", exclude={"data": {"path"}}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: shards, or torchvision")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--speed", type=Path, required=True, help="what phase 2 wrote")
    parser.add_argument("--seconds", type=float, required=True, help="of this sitting")
    parser.add_argument("--sittings", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    compiled = arguments.run / "compiled.bin"
    if compiled.exists():
        torch.compiler.load_cache_artifacts(compiled.read_bytes())
    try:
        run_here(request_for(arguments), Console(), _Sitting)
    except (UserError, TrainingError) as error:
        sys.exit(f"cifar10: {error}")
    except (Interrupted, KeyboardInterrupt):
        print("cifar10: stopped; another sitting goes on")
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
