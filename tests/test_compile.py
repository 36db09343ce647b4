"""A compiled run trains what an uncompiled one does, and leaves the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe
from snscc_ray.core import checkpoints
from snscc_ray.data.imageset import ImageSet
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training.workers import LocalWorker
from tests.conftest import execute_on


class Losses(NullMonitor):
    def __init__(self) -> None:
        self.values: list[float] = []

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self.values.append(figures["loss/total"])


@pytest.mark.slow  # it compiles for half a minute
def test_a_compiled_stage_has_the_losses_and_the_names_of_an_uncompiled_one(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    found: dict[bool, tuple[list[float], list[str]]] = {}
    for compiled in (False, True):
        settings = ["pretrain.batch_size=100", "pretrain.epochs=2"]
        recipe = override(tiny, [*settings, f"runtime.compile={str(compiled).lower()}"])
        folder, monitor = tmp_path / str(compiled), Losses()
        worker = LocalWorker(folder, torch.device("cpu"))
        execute_on(recipe, tiny_images, folder, worker, monitor, ("pretrain",))
        final = checkpoints.load(folder / "pretrain" / "final.pt")["network"]
        found[compiled] = monitor.values, list(final)
    assert found[True][1] == found[False][1]
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-4)
