"""Extraction of a frozen encoder's features against the bare network on the same inputs.

`whole` is the product's extraction: images read from the dataset, the augmented views made, the
features computed, rounded and written. Two networks run alone, on as many float views in memory:
`bare` is the library's network with its weights, `folded` is the one that extraction runs, with
its batch norms merged into the convolutions. Each runs in two ways, one batch at a time on all
threads and one batch per thread; the faster one counts. All are measured in turn, in one run; a
ratio is the seconds of the network / the seconds of the whole. The ratio of CPU seconds, against
one batch per thread, hardly depends on what else the machine does.

    python -m benchmarks.extraction DATA [--encoder pip:efficientnet_lite0] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from snscc_ray.models.encoders import build_encoder
from snscc_ray.models.frozen import load_frozen
from snscc_ray.models.pretrained import encoder_settings, start_encoder
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
    """Return views per second of the extraction and of the networks alone, and the ratios."""
    wishes = Preferences(10, encoder=encoder_settings(encoder))
    recipe = recipe_for(source, wishes, ["data.num_clusters=10", f"data.limit={rows}"])
    device = choose_device("auto")
    held = assemble(list_rows(recipe.data), recipe.data, 0, None)
    zero_to_one = Normalize((0.0,) * recipe.data.channels, (1.0,) * recipe.data.channels)
    context = Context(recipe, ResidentData(held.images, device), None, zero_to_one, device)
    frozen, _ = load_frozen(recipe)
    frozen.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    bare = build_encoder(recipe.encoder, recipe.data.channels).eval()
    start_encoder(recipe.encoder, bare)
    bare.to(memory_format=torch.channels_last)
    views = 1 + recipe.encoder.views
    batches = [context.clean(part) for part in context.data.slices(0, len(held), _BATCH)]

    def whole() -> None:
        with tempfile.TemporaryDirectory() as place:
            extract(context, frozen, Path(place), "none", NullMonitor())

    def alone(network: torch.nn.Module) -> None:
        for _ in range(views):
            for batch in batches:
                network(batch)

    def per_thread(network: torch.nn.Module) -> None:
        with mapping(device) as mapped:
            for _ in range(views):
                list(mapped(network, batches))

    ways: dict[str, Callable[[], object]] = {
        "whole": whole,
        "bare": partial(alone, bare),
        "bare, threads": partial(per_thread, bare),
        "folded": partial(alone, frozen),
        "folded, threads": partial(per_thread, frozen),
    }
    for way in ways.values():
        way()  # warm up
    both = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    walls = [{name: wall for name, (wall, _) in one.items()} for one in both]
    count = len(held) * views
    figures: dict[str, float] = {
        "images": len(held),
        "views per image": views,
        "side": recipe.data.image_size,
    }
    for name in ways:
        figures[f"{name}, views/s"] = count / statistics.median(took[name] for took in walls)
    for name in ("bare", "folded"):
        ratios = [min(took[name], took[f"{name}, threads"]) / took["whole"] for took in walls]
        cpu = [one[f"{name}, threads"][1] / one["whole"][1] for one in both]
        figures[f"of {name}"] = statistics.median(ratios)
        figures |= {f"of {name}, lowest": min(ratios), f"of {name}, highest": max(ratios)}
        figures[f"of {name}, CPU"] = statistics.median(cpu)
    return figures


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
