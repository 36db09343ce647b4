"""Extraction of a frozen encoder's features against the bare network on the same inputs.

`whole` is the product's extraction: images read from the dataset, the augmented views made, the
features computed, rounded and written. `bare` is the network alone, on as many float views in
memory, in the faster of two ways: one batch at a time on all threads, or one batch per thread.
All are measured in turn, in one run; the ratio is bare / whole. The ratio of CPU seconds, against
one batch per thread, hardly depends on what else the machine does.

    python -m benchmarks.extraction DATA [--encoder pip:efficientnet_lite0] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.report import describe_machine, print_table, revision, save
from snscc_ray.core.threads import mapping
from snscc_ray.core.views import Normalize
from snscc_ray.data.imageset import assemble
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.sources import list_rows
from snscc_ray.fit.choose import Preferences
from snscc_ray.fit.fit import recipe_for
from snscc_ray.models.frozen import load_frozen
from snscc_ray.models.pretrained import encoder_settings
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training.context import Context
from snscc_ray.training.stages.extract import extract
from snscc_ray.training.workers import choose_device

_BATCH = 64  # as in extraction


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the work, and its CPU seconds."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


@torch.no_grad()
def measure(source: str, encoder: str, rows: int, rounds: int) -> dict[str, float]:
    """Return views per second of the extraction and of the bare network, and their ratio."""
    wishes = Preferences(10, encoder=encoder_settings(encoder))
    recipe = recipe_for(source, wishes, ["data.num_clusters=10", f"data.limit={rows}"])
    device = choose_device("auto")
    held = assemble(list_rows(recipe.data), recipe.data, 0, None)
    zero_to_one = Normalize((0.0,) * recipe.data.channels, (1.0,) * recipe.data.channels)
    context = Context(recipe, ResidentData(held.images, device), None, zero_to_one, device)
    frozen, _ = load_frozen(recipe)
    frozen.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = 1 + recipe.encoder.views
    batches = [context.clean(part) for part in context.data.slices(0, len(held), _BATCH)]

    def whole() -> None:
        with tempfile.TemporaryDirectory() as place:
            extract(context, frozen, Path(place), "none", NullMonitor())

    def alone() -> None:
        for _ in range(views):
            for batch in batches:
                frozen(batch)

    def per_thread() -> None:
        with mapping(device) as mapped:
            for _ in range(views):
                list(mapped(frozen, batches))

    ways = (whole, alone, per_thread)
    for way in ways:
        way()  # warm up
    both = [[seconds(way) for way in ways] for _ in range(rounds)]
    took = [[wall for wall, _ in one] for one in both]
    ratios = [min(bare, threaded) / all_of_it for all_of_it, bare, threaded in took]
    count = len(held) * views
    return {
        "images": len(held),
        "views per image": views,
        "side": recipe.data.image_size,
        "whole, views/s": count / statistics.median(times[0] for times in took),
        "bare, all threads": count / statistics.median(times[1] for times in took),
        "bare, one batch each": count / statistics.median(times[2] for times in took),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "ratio of CPU": statistics.median(one[2][1] / one[0][1] for one in both),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of images or shards")
    parser.add_argument("--encoder", default="pip:efficientnet_lite0")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    machine = describe_machine(torch.get_num_threads()) | {"revision": revision()}
    figures = measure(arguments.data, arguments.encoder, arguments.rows, arguments.rounds)
    row = {"encoder": arguments.encoder, **figures}
    print_table([row])
    if arguments.out:
        save(arguments.out, machine, [row])


if __name__ == "__main__":
    main()
