"""A whole epoch against the same forward and backward passes with nothing else around them.

`whole` is the engine's loop for the first epoch of a stage: batches, views, losses, neighbour
search, optimiser, metrics, and the clean pass before Train's epoch or the two around Boost's.
`bare` runs as many forward and backward passes on one fixed batch, and as many forward passes as
the clean passes. Both are measured in turn, in one run; the ratio is bare / whole.

    python -m benchmarks.epoch [--out FILE] [--encoder digits|resnet18|both] [--threads N]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import describe_machine, print_table, save
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core.clustering.mining import MinedNeighbors, mine
from snscc_ray.core.views import Normalize
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.models.encoders import (
    ClusterHeads,
    ClusterNet,
    PretextNet,
    build_encoder,
    out_features,
)
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.engine import fit
from snscc_ray.training.stages.boost import Boost
from snscc_ray.training.stages.pretrain import Pretrain
from snscc_ray.training.stages.train import Train
from snscc_ray.training.workers import choose_device


def views_of(recipe: Recipe, stage: StageName) -> int:
    """Return the number of views per image in a step."""
    return 3 if stage == "train" and recipe.train.mined_from == "images" else 2


class _NoCheckpoints:
    rank, world_size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def report(self, stage: str, metrics: object, checkpoint: object) -> None: ...

    def latest_checkpoint(self, stage: str) -> None: ...


def recipe_for(encoder: str) -> tuple[Recipe, int]:
    """Return a recipe with one epoch per stage, and the number of synthetic rows."""
    common = ["runtime.checkpoint_seconds=1e9"]
    common += [f"{stage}.epochs=1" for stage in STAGES]
    if encoder == "digits":
        return override(recipes.get("digits"), common), 256 * 10
    batch = 32 if not torch.cuda.is_available() else 512
    common += [f"{stage}.batch_size={batch}" for stage in STAGES]
    return override(recipes.get("cifar10"), common), batch * 3


def noise(recipe: Recipe, rows: int) -> Tensor:
    """Make random images, uint8 (N, C, H, W)."""
    side = recipe.data.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        256, (rows, recipe.data.channels, side, side), dtype=torch.uint8, generator=generator
    )


def context_for(recipe: Recipe, images_NCHW: Tensor, device: torch.device) -> Context:
    assert recipe.data.mean is not None and recipe.data.std is not None
    normalize = Normalize(recipe.data.mean, recipe.data.std)
    return Context(recipe, ResidentData(images_NCHW, device), None, normalize, device)


def stage_for(name: StageName, context: Context) -> Stage:
    recipe = context.recipe
    if name == "pretrain":
        return Pretrain(context)
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    mined = _mined(len(context.data))
    if name == "train":
        return Train(context, PretextNet(encoder, recipe.pretrain), mined)
    heads = ClusterHeads(recipe.train, out_features(encoder), recipe.data.num_clusters, 1)
    return Boost(context, context.to_device(ClusterNet(encoder, heads)), mined)


@functools.cache
def _mined(rows: int) -> MinedNeighbors:
    """Mine the neighbours of random features, once."""
    generator = torch.Generator().manual_seed(0)
    return mine(torch.randn(rows, 16, generator=generator), 20)


def bare(stage: Stage, context: Context, batch: Tensor, steps: int, passes: int) -> float:
    """Time `steps` forward and backward passes and `passes` forward passes over all rows.

    Returns seconds.
    """
    network = stage.network
    weights = list(network.parameters())
    began = now(context.device)
    network.train()
    for _ in range(steps):
        with context.autocast():
            logits_of(network(batch)).float().sum().backward()
        for weight in weights:
            weight.grad = None
    for _ in range(passes):
        _forward_all(network, context, batch)
    return now(context.device) - began


@torch.no_grad()
def _forward_all(network: nn.Module, context: Context, batch: Tensor) -> None:
    network.eval()
    for start in range(0, len(context.data), 1024):
        rows = min(1024, len(context.data) - start)
        repeated = batch.repeat(-(-rows // len(batch)), 1, 1, 1)[:rows]
        with context.autocast():
            network(repeated)
    network.train()


def whole(name: str, stage: Stage, context: Context) -> float:
    """Time one epoch of the engine's loop, in seconds."""
    began = now(context.device)
    fit(stage, context, _NoCheckpoints(context.device), NullMonitor(), name)
    return now(context.device) - began


def logits_of(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    # For the cluster net, use the logits: their backward pass reaches every weight.
    return output if isinstance(output, Tensor) else output[1]


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(encoder: str, repeats: int, device: torch.device) -> list[dict[str, object]]:
    rows = []
    for name in STAGES:
        recipe, count = recipe_for(encoder)
        context = context_for(recipe, noise(recipe, count), device)
        size = getattr(recipe, name).batch_size
        steps = context.data.steps(size)
        # Boost has one more clean pass before its first epoch, to select and for the start figures.
        passes = {"pretrain": 0, "train": 1, "boost": 2}[name]
        side = recipe.data.image_size
        batch = torch.randn(
            views_of(recipe, name) * size, recipe.data.channels, side, side, device=device
        )
        batch = batch.to(memory_format=torch.channels_last)
        stage = stage_for(name, context)
        bare(stage, context, batch, 2, 1)
        whole(name, stage, context)
        pairs = []
        for _ in range(repeats):
            stage = stage_for(name, context)
            pairs.append((bare(stage, context, batch, steps, passes), whole(name, stage, context)))
        ratios = [a / b for a, b in pairs]
        rows.append(
            {
                "encoder": encoder,
                "stage": name,
                "batch": size,
                "bare_seconds": statistics.median(a for a, _ in pairs),
                "whole_seconds": statistics.median(b for _, b in pairs),
                "images_per_second": steps * size / statistics.median(b for _, b in pairs),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="save the figures as JSON")
    parser.add_argument("--encoder", choices=("digits", "resnet18", "both"), default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = choose_device("auto")
    names = ("digits", "resnet18") if arguments.encoder == "both" else (arguments.encoder,)
    rows = [row for name in names for row in measure(name, arguments.repeats, device)]
    print_table(rows)
    if arguments.out:
        save(arguments.out, describe_machine(arguments.threads), rows)


if __name__ == "__main__":
    main()
