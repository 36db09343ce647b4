"""What the pretext methods hold, follow and warn of; their losses are tested in test_losses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe
from snscc_ray.core.clustering import metrics
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import Batch
from snscc_ray.data.sources import load_images
from snscc_ray.runs.identity import stage_identity
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training.stages.pretext.byol import Byol, momentum
from snscc_ray.training.stages.pretrain import Pretrain
from snscc_ray.training.workers import LocalWorker
from tests.conftest import execute_on, make_context, shards


class Spreads(NullMonitor):
    def __init__(self) -> None:
        self.found: list[float] = []

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self.found.append(figures["health/projection_spread"])
        if len(self.found) == 2:
            raise StopIteration


def byol_stage(tiny: Recipe, images: ImageSet, *assignments: str) -> Pretrain:
    torch.manual_seed(0)
    recipe = override(tiny, ["pretrain.method=byol", *assignments])
    return Pretrain(make_context(recipe, images))


def byol(stage: Pretrain) -> Byol:
    assert isinstance(stage.pretext, Byol)
    return stage.pretext


def step(stage: Pretrain) -> Tensor:
    rows_B = torch.arange(32)
    batch = Batch(stage.context.data.take(rows_B), rows_B, 32)
    views = stage.viewer(0)(batch.inputs, rows_B)
    return stage.step(stage.network, views, batch)["instance"]


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_finished_stages_of_the_first_methods_are_found_again(method: str) -> None:
    """Written down: another hash would train every finished stage again."""
    recipe = override(recipes.get("digits"), [f"pretrain.method={method}"])
    assert (
        stage_identity(recipe, "pretrain", "pixels", "order")
        == {
            "simclr": "0dde3c07959b3e8090e5868950589b81",
            "moco": "6608b76ab87ced05df7891c0d58e23bb",
        }[method]
    )


def test_byols_momentum_rises_by_a_cosine_to_one() -> None:
    assert momentum(0.96, 0) == pytest.approx(0.96)
    assert momentum(0.96, 0.25) == pytest.approx(1 - 0.04 * (2**-0.5 + 1) / 2)
    assert momentum(0.96, 0.5) == pytest.approx(0.98)
    assert momentum(0.96, 1) == 1


def test_byols_target_follows_encoder_and_projection(tiny: Recipe, tiny_images: ImageSet) -> None:
    stage = byol_stage(tiny, tiny_images, "pretrain.key_momentum=0.9")
    target = byol(stage).target
    before = {name: weight.clone() for name, weight in target.named_parameters()}
    own = dict(stage.network.named_parameters())
    assert own.keys() - before.keys() == {n for n in own if n.startswith("predictor.")} != set()
    with torch.no_grad():
        for weight in own.values():
            weight.add_(1)
    stage.after_step()
    done = 1 / (3 * 7)  # three epochs of seven steps
    share = 0.1 * (math.cos(math.pi * done) + 1) / 2
    for name, weight in target.named_parameters():
        torch.testing.assert_close(weight, before[name] + share)


def test_byol_teaches_the_network_and_not_its_target(tiny: Recipe, tiny_images: ImageSet) -> None:
    stage = byol_stage(tiny, tiny_images)
    step(stage).backward()
    assert all(weight.grad is None for weight in byol(stage).target.parameters())
    for name, weight in stage.network.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        # A bias in front of a batch norm moves nothing.
        assert weight.grad.abs().max() > 0 or name.endswith(".0.bias"), name


def test_a_collapsed_byol_is_warned_of(tiny: Recipe, tiny_images: ImageSet) -> None:
    stage = byol_stage(tiny, tiny_images)
    step(stage)
    assert metrics.warnings(stage.end_epoch(0), 10) == {}
    with torch.no_grad():
        for network in (stage.network, byol(stage).target):
            network.projection[-1].weight.mul_(1e-4)
            network.projection[-1].bias.fill_(1)
    step(stage)
    assert "projection-collapse" in metrics.warnings(stage.end_epoch(0), 10)


@pytest.mark.slow  # a step small enough to be quick does not collapse every time
def test_warm_up_keeps_the_papers_rate_from_a_collapse(tmp_path: Path) -> None:
    recipe = override(
        recipes.get("cifar10"),
        [
            f"data.path={shards('cifar10-jpeg')}",
            "data.limit=2000",
            "encoder.name=convnet",
            "encoder.width=16",
            "runtime.device=cpu",
        ],
    )
    images = load_images(recipe.data)

    def spreads(folder: Path, *assignments: str) -> list[float]:
        monitor, worker = Spreads(), LocalWorker(folder, torch.device("cpu"))
        with pytest.raises(StopIteration):  # two epochs of the whole schedule are enough
            execute_on(override(recipe, assignments), images, folder, worker, monitor)
        return monitor.found

    assert min(spreads(tmp_path / "warm")) > 0.3
    assert max(spreads(tmp_path / "cold", "pretrain.warmup_epochs=0")) < 0.1


def test_knn_accuracy_is_measured_where_there_are_labels(
    tiny: Recipe, tiny_images: ImageSet
) -> None:
    context = make_context(tiny, tiny_images)
    figures = Pretrain(context).finish()
    assert 0.1 < figures["oracle/knn_acc"] <= 1
    unlabelled = Pretrain(
        type(context)(context.recipe, context.data, None, context.normalize, context.device)
    )
    assert not [name for name in unlabelled.finish() if name.startswith("oracle/")]
