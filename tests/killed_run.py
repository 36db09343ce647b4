"""A run in a process of its own that is killed, without warning, in the middle of an epoch.

python -m tests.killed_run FOLDER STAGE STEP [SETTING=VALUE ...]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.data.sources import load_images
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training.workers import LocalWorker
from tests.conftest import execute_on


class Killer(NullMonitor):
    """Kills this process at the given step of the given stage; step 0 never comes."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step, self.steps = stage, step, 0

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self.current, self.steps = stage, 0

    def advance(self) -> None:
        self.steps += 1
        if (self.current, self.steps) == (self.stage, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, stage: str, step: str, *overrides: str) -> None:
    """The run of `digits` with those settings, in this folder."""
    torch.set_num_threads(int(os.environ["THREADS"]))
    recipe = override(recipes.get("digits"), list(overrides))
    worker = LocalWorker(Path(folder), torch.device("cpu"))
    images = load_images(recipe.data)
    execute_on(recipe, images, Path(folder), worker, Killer(stage, int(step)))


if __name__ == "__main__":
    main(*sys.argv[1:])
