"""Images per second of whole epochs, against the bare network and against common pipelines.

All use the same encoder, batch and precision, and take turns round by round in one run:

  bare        forward, backward and optimiser on one fixed batch, for each stage's network and views
  ours        whole Pretrain, Train and Boost epochs of the engine with resident images, including
              views, losses, searches and the clean pass
  lightly     lightly's SimCLR as in its CIFAR-10 example (its transform without blur, its loss and
              head, one forward per view, 8 loader processes), if lightly is installed
  torchvision torchvision's transforms on PIL images, 8 loader processes, and our SimCLR loss

    python -m benchmarks.throughput [--data DIR] [--rows N] [--batch-size B] [--rounds R]
                                    [--device auto|cpu|cuda] [--encoder NAME] [--compile]
                                    [--out FILE]

`share` is the share of the bare network's speed. `utilisation` is the share of the GPU's bfloat16
peak, counting only the network's forward and backward on training views. On a CPU the loaders run
in the loop's own thread (no extra processes), so that every method has the same cores. On one
thread (OMP_NUM_THREADS=1) seconds are CPU seconds, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

from benchmarks.epoch import context_for, logits_of, noise, now, stage_for, views_of, whole
from benchmarks.report import describe_machine, print_table, revision, save
from benchmarks.views import pil_simclr
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, SimclrView, StageName
from snscc_ray.core.losses import nt_xent
from snscc_ray.data.sources import load_images
from snscc_ray.models.encoders import PretextNet, build_encoder, out_features
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.schedules import build_optimizer
from snscc_ray.training.workers import choose_device

# Dense bfloat16 peaks in TFLOP/s, from NVIDIA's data sheets; the first matching name counts.
_PEAKS = (
    ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("A100", 312),
    ("L40S", 362), ("L4", 121), ("A10G", 70), ("RTX 4090", 165),
)  # fmt: skip
LOADERS = 8


@dataclasses.dataclass(frozen=True)
class Side:
    """One thing to measure: `epoch` trains on `images` images and may be called repeatedly."""

    name: str
    images: int
    epoch: Callable[[], object]
    bare: str  # the side whose speed is the bound


def peak_flops(device: torch.device) -> float | None:
    """Return dense bfloat16 FLOP/s by the device's name; None on a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in _PEAKS if part in name), None)


def flops_per_image(network: nn.Module, context: Context, views: int) -> float:
    """Count the FLOPs of forward and backward on `views` views of one image."""
    batch = _fixed_batch(context, 2 * views)
    with FlopCounterMode(display=False) as counter:
        logits_of(network(batch)).float().sum().backward()
    network.zero_grad(set_to_none=True)
    return float(counter.get_total_flops() / 2)


def _fixed_batch(context: Context, size: int) -> Tensor:
    data = context.recipe.data
    batch = torch.randn(
        size, data.channels, data.image_size, data.image_size, device=context.device
    )
    return batch.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------ ours, and bare


def bare_side(name: StageName, context: Context) -> Side:
    stage = stage_for(name, context)
    steps = context.data.steps(stage.settings.batch_size)
    batch = _fixed_batch(context, views_of(context.recipe, name) * stage.settings.batch_size)
    optimizer = build_optimizer(stage.settings, stage.network)
    stage.network.train()

    def epoch() -> None:
        for _ in range(steps):
            with context.autocast():
                loss = logits_of(stage.network(batch)).float().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return Side(f"bare {name}", steps * stage.settings.batch_size, epoch, f"bare {name}")


def our_side(name: str, stage: Stage, context: Context) -> Side:
    compiled = " compiled" * context.recipe.runtime.compile
    return Side(
        name + compiled, len(context.data), lambda: whole(name, stage, context), f"bare {name}"
    )


def compiled_sides(context: Context) -> list[Side]:
    recipe = override(context.recipe, ["runtime.compile=true"])
    other = dataclasses.replace(context, recipe=recipe)
    return [our_side(name, stage_for(name, other), other) for name in STAGES]


# ----------------------------------------------------------------------------------- the others


class _Pictures(Dataset[Any]):
    """PIL images with a view function, as torchvision's CIFAR10 passes them to a loader."""

    def __init__(self, images: list[Image.Image], views_of: Callable[[Image.Image], Any]) -> None:
        self.images, self.views_of = images, views_of

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.views_of(self.images[row])


def _loader(
    pictures: _Pictures, context: Context, loaders: int, *, pinned: bool
) -> DataLoader[Any]:
    cuda = context.device.type == "cuda"
    return DataLoader(
        pictures,
        batch_size=context.recipe.pretrain.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(loaders, os.cpu_count() or 1) if cuda else 0,
        pin_memory=pinned and cuda,
    )


def _pairs(loader: DataLoader[Any], context: Context) -> Iterator[tuple[Tensor, Tensor]]:
    for first, second in loader:
        yield (
            first.to(context.device, non_blocking=True),
            second.to(context.device, non_blocking=True),
        )


def torchvision_side(pictures: list[Image.Image], context: Context, loaders: int = LOADERS) -> Side:
    recipe = context.recipe
    view = recipe.pretrain.view
    assert isinstance(view, SimclrView)
    one = pil_simclr(view, recipe.data.image_size, context.normalize)
    both = _Pictures(pictures, functools.partial(_twice, one))
    loader = _loader(both, context, loaders, pinned=True)
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    network = context.to_device(PretextNet(encoder, recipe.pretrain))
    optimizer = build_optimizer(recipe.pretrain, network)

    def epoch() -> None:
        for views in _pairs(loader, context):
            with context.autocast():
                first, second = network(torch.cat(views)).chunk(2)
                loss = nt_xent(first, second, recipe.pretrain.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return Side("torchvision", len(loader) * recipe.pretrain.batch_size, epoch, "bare pretrain")


def _twice(one: Callable[[Image.Image], Tensor], image: Image.Image) -> tuple[Tensor, Tensor]:
    return one(image), one(image)


def lightly_side(pictures: list[Image.Image], context: Context) -> Side | None:
    """Return lightly's side, or None if lightly is not installed."""
    if importlib.util.find_spec("lightly") is None:
        return None
    transforms: Any = importlib.import_module("lightly.transforms")
    losses: Any = importlib.import_module("lightly.loss")
    modules: Any = importlib.import_module("lightly.models.modules")
    recipe, normalize = context.recipe, context.normalize
    view = transforms.SimCLRTransform(
        input_size=recipe.data.image_size,
        gaussian_blur=0.0,
        normalize={"mean": list(normalize.mean), "std": list(normalize.std)},
    )
    loader = _loader(_Pictures(pictures, view), context, LOADERS, pinned=False)
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    head = modules.SimCLRProjectionHead(
        out_features(encoder), recipe.pretrain.projection_hidden, recipe.pretrain.projection_dim
    )
    network = context.to_device(nn.Sequential(encoder, head))
    criterion = losses.NTXentLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.06)

    def epoch() -> None:
        for first, second in _pairs(loader, context):
            with context.autocast():
                loss = criterion(network(first), network(second))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Side("lightly", len(loader) * recipe.pretrain.batch_size, epoch, "bare pretrain")


# ----------------------------------------------------------------------------------- measuring


def timed(side: Side, device: torch.device) -> tuple[float, float | None]:
    """Time one epoch; return (images per second, peak MiB on the GPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = _clock(device)
    began = clock()
    side.epoch()
    rate = side.images / (clock() - began)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return rate, peak


def measure(
    sides: list[Side], flops: dict[str, float], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row per side: medians over interleaved rounds, after one that does not count.

    `first_seconds` is the time of that first round, which includes warm-up and compilation.
    """
    first = {side.name: side.images / timed(side, device)[0] for side in sides}
    turns = [{side.name: timed(side, device) for side in sides} for _ in range(rounds)]
    peak = peak_flops(device)
    rows = []
    for side in sides:
        rates = [turn[side.name][0] for turn in turns]
        rate = statistics.median(rates)
        row: dict[str, Any] = {
            "what": side.name,
            "images_per_second": rate,
            "lowest": min(rates),
            "highest": max(rates),
            "share": _ratio(turns, side.name, side.bare),
        }
        for other in ("lightly", "torchvision"):
            row[f"x {other}"] = _ratio(turns, side.name, other)
        row["utilisation"] = rate * flops[side.bare] / peak if peak else None
        row["first_seconds"] = first[side.name]
        row["peak_mib"] = max((turn[side.name][1] or 0) for turn in turns) or None
        rows.append(row)
    return rows


def _clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds; on one CPU thread, CPU seconds, to exclude other programs."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return lambda: now(device)


def _ratio(turns: list[dict[str, Any]], name: str, other: str) -> float | None:
    """Return how many times as fast `name` is: the median over rounds of the ratio in a round."""
    if other not in turns[0]:
        return None
    return float(statistics.median(turn[name][0] / turn[other][0] for turn in turns))


def recipe_for(arguments: argparse.Namespace) -> Recipe:
    settings = [f"encoder.name={arguments.encoder}", "runtime.checkpoint_seconds=1e9"]
    if arguments.encoder == "convnet":
        settings.append("encoder.width=16")  # small, so that a CPU shows the cost around it
    for stage in STAGES:
        settings += [f"{stage}.epochs=1", f"{stage}.batch_size={arguments.batch_size}"]
    return override(recipes.get("cifar10"), settings)


def images_of(recipe: Recipe, path: Path | None, rows: int) -> Tensor:
    """Load the first rows of a dataset, or make noise; uint8 (N, C, H, W)."""
    if path is None:
        return noise(recipe, rows)
    return load_images(recipe.data.model_copy(update={"path": str(path), "limit": rows})).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="CIFAR-10 shards; without: noise")
    parser.add_argument("--rows", type=int, help="images  [default: 60,000; on a CPU 2 batches]")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--encoder", choices=("convnet", "resnet18", "resnet50"), default="resnet18"
    )
    parser.add_argument("--compile", action="store_true", help="ours also with runtime.compile")
    parser.add_argument("--out", type=Path, help="save the figures as JSON")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    recipe = recipe_for(arguments)
    rows = arguments.rows or (60_000 if device.type == "cuda" else 2 * arguments.batch_size)
    images = images_of(recipe, arguments.data, rows)
    context = context_for(recipe, images, device)
    pictures = [to_pil_image(image) for image in images]

    stages = {name: stage_for(name, context) for name in STAGES}
    flops = {
        f"bare {name}": flops_per_image(stage.network, context, views_of(recipe, name))
        for name, stage in stages.items()
    }
    found = [
        *(bare_side(name, context) for name in STAGES),
        *(our_side(name, stage, context) for name, stage in stages.items()),
        *(compiled_sides(context) if arguments.compile else []),
        lightly_side(pictures, context),
        torchvision_side(pictures, context),
    ]
    sides = [side for side in found if side is not None]
    table = measure(sides, flops, arguments.rounds, device)
    if len(sides) < len(found):
        table.append({**dict.fromkeys(table[0]), "what": "lightly: skipped, not installed"})
    print_table(table)
    if arguments.out:
        about = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "revision": revision(),
            "precision": "bfloat16" if context.mixed else "float32",
            "encoder": arguments.encoder,
            "batch_size": arguments.batch_size,
            "rows": len(images),
            "images": arguments.data.name if arguments.data else "noise",
            "rounds": arguments.rounds,
            "peak_bfloat16_flops": peak_flops(device),
            "flops_per_image": flops,
        }
        save(arguments.out, describe_machine(torch.get_num_threads()) | about, table)


if __name__ == "__main__":
    main()
