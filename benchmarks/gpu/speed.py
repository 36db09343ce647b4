"""Phase 2: images per second of the bare network, of ours, and of a plain torchvision pipeline.

Every side runs one epoch that does not count, then three that do (one for torchvision, which takes
ten times as long); the table holds the medians. The file is written after each side, so results
from before the deadline are kept. Last, if time is left, Pretrain runs with a compiled network; the
compiled code is saved beside the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from benchmarks.epoch import context_for, stage_for, views_of, whole
from benchmarks.gpu.cifar10 import recipe_for
from benchmarks.report import describe_machine, print_table, save
from benchmarks.throughput import (
    Side,
    bare_side,
    flops_per_image,
    images_of,
    our_side,
    peak_flops,
    timed,
    torchvision_side,
)
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES
from snscc_ray.training.context import Context
from snscc_ray.training.workers import choose_device

_ROUNDS = 3
_LOADERS = (8, 16)
_PROFILED_STEPS = 10
# Seconds needed to compile and measure a ResNet-18; skipped if less time is left.
_COMPILE_SECONDS = 40


def sides(context: Context) -> Iterator[Side]:
    """Yield what to measure, the most important first."""
    for name in STAGES:
        yield bare_side(name, context)
        yield our_side(name, stage_for(name, context), context)
    pictures = [to_pil_image(image) for image in context.data.slices(0, len(context.data), 1)]
    for loaders in _LOADERS:
        side = torchvision_side(pictures, context, loaders)
        yield dataclasses.replace(side, name=f"torchvision, {loaders} loaders")


def row_of(side: Side, context: Context, flops: dict[str, float]) -> dict[str, Any]:
    first = timed(side, context.device)
    rounds = 1 if "torchvision" in side.name else _ROUNDS
    turns = [timed(side, context.device) for _ in range(rounds)]
    rate = statistics.median(speed for speed, _ in turns)
    peak = peak_flops(context.device)
    return {
        "what": side.name,
        "images_per_second": rate,
        "lowest": min(speed for speed, _ in turns),
        "highest": max(speed for speed, _ in turns),
        "utilisation": rate * flops[side.bare] / peak if peak else None,
        "first_seconds": side.images / first[0],
        "peak_mib": max((mib or 0) for _, mib in turns) or None,
    }


def profiled(context: Context) -> str:
    """Profile ten steps of Pretrain; return a table of where the time goes."""
    from torch.profiler import ProfilerActivity, profile

    rows = min(len(context.data), _PROFILED_STEPS * context.recipe.pretrain.batch_size)
    images = torch.cat(list(context.data.slices(0, rows, rows)))
    few = context_for(context.recipe, images, context.device)
    stage = stage_for("pretrain", few)
    whole("pretrain", stage, few)
    cuda = context.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        whole("pretrain", stage, few)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(recorded.key_averages().table(sort_by=order, row_limit=25))


def compiled_row(
    context: Context, flops: dict[str, float], artifacts: Path
) -> dict[str, Any] | None:
    """Measure Pretrain with a compiled network, and save the compiled code if torch can."""
    recipe = override(context.recipe, ["runtime.compile=true"])
    other = dataclasses.replace(context, recipe=recipe)
    side = our_side("pretrain", stage_for("pretrain", other), other)
    row = row_of(side, other, flops)
    kept = torch.compiler.save_cache_artifacts()
    if kept is not None:
        artifacts.write_bytes(kept[0])
    return row


def measure(context: Context, out: Path, seconds: float) -> list[dict[str, Any]]:
    """Measure every side, write the rows into `out`, and return them."""
    began = time.monotonic()
    flops = {
        f"bare {name}": flops_per_image(
            stage_for(name, context).network, context, views_of(context.recipe, name)
        )
        for name in STAGES
    }
    machine = describe_machine(torch.get_num_threads()) | {
        "device": str(context.device),
        "precision": "bfloat16" if context.mixed else "float32",
        "encoder": context.recipe.encoder.name,
        "pretext": context.recipe.pretrain.method,
        "rows": len(context.data),
        "peak_bfloat16_flops": peak_flops(context.device),
        "flops_per_image": flops,
    }
    rows: list[dict[str, Any]] = []
    for side in sides(context):
        rows.append(row_of(side, context, flops))
        save(out, machine, rows)
        print(f"{side.name}: {rows[-1]['images_per_second']:,.0f} images/s", flush=True)
    print(profiled(context), flush=True)
    left = seconds - (time.monotonic() - began)
    if left < _COMPILE_SECONDS:
        print(f"compiled: left out, {left:.0f} s are left of {seconds:.0f}", flush=True)
    elif row := compiled_row(context, flops, out.with_name("compiled.bin")):
        rows.append(row)
        save(out, machine, rows)
    print_table(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--seconds", type=float, required=True, help="when to leave out the rest")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    recipe = recipe_for(tiny=arguments.tiny)
    epochs = [f"{stage}.epochs=1" for stage in STAGES]
    recipe = override(recipe, [*epochs, "runtime.checkpoint_seconds=1e9"])
    images = images_of(recipe, arguments.data, 600 if arguments.tiny else 10_000)
    context = context_for(recipe, images, choose_device("auto"))
    measure(context, arguments.out, arguments.seconds)


if __name__ == "__main__":
    main()
