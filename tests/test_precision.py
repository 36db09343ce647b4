"""In what form a GPU gets the work: bfloat16 forward, float32 losses, channels last, fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snscc_ray.config import Recipe
from snscc_ray.data.imageset import ImageSet
from snscc_ray.overrides import override
from snscc_ray.schedules import build_optimizer
from snscc_ray.stages.context import Context, Stage
from tests.conftest import make_context
from tests.test_waiting import boost, pretrain, train


@pytest.mark.parametrize(
    ("device", "precision", "mixed"),
    [
        ("cuda", "auto", True),
        ("cuda", "float32", False),
        ("cpu", "auto", False),
        ("cpu", "bfloat16", True),
    ],
)
def test_a_gpu_computes_in_bfloat16_unless_told_otherwise(
    device: str, precision: str, mixed: bool, context: Context
) -> None:
    recipe = override(context.recipe, [f"precision={precision}"])
    assert replace(context, recipe=recipe, device=torch.device(device)).mixed == mixed


@pytest.mark.parametrize("build", [pretrain, train, boost])
def test_the_encoder_runs_in_bfloat16_and_the_losses_in_float32(
    build: Callable[[Context], Stage], tiny: Recipe, tiny_images: ImageSet
) -> None:
    # Three channels: of one channel every layout is the same.
    images = tiny_images.images.expand(-1, 3, -1, -1).contiguous()
    settings = ["precision=bfloat16", "data.channels=3", "data.mean=[0.3,0.3,0.3]"]
    recipe = override(tiny, [*settings, "data.std=[0.4,0.4,0.4]"])
    context = make_context(recipe, replace(tiny_images, images=images))
    stage = build(context)
    if hasattr(stage, "_p_NHC"):
        stage._p_NHC = None
    stage.begin_epoch(0)
    seen: list[Tensor] = []
    first = stage.network.encoder.layers[0]
    first.register_forward_hook(lambda layer, given, out: seen.extend((*given, out)))
    batch = next(context.data.epoch(32, 7))
    views = stage.viewer(0)(batch.images_BCHW, batch.drawing_rows_B)
    with context.autocast():
        terms = stage.step(stage.network, views, batch)
    given, out = seen
    assert out.dtype == torch.bfloat16
    for tensor in (given, first.weight, out):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    assert all(term.dtype == torch.float32 for term in terms.values())
    optimizer = build_optimizer(stage.settings, stage.network)
    assert optimizer.defaults["fused"] is True
