"""How speed is measured: what counts as an operation, and sides that take turns."""

from __future__ import annotations

import pytest
import torch

from benchmarks.epoch import context_for, noise, stage_for, views_of
from benchmarks.throughput import Side, flops_per_image, measure, peak_flops
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, StageName

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", STAGES)
def test_flops_are_those_of_the_encoder_forward_and_backward(name: StageName) -> None:
    recipe = override(
        recipes.get("cifar10"), ["encoder.name=convnet", "encoder.width=2", "data.image_size=8"]
    )
    context = context_for(recipe, noise(recipe, 32), CPU)
    found = flops_per_image(stage_for(name, context).network, context, views_of(recipe, name))
    # Multiply and add are two; backward is twice forward, but for the images' own gradient.
    macs = [3 * 2 * 64, 2 * 2 * 64, 2 * 4 * 16, 4 * 4 * 16, 4 * 8 * 4, 8 * 8 * 4]
    encoder = sum(2 * 9 * mac * (2 if index == 0 else 3) for index, mac in enumerate(macs))
    head = 8 * 512 + 512 * 128 if name == "pretrain" else 8 * 10 * (3 if name == "train" else 1)
    assert found == pytest.approx(views_of(recipe, name) * (encoder + 3 * 2 * head))


def test_sides_are_measured_in_turns_and_compared_within_a_round() -> None:
    calls: list[str] = []
    sides = [
        Side(name, 8, lambda name=name: calls.append(name), "bare pretrain")  # type: ignore[misc]
        for name in ("bare pretrain", "pretrain", "lightly")
    ]
    rows = measure(sides, {}, 2, CPU)
    assert calls == ["bare pretrain", "pretrain", "lightly"] * 3  # the first round does not count
    assert rows[0]["share"] == 1 and rows[2]["x lightly"] == 1
    assert rows[0]["x torchvision"] is None and rows[0]["utilisation"] is None
    assert peak_flops(CPU) is None
