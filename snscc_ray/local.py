"""A run in this process, or in one of several that torchrun started."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from snscc_ray import distributed, recipes
from snscc_ray.config import StageName
from snscc_ray.data.sources import load_images
from snscc_ray.engine import Interrupted
from snscc_ray.monitor import RunMonitor, Silent
from snscc_ray.run import Result, check, execute
from snscc_ray.run_folder import prepare_folder, read_recipe
from snscc_ray.workers import LocalWorker, choose_device, join_group, leave_group


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, wherever the loop is not waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@_terminated_like_interrupted()
def run_here(
    name: str | None,
    overrides: list[str],
    folder: Path,
    stages: tuple[StageName, ...],
    resume: bool,
    overwrite: bool,
    console: Console,
) -> Result | None:
    """Run the named recipe, or the one `folder` holds; None on ranks other than the first.

    Everything that can be refused is refused before the folder is touched.
    Raises UserError, or TrainingError from the loop, or Interrupted once there is a run to resume.
    """
    recipe = recipes.get(name) if name else read_recipe(folder)
    recipe = recipes.override(recipe, overrides)
    device = choose_device(recipe.runtime.device)
    prepare_folder(folder, recipe, resume=resume, overwrite=overwrite)
    join_group(device)
    try:
        first = distributed.rank() == 0
        images = load_images(recipe.data, workers=recipe.runtime.decode_workers)
        check(recipe, len(images), distributed.world_size())
        monitor: RunMonitor | Silent = RunMonitor(folder, console) if first else Silent()
        if first:
            console.print(
                f"{recipe.name}: {len(images):,} images of {recipe.data.image_size} px, "
                f"{recipe.data.num_clusters} clusters, seed {recipe.seed}, on {device}",
                highlight=False,
            )
            for identifier, reason in images.skipped:
                # Not markup: a name may hold brackets.
                line = f"left out {identifier}: {reason}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        worker = LocalWorker(folder, device)
        try:
            result = execute(recipe, images, folder, worker, monitor, stages, overwrite=overwrite)
        except KeyboardInterrupt as stop:  # between two stages' loops, or a second Ctrl-C
            raise Interrupted from stop
        finally:
            monitor.finish()
        if isinstance(monitor, RunMonitor):
            monitor.hyperparameters(recipe.model_dump(mode="json"), _final(result))
        return result if first else None
    finally:
        leave_group()


def _final(result: Result) -> dict[str, float]:
    stages = list(result.figures["stages"].values())
    return {name: float(value) for name, value in stages[-1].items()} if stages else {}
