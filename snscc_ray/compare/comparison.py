"""Run a comparison: several methods on the same images with the same encoder, in one folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

from snscc_ray.compare.methods import (
    METHODS,
    load,
    ours,
    refuse_left_out,
    stages_of,
    title_of,
)
from snscc_ray.compare.study import MethodResult, Study, method_folder
from snscc_ray.compare.table import Row, figures_of, line, write_table
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import Recipe
from snscc_ray.core import storage, tables
from snscc_ray.core.claim import claimed
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog, ImageSet, assemble
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.loading.survey import choose_mode
from snscc_ray.runs.folder import (
    IMAGES_FILE,
    check_apart,
    check_images,
    first_difference,
    holds_something,
    note_images,
    prepare_folder,
    remove_run,
    remove_tree,
)
from snscc_ray.runs.local import free_bytes, report_skipped, terminated_like_interrupted
from snscc_ray.runs.plan import check, make_plan
from snscc_ray.runs.run import normalisation
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import choose_device

_MARK = "compare.json"


@dataclass(frozen=True)
class Request:
    """The arguments of `snscc compare`."""

    recipe: Recipe
    methods: tuple[str, ...]
    folder: Path
    overwrite: bool = False


@terminated_like_interrupted()
def compare(request: Request, console: Console) -> list[Row]:
    """Run the methods that have not finished yet; return the rows of all methods in the folder.

    A method that fails gets a row with the reason. All checks are made before the folder is
    changed. Raises UserError, or, once there is something to resume, Interrupted.
    """
    display = Display(console)
    check_apart(request.folder, request.recipe.data.path)
    with claimed(request.folder, display.line):
        return _compare(request, display)


def _compare(request: Request, display: Display) -> list[Row]:
    study = _prepare(request, display)
    recipe, folder, images = request.recipe, request.folder, len(study.catalog)
    failed: dict[str, str] = {}
    rows: list[Row] = []
    try:
        for index, method in enumerate(request.methods):
            place = f"[{index + 1}/{len(request.methods)}] {method}"
            if _outcome(study, method) is not None:
                display.line(f"{place}: already done")
                rows = _rows(study, failed)
                continue
            display.line(f"{place}: {title_of(method, frozen=study.frozen)}")
            reason = _run(study, method)
            if reason is not None:
                failed[method] = reason
            rows = _rows(study, failed)
            write_table(folder, recipe, rows, images)
            display.line(f"{place}: {line(next(row for row in rows if row.method == method))}")
    except KeyboardInterrupt as stop:  # between two training loops, or on a second Ctrl-C
        raise Interrupted from stop
    finally:
        display.finish()
    write_table(folder, recipe, rows, images)
    return rows


def _prepare(request: Request, display: Display) -> Study:
    """Check everything, read the images and mark the folder as a comparison."""
    recipe, folder = request.recipe, request.folder
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a comparison runs in one process; leave torchrun out")
    device = choose_device(recipe.runtime.device)
    _check_folder(request)
    recipe, images = _load(request, device, display)
    held = {"recipe": recipe.model_dump(mode="json"), "images": images.catalog.fingerprint}
    _check_images(request, images.catalog)
    if request.overwrite:
        _remove(folder)
    storage.write_json(folder / _MARK, held)
    note_images(folder, images.catalog)
    display.line(
        f"{recipe.name}: {len(images):,} images of {recipe.data.image_size} px, "
        f"{recipe.data.num_clusters} clusters, seed {recipe.seed}, on {device}"
    )
    data = ResidentData(images.images, device)
    normalize = normalisation(recipe, images.catalog)
    context = Context(recipe, data, images.catalog.labels, normalize, device)
    return Study(context, images.catalog, folder, display)


def _check_folder(request: Request) -> None:
    """Raise UserError if the folder holds something else. Changes nothing."""
    folder, recipe = request.folder, request.recipe
    prepare_folder(folder / ours.FOLDER, recipe, resume=False, overwrite=True)
    path = folder / _MARK
    if not path.exists():
        if holds_something(folder):
            raise UserError(
                f"{folder} already holds other files, but no comparison; use another --out"
            )
        return
    if request.overwrite:
        return
    held = storage.read_json(path)
    there = held.get("recipe") if isinstance(held, dict) else None
    difference = first_difference(there, recipe.model_dump(mode="json"))
    if difference:
        raise UserError(
            f"{folder} holds a comparison with other settings ({difference}); use another --out, "
            "or --overwrite"
        )


def _check_images(request: Request, catalog: Catalog) -> None:
    path = request.folder / _MARK
    if request.overwrite or not path.exists():
        return
    check_images(request.folder, catalog)
    if storage.read_json(path)["images"] != catalog.fingerprint:  # older folders have no ids
        raise UserError(
            f"{request.folder} holds a comparison of other images; use another --out, or "
            "--overwrite"
        )


def _load(request: Request, device: torch.device, display: Display) -> tuple[Recipe, ImageSet]:
    """Load the dataset into memory; return the recipe completed from it, and the images.

    Checks the batch sizes and neighbours of only the stages whose settings the methods use. Raises
    UserError, also if the dataset would have to be streamed.
    """
    recipe = request.recipe
    frozen = recipe.encoder.frozen
    if frozen:
        refuse_left_out(request.methods)
    elif recipe.encoder.weights is not None:
        raise UserError(
            "encoder.weights: methods that train the encoder start from random weights; set "
            "encoder.frozen=true to compare methods on its features, or leave encoder.weights out"
        )
    stages = stages_of(request.methods, frozen=frozen)
    plan = make_plan(recipe, stages=stages)
    recipe, rows = plan.recipe, plan.rows
    mode, why = choose_mode(recipe.data, len(rows.ids), free_bytes(device), rows.streamable)
    if mode == "stream":
        raise UserError(
            f"a comparison holds its images in memory ({why}); lower data.limit or "
            "data.image_size, or set data.mode=resident"
        )
    progress = display.counting("reading", "images")
    images = assemble(rows, recipe.data, recipe.runtime.decode_workers, progress)
    display.finish()
    report_skipped(images.catalog.for_clusters(recipe.data.num_clusters), display)
    if images.catalog.skipped:  # fewer images than were checked
        check(recipe, len(images), 1, stages)
    return recipe, images


def _remove(folder: Path) -> None:
    """Remove the files of an earlier comparison, by name."""
    remove_tree(folder / "methods")
    remove_run(folder / ours.FOLDER)
    for name in (_MARK, IMAGES_FILE, "compare.csv", "compare.md"):
        (folder / name).unlink(missing_ok=True)


def _run(study: Study, method: str) -> str | None:
    """Run one method and save its result. Return the reason if it failed. Raises Interrupted."""
    own = replace(study, seconds=[])
    went_on = any(method_folder(study.folder, method).glob("*/latest.pt"))
    try:
        found = load(method)(own)
    except Interrupted:
        raise
    except Exception as error:  # the other methods run in any case
        text = " ".join(str(error).split())
        return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    if went_on:
        found = replace(
            found, note="; ".join(filter(None, [found.note, "seconds of the last attempt only"]))
        )
    _keep(own, method, found)
    return None


def _keep(study: Study, method: str, found: MethodResult) -> None:
    place = method_folder(study.folder, method)
    clusters = pa.array(found.clusters_N.int().numpy())
    table = pa.table({"id": study.catalog.ids.column, "cluster": clusters})
    tables.write_table(place / "assignments.parquet", table)
    outcome = {
        "identity": study.identity(),
        "epochs": found.epochs,
        "seconds": round(sum(study.seconds), 3),
        "note": found.note,
    }
    storage.write_json(place / "outcome.json", outcome)


def _outcome(study: Study, method: str) -> dict[str, Any] | None:
    """Return the saved outcome of a finished method, or None."""
    place = method_folder(study.folder, method)
    path = place / "outcome.json"
    if not path.exists() or not (place / "assignments.parquet").exists():
        return None
    outcome = storage.read_json(path)
    return dict(outcome) if outcome["identity"] == study.identity() else None


def _rows(study: Study, failed: dict[str, str]) -> list[Row]:
    """Return a row for each finished or failed method, in the table's order."""
    mined = None
    neighbors = study.folder / ours.FOLDER / "pretrain" / "neighbors.parquet"
    if neighbors.exists():
        mined = MinedNeighbors.load(neighbors).neighbors_NK
    rows = []
    for method in METHODS:
        if method in failed:
            rows.append(Row(method, note=f"failed: {failed[method]}", frozen=study.frozen))
        elif outcome := _outcome(study, method):
            path = method_folder(study.folder, method) / "assignments.parquet"
            found = tables.read_table(path, ["cluster"])
            clusters_N = torch.tensor(found["cluster"].to_pylist())
            rows.append(
                Row(
                    method,
                    figures_of(clusters_N, study.catalog.labels, mined, study.clusters),
                    outcome["epochs"],
                    outcome["seconds"],
                    outcome["note"],
                    study.frozen,
                )
            )
    return rows
