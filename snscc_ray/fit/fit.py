"""`snscc fit`: from a folder of images to clusters, choosing the settings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from snscc_ray.answers.features import RunImages, stage_features
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override, validate
from snscc_ray.config.settings import Recipe
from snscc_ray.core import storage
from snscc_ray.core.clustering.neighbors import MinedNeighbors
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.resident import Images, ResidentData
from snscc_ray.data.look import inspect_images
from snscc_ray.data.sources import list_rows
from snscc_ray.fit.choose import Pick, Preferences, as_set, choose, data_settings, used
from snscc_ray.fit.count import Estimate, estimate, expected_seconds
from snscc_ray.models.encoders import build_encoder, out_features
from snscc_ray.runs.folder import (
    COUNT_FILE,
    FIT_FILE,
    first_difference,
    holds_something,
    prepare_folder,
    remove_run,
)
from snscc_ray.runs.local import device_bytes, load, report_skipped, terminated_like_interrupted
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.pace import describe, measure, within
from snscc_ray.runs.plan import Plan, make_plan
from snscc_ray.runs.run import Result, execute, final_figures, normalisation
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.stages.pretrain import measure_features
from snscc_ray.training.workers import LocalWorker, choose_device

# Longest run without --budget: users do not wait longer for a first answer.
_CPU_SECONDS, _GPU_SECONDS = 30 * 60.0, 2 * 3600.0
_PROVISIONAL = 10  # number of clusters before counting; Pretrain does not depend on it


@dataclass(frozen=True)
class FitRequest:
    """The arguments of `snscc fit`, with absolute paths."""

    source: str
    folder: Path
    wishes: Preferences
    folders_are_labels: bool = False
    overrides: tuple[str, ...] = ()
    budget: float | None = None  # seconds; None: at most _CPU_SECONDS or _GPU_SECONDS
    device: str = "auto"
    overwrite: bool = False

    def asked(self) -> dict[str, Any]:
        """Return the arguments that identify a run, to recognise a stopped one."""
        wishes = self.wishes
        return {
            "source": self.source,
            "clusters": wishes.clusters,
            "image_size": wishes.image_size,
            "max_imbalance": wishes.max_imbalance,
            "encoder": wishes.encoder and wishes.encoder.model_dump(mode="json"),
            "folders_are_labels": self.folders_are_labels,
            "overrides": list(self.overrides),
            "budget": self.budget,
        }


@dataclass(frozen=True)
class FitResult:
    result: Result
    told_seconds: float | None  # the estimate before the run
    took_seconds: float
    estimate: Estimate | None


@terminated_like_interrupted()
def fit_images(request: FitRequest, console: Console) -> FitResult:
    """Choose a recipe, print the reasons and the expected time, and run it.

    The same request continues a stopped run. Raises UserError before anything is written,
    TrainingError from the training loop, and Interrupted once there is a run to continue.
    """
    began = time.monotonic()
    device, display, folder = choose_device(request.device), Display(console), request.folder
    begun, told = _begun(request), None
    picks: list[Pick] = []
    if begun is None:
        if holds_something(folder) and not request.overwrite:
            raise UserError(
                f"{folder} already holds files that are not from `snscc fit`; use --overwrite to "
                "replace a run there, or another --out"
            )
        plan, picks = _chosen(request, device)
        prepare_folder(folder, plan.recipe, resume=False, overwrite=request.overwrite)
    else:
        display.line(f"continuing the run in {folder}")
        plan = make_plan(begun)
    recipe = plan.recipe
    catalog, data = load(plan, device, display)
    if request.wishes.clusters is None and catalog.distinct == 1:
        raise UserError(
            f"all {len(catalog):,} images are identical, so there is nothing to cluster; give "
            "others"
        )
    report_skipped(catalog, display)
    for pick in picks:
        display.line(f"  {pick.what}: {pick.value} ({pick.why})")
    try:
        if picks:
            chosen = used("epochs", recipe)
            recipe, told = _paced(request, recipe, catalog, data, device, display)
            if used("epochs", recipe) != chosen:
                fitting = Pick("epochs", used("epochs", recipe), "as many as fit into the time")
                picks = [fitting if pick.what == "epochs" else pick for pick in picks]
            _note(request, recipe, picks)
        worker = LocalWorker(folder, device)
        monitor = RunMonitor(Journal(folder), display)
        try:
            counted = None
            if request.wishes.clusters is None:
                recipe, counted = _counted(recipe, catalog, data, worker, monitor, display)
            result = execute(recipe, catalog, data, folder, worker, monitor)
            final = final_figures(result.figures)
            monitor.journal.hyperparameters(recipe.model_dump(mode="json"), final)
        finally:
            monitor.finish()
    except KeyboardInterrupt as stop:
        raise Interrupted from stop
    return FitResult(result, told, time.monotonic() - began, counted)


def _begun(request: FitRequest) -> Recipe | None:
    """Return the recipe of a run that this same request began in the folder, or None.

    Raises UserError if a request with other options began it.
    """
    path = request.folder / FIT_FILE
    if request.overwrite or not path.exists():
        return None
    held = storage.read_json(path)
    if difference := first_difference(held["asked"], request.asked()):
        raise UserError(
            f"{request.folder} holds a fit with other options ({difference}); use --overwrite to "
            "replace it, or another --out"
        )
    return validate(held["recipe"])


def _chosen(request: FitRequest, device: torch.device) -> tuple[Plan, list[Pick]]:
    """List the images, inspect a sample, and choose the other settings from it."""
    where: dict[str, Any] = {
        "source": "auto",
        "path": request.source,
        "skip_corrupt": True,
        "folders_are_labels": request.folders_are_labels,
    }
    rows = list_rows(data_settings(where, request.overrides))
    seen = inspect_images(rows)
    recipe, picks = choose(
        request.folder.name,
        where,
        seen,
        gpu=device.type == "cuda",
        free_bytes=device_bytes(device),
        wishes=request.wishes,
    )
    clusters = request.wishes.clusters or min(_PROVISIONAL, len(rows.ids) // 2)
    recipe = override(recipe, [f"data.num_clusters={clusters}", *request.overrides])
    picks = as_set(picks, recipe, request.overrides)
    return make_plan(recipe, rows=rows, seen=seen), picks


def _paced(
    request: FitRequest,
    recipe: Recipe,
    catalog: Catalog,
    data: Images,
    device: torch.device,
    display: Display,
) -> tuple[Recipe, float | None]:
    """Return the recipe with epochs that fit the time limit, and the expected seconds."""
    if not isinstance(data, ResidentData):
        if request.budget is not None:
            raise UserError("--budget needs images held in memory, not streamed; leave it out")
        display.line(
            "the images are streamed, so the time cannot be predicted; the ETA appears later"
        )
        return recipe, None
    display.line("measuring a few steps of each stage")
    pace = measure(recipe, catalog, data.images_NCHW, device)
    stages = tuple(pace)

    def needed(recipe: Recipe) -> float:
        return sum(pace[s][0] + pace[s][1] * float(getattr(recipe, s).epochs) for s in stages)

    most = request.budget or (_GPU_SECONDS if device.type == "cuda" else _CPU_SECONDS)
    if request.budget is not None or needed(recipe) > most:
        recipe = within(recipe, pace, most, stages)
    counting = _counting_seconds(recipe, len(catalog)) if request.wishes.clusters is None else 0.0
    display.line(describe(recipe, pace, stages))
    if counting > 5:
        display.line(f"plus {counting / 60:.1f} minutes to count the clusters")
    return recipe, needed(recipe) + counting


def _counting_seconds(recipe: Recipe, rows: int) -> float:
    return expected_seconds(rows, out_features(build_encoder(recipe.encoder, recipe.data.channels)))


def _note(request: FitRequest, recipe: Recipe, picks: list[Pick]) -> None:
    """Save the request, the picks and the recipe, to recognise and continue a stopped run."""
    if request.overwrite:
        remove_run(request.folder)
    noted = {
        "asked": request.asked(),
        "picked": [pick.as_dict() for pick in picks],
        "recipe": recipe.model_dump(mode="json"),
    }
    storage.write_json(request.folder / FIT_FILE, noted)


def _counted(
    recipe: Recipe,
    catalog: Catalog,
    data: Images,
    worker: LocalWorker,
    monitor: RunMonitor,
    display: Display,
) -> tuple[Recipe, Estimate]:
    """Pretrain, estimate the number of clusters from the features, and put it into the recipe."""
    folder, path = worker.folder, worker.folder / COUNT_FILE
    if path.exists():
        found = Estimate(**storage.read_json(path))
        return override(recipe, [f"data.num_clusters={found.chosen}"]), found
    execute(recipe, catalog, data, folder, worker, monitor, ("pretrain",))
    features_ND = stage_features(
        RunImages(folder, recipe, catalog, data, worker.device), "pretrain"
    )
    found = estimate(features_ND, recipe.seed, display.counting("counting", "numbers tried"))
    display.finish()
    display.line(found.why)
    recipe = override(recipe, [f"data.num_clusters={found.chosen}"])
    # Pretrain's figures were for the provisional number of clusters: measure them again.
    context = Context(recipe, data, catalog.labels, normalisation(recipe, catalog), worker.device)
    mined = MinedNeighbors.load(folder / "pretrain" / "neighbors.parquet")
    place = folder / "pretrain" / "stage.json"
    record = storage.read_json(place)
    record["figures"] |= measure_features(context, features_ND, mined)
    storage.write_json(place, record)
    storage.write_json(path, found.as_dict())
    return recipe, found
