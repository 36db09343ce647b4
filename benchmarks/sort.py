"""`snscc sort` on 20,000 small files: planning, linking, copying and moving them, and undoing it.

The run is of untrained weights, as the speed does not depend on the groups. After each undo, names,
bytes, times of change and inodes of all images are those from before.

    python -m benchmarks.sort [--out FILE] [--images 20000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.report import describe_machine, print_table, save
from snscc_ray.answers.carry import carry_out
from snscc_ray.answers.journal import Action, undo
from snscc_ray.answers.sort import SortRequest, folders_to_make, make_plan
from snscc_ray.core.display import Display
from snscc_ray.runs.local import run_here
from snscc_ray.runs.run import Request

SETTINGS = [
    "data.image_size=8", "data.num_clusters=3", "encoder.name=convnet", "encoder.width=4",
    "train.view.cutout=2", "boost.view.cutout=2", "runtime.device=cpu",
    *(f"{stage}.epochs=0" for stage in ("pretrain", "train", "boost")),
]  # fmt: skip
QUIET = Console(quiet=True)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {str(path): (at.st_ino, at.st_size, at.st_mtime_ns) for path, at in found}


def measure(place: Path, run: Path, action: Action) -> dict[str, object]:
    display = Display(QUIET)
    before = state(place / "images")
    request = SortRequest(run, place / action, action)
    began = time.monotonic()
    plan = make_plan(request, display)
    planned = time.monotonic()
    made = folders_to_make(request.into)
    request.into.mkdir()
    carry_out(plan, request, made, display)
    done = time.monotonic()
    found = undo(request.into, lambda done, total: None)
    undone = time.monotonic()
    count = len(plan.items)
    return {
        "action": action,
        "images": count,
        "planned_per_second": round(count / (planned - began)),
        "done_per_second": round(count / (done - planned)),
        "undone_per_second": round(count / (undone - done)),
        "exact": state(place / "images") == before and found.done == count and not found.left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="save the figures as JSON")
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        draw = np.random.default_rng(0)
        for number in range(arguments.images):
            folder = place / "images" / f"{number % 50:02}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number // 50:05}.png")
        run = place / "run"
        run_here(Request("images", [*SETTINGS, f"data.path={place / 'images'}"], run), QUIET)
        actions: tuple[Action, ...] = ("link", "copy", "move")
        rows = [measure(place, run, action) for action in actions]
    print_table(rows)
    if arguments.out:
        save(arguments.out, describe_machine(1), rows)


if __name__ == "__main__":
    main()
