"""Run in this process, or in one of several started by torchrun."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from rich.console import Console

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import DataSettings, Recipe
from snscc_ray.core import distributed
from snscc_ray.core.claim import claimed
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog, assemble
from snscc_ray.data.loading.bank import FeatureBank, bank_of
from snscc_ray.data.loading.resident import Images, ResidentData
from snscc_ray.data.loading.streamed import StreamedData, threads_reader
from snscc_ray.data.loading.survey import check_streamed, choose_mode, survey
from snscc_ray.data.rows import Rows
from snscc_ray.data.vectors import catalog_of_vectors
from snscc_ray.runs.finished import final_figures
from snscc_ray.runs.folder import check_apart, prepare_folder
from snscc_ray.runs.monitor import Journal, NullMonitor, RunMonitor
from snscc_ray.runs.pace import describe, measure, within
from snscc_ray.runs.plan import Plan, make_plan
from snscc_ray.runs.run import Request, Result, execute
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import LocalWorker, Worker, choose_device, join_group, leave_group


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, outside the training loop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@terminated_like_interrupted()
def run_here(
    request: Request,
    console: Console,
    make_worker: Callable[[Path, torch.device], Worker] = LocalWorker,
) -> Result | None:
    """Run the request. Returns None on all ranks but the first.

    make_worker: makes the worker, which saves the checkpoints, from the run folder and the device.
    All checks come before the first change to the folder.
    Raises UserError, TrainingError from the loop, or Interrupted once there is a run to resume.
    """
    check_apart(request.folder, request.recipe().data.path)
    # Under torchrun, the first process claims the folder for all.
    first = os.environ.get("RANK", "0") == "0"
    with claimed(request.folder, Display(console).line) if first else nullcontext():
        return _run_here(request, console, make_worker)


def _run_here(
    request: Request, console: Console, make_worker: Callable[[Path, torch.device], Worker]
) -> Result | None:
    began = time.monotonic()
    if request.budget is not None and request.resume:
        raise UserError("--budget chose the epochs when the run began; leave it out with --resume")
    recipe, folder = request.recipe(), request.folder
    device = choose_device(recipe.runtime.device)
    prepare_folder(folder, recipe, resume=request.resume, overwrite=request.overwrite)
    join_group(device)
    try:
        first = distributed.rank() == 0
        display = Display(console if first else Console(quiet=True))
        plan = make_plan(recipe, (distributed.world_size(),), display=display)
        recipe = plan.recipe
        catalog, data = load(plan, device, display)
        what = f"embeddings of {data.width} numbers" if isinstance(data, FeatureBank) else None
        display.line(headline(recipe, catalog, str(device), what))
        report_skipped(catalog, display)
        if request.budget is not None:
            left = request.budget - (time.monotonic() - began)
            recipe = _within_budget(request, recipe, catalog, data, left, display)
        worker = make_worker(folder, device)
        monitor: RunMonitor | NullMonitor = (
            RunMonitor(Journal(folder), display) if first else NullMonitor()
        )
        try:
            result = execute(
                recipe,
                catalog,
                data,
                folder,
                worker,
                monitor,
                request.stages,
                overwrite=request.overwrite,
            )
            if isinstance(monitor, RunMonitor):
                final = final_figures(result.figures)
                monitor.journal.hyperparameters(recipe.model_dump(mode="json"), final)
        except KeyboardInterrupt as stop:  # between the loops of two stages, or a second Ctrl-C
            raise Interrupted from stop
        finally:
            monitor.finish()
        return result if first else None
    finally:
        leave_group()


def _within_budget(
    request: Request,
    recipe: Recipe,
    catalog: Catalog,
    data: Images,
    seconds: float,
    display: Display,
) -> Recipe:
    """Measure now, and set the epochs that fit into `seconds`. Raises UserError."""
    if distributed.world_size() > 1:
        raise UserError("--budget measures a single process; leave it out under torchrun")
    if not recipe.encoder.frozen and not isinstance(data, ResidentData):
        raise UserError("--budget measures images held in memory; use --set data.mode=resident")
    began = time.monotonic()
    display.line("measuring a few steps of each stage")
    try:
        device = choose_device(recipe.runtime.device)
        pace = measure(recipe, catalog, data, device, request.folder.parent)
    except Interrupted as stop:
        raise KeyboardInterrupt from stop  # nothing is written yet, so there is no run to resume
    spent = time.monotonic() - began
    fitting = within(recipe, pace, seconds - spent, request.stages)
    display.line(f"{describe(fitting, pace, request.stages)} (measured in {spent:.0f} s)")
    return fitting


def headline(recipe: Recipe, catalog: Catalog, where: str, what: str | None = None) -> str:
    """Return the line that says what is trained, and where. what: None: images."""
    what = what or f"images of {recipe.data.image_size} px"
    return (
        f"{recipe.name}: {len(catalog):,} {what}, {recipe.data.num_clusters} clusters, "
        f"seed {recipe.seed}, on {where}"
    )


def report_skipped(catalog: Catalog, display: Display) -> None:
    """Print the notes, and every image left out with the reason."""
    for note in catalog.notes:
        display.line(note)
    for identifier, reason in catalog.skipped:
        display.line(f"left out {identifier}: {reason}")


def load(plan: Plan, device: torch.device, display: Display) -> tuple[Catalog, Images]:
    """Load the images of a run. Raises UserError if they cannot be trained on."""
    recipe = plan.recipe
    workers = recipe.runtime.decode_workers
    catalog, data = bring(recipe.data, plan.rows, device, display, workers, recipe)
    if catalog.skipped:  # fewer images than were checked
        plan.check(len(catalog))
    return catalog.for_clusters(recipe.data.num_clusters), data


def bring(
    data: DataSettings,
    rows: Rows,
    device: torch.device,
    display: Display,
    workers: int = 0,
    training: Recipe | None = None,
) -> tuple[Catalog, Images]:
    """Load a dataset into memory, or prepare to stream it if this machine cannot hold it.

    training: the recipe that is to train on it, if any. Prints only that it is streamed. Raises
    UserError.
    """
    if rows.vectors is not None:
        return catalog_of_vectors(rows, data.channels), bank_of(rows.vectors, device)
    mode, why = choose_mode(data, len(rows.ids), free_bytes(device), rows.streamable)
    if mode == "stream":
        display.line(f"images streamed: {why}")
        if training is not None:
            check_streamed(training)
    progress = display.counting("reading", "images")
    if mode == "stream":
        streamed = survey(rows, data, workers=workers, progress=progress, say=display.line)
        display.finish()
        reader = threads_reader(streamed, data.memory_mb, workers)
        return streamed.catalog, StreamedData(streamed, device, reader)
    images = assemble(rows, data, workers, progress)
    display.finish()
    return images.catalog, ResidentData(images.images, device)


def free_bytes(device: torch.device) -> int:
    """Return the smaller of this process's share of free RAM and the device's free memory."""
    return min(device_bytes(torch.device("cpu")), device_bytes(device))


def device_bytes(device: torch.device) -> int:
    """Return the free memory of the device. On a CPU, only this process's share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // distributed.world_size()
