"""In what form a GPU gets the work: bfloat16 forward, float32 losses, channels last, fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from snscc_ray.answers.features import answering
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.sources import load_images
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.schedules import build_optimizer
from snscc_ray.training.stages.objectives import OBJECTIVES, Predictions, neighborhood
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


def test_float32_on_a_gpu_is_not_tf32(context: Context) -> None:
    def inside(device: str, precision: str) -> tuple[str, str]:
        recipe = override(context.recipe, [f"precision={precision}"])
        with replace(context, recipe=recipe, device=torch.device(device)).float32_as_asked():
            return settings()

    def settings() -> tuple[str, str]:
        cudnn: Any = torch.backends.cudnn
        return cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    before = settings()
    assert inside("cuda", "float32") == ("ieee", "ieee")
    assert settings() == before
    assert inside("cuda", "auto") == inside("cpu", "auto") == before


def test_train_in_autocast_attracts_to_what_was_said_not_to_rounded_numbers(tiny: Recipe) -> None:
    recipe = override(tiny, ["precision=bfloat16", "train.mined_from=predictions"])
    stage = train(make_context(recipe, load_images(recipe.data)))
    generator = torch.Generator().manual_seed(0)
    stage._p_NHC = torch.randn(stage._p_NHC.shape, generator=generator).softmax(2)
    rows_B = torch.arange(16)
    chance_BK, near_BK = stage._chance_NK[rows_B], stage._neighbors_NK[rows_B]
    p_BKHC = stage._p_NHC[near_BK].double()
    want_HBC = (chance_BK.double()[:, :, None, None] * p_BKHC).sum(1).transpose(0, 1)
    with stage.context.autocast():
        found_HBC = stage._mined_HBC([], rows_B)
    assert found_HBC is not None and found_HBC.dtype == torch.float32
    torch.testing.assert_close(found_HBC.double(), want_HBC, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_autocast_does_not_round_an_objective(objective: str, tiny: Recipe) -> None:
    settings = override(tiny, [f"train.objective={objective}"]).train
    generator = torch.Generator().manual_seed(0)
    z_BD, augmented_BD = torch.randn(2, 24, 8, generator=generator)
    p_HBC, q_HBC, mined_HBC = torch.randn(3, 2, 24, 5, generator=generator).softmax(3)

    def terms() -> dict[str, Tensor]:
        near = neighborhood(z_BD, augmented_BD, settings)
        return OBJECTIVES[objective](Predictions(p_HBC, q_HBC, mined_HBC), near, settings)

    want = terms()
    with torch.autocast("cpu", torch.bfloat16):
        found = terms()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_gpu_run_is_answered_on_a_cpu_in_float32_and_says_how_far_that_is(tiny: Recipe) -> None:
    held = {
        "precision": "bfloat16",
        "in_float32": {"rows": 2048, "same_cluster": 0.9995, "largest_difference": 0.0131},
    }
    recipe, caveat = answering(tiny, held, torch.device("cpu"))
    assert recipe.precision == "float32"
    assert caveat is not None
    for part in ("bfloat16", "2,048 images", "99.95%", "0.013"):
        assert part in caveat
    assert answering(tiny, held, torch.device("cuda"))[0].precision == "bfloat16"
    assert answering(tiny, held, torch.device("cuda"))[1] is None
    own = {"precision": "float32", "in_float32": {}}
    assert answering(tiny, own, torch.device("cuda"))[0].precision == "float32"
    assert answering(tiny, {}, torch.device("cpu")) == (tiny, None)
    told = override(tiny, ["precision=bfloat16"])
    assert answering(told, held, torch.device("cpu")) == (told, None)


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
    views = stage.viewer(0)(batch.inputs, batch.drawing_rows_B)
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
