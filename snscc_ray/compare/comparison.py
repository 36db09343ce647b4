"""Run a comparison: several methods on the same images with the same encoder, in one folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

from snscc_ray.compare.here import Here, Machine
from snscc_ray.compare.methods import (
    METHODS,
    load,
    ours,
    refuse_left_out,
    stages_of,
    title_of,
)
from snscc_ray.compare.study import Features, MethodResult, Study, identity_of, method_folder
from snscc_ray.compare.table import Row, figures_of, line, write_table
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import Recipe
from snscc_ray.core import storage, tables
from snscc_ray.core.claim import claimed
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.display import Display, Screen
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.resident import Images, ResidentData
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
from snscc_ray.runs.local import headline, report_skipped, terminated_like_interrupted
from snscc_ray.runs.plan import Plan, make_plan
from snscc_ray.runs.run import normalisation
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import choose_device

WorkersOf = Callable[[Display], AbstractContextManager[Machine]]

# Pieces of work that several methods start from.
FEATURES, PRETRAIN = "features", "Pretrain"
_MARK = "compare.json"


@dataclass(frozen=True)
class Request:
    """The arguments of `snscc compare`."""

    recipe: Recipe
    methods: tuple[str, ...]
    folder: Path
    overwrite: bool = False


@dataclass(frozen=True)
class _Comparison:
    """What the table is made from: the images, the recipe completed from them, and the folder."""

    recipe: Recipe
    catalog: Catalog
    folder: Path

    @property
    def frozen(self) -> bool:
        return self.recipe.encoder.frozen

    @property
    def identity(self) -> str:
        return identity_of(self.recipe, self.catalog, ResidentData.order_name)


@terminated_like_interrupted()
def compare(request: Request, console: Console, workers_of: WorkersOf | None = None) -> list[Row]:
    """Run the methods that have not finished yet; return the rows of all methods in the folder.

    A method that fails gets a row with the reason. All checks are made before the folder is
    changed. workers_of: joins or starts a cluster, on whose workers several methods run at the
    same time; None: this process. Raises UserError, or, once there is something to resume,
    Interrupted.
    """
    display = Display(console)
    check_apart(request.folder, request.recipe.data.path)
    with claimed(request.folder, display.line), ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("a comparison runs in one process; leave torchrun out")
        plan = _plan(request, display)
        machine: Machine
        if workers_of is None:
            machine = Here(choose_device(plan.recipe.runtime.device), display)
        else:
            machine = stack.enter_context(workers_of(display))
        return _compare(request, _begin(request, plan, machine, display), machine, display)


def _compare(
    request: Request, comparison: _Comparison, machine: Machine, display: Display
) -> list[Row]:
    recipe, folder, images = comparison.recipe, comparison.folder, len(comparison.catalog)
    place = {
        name: f"[{number}/{len(request.methods)}] {name}"
        for number, name in enumerate(request.methods, 1)
    }
    failed: dict[str, str] = {}
    done = [name for name in request.methods if _outcome(comparison, name) is not None]
    for name in done:
        display.line(f"{place[name]}: already done")
    rows = _rows(comparison, failed)
    waits = _waits([name for name in request.methods if name not in done], machine, recipe)

    def began(name: str) -> None:
        if name in place:
            display.line(f"{place[name]}: {title_of(name, frozen=comparison.frozen)}")
        else:
            users = [user for user, needed in waits.items() if name in needed]
            display.line(f"{name}: once, for {', '.join(users)}")

    work = partial(_work, recipe, folder, shared=[])
    pieces = machine.each(waits, work, recipe.runtime.max_failures, began)
    try:
        with closing(pieces):
            for name, result in pieces:
                if name not in place:
                    display.line(f"{name}: " + (f"failed: {result}" if result else "done"))
                    continue
                if isinstance(result, str):
                    failed[name] = result
                elif result is not None:
                    _keep(comparison, name, *result)
                rows = _rows(comparison, failed)
                write_table(folder, recipe, rows, images)
                display.line(f"{place[name]}: {line(next(r for r in rows if r.method == name))}")
    except KeyboardInterrupt as stop:  # between two training loops, or on a second Ctrl-C
        raise Interrupted from stop
    finally:
        display.finish()
    write_table(folder, recipe, rows, images)
    return rows


def _waits(names: list[str], machine: Machine, recipe: Recipe) -> dict[str, list[str]]:
    """Return the pieces of work, each with those that it needs the results of.

    What several methods start from is a piece of its own if they run at the same time; else the
    first of them does it.
    """
    frozen = recipe.encoder.frozen
    waits = {name: [other for other in METHODS[name].after if other in names] for name in names}
    start = FEATURES if frozen else PRETRAIN
    users = [name for name in names if "pretrain" in stages_of([name], frozen=frozen)]
    if not machine.several or not users:
        return waits
    for name in users:
        waits[name].append(start)
    return {start: [], **waits}


def _begin(request: Request, plan: Plan, machine: Machine, display: Display) -> _Comparison:
    """Read the images and mark the folder as a comparison. Raises UserError."""
    recipe, folder, rows = plan.recipe, request.folder, plan.rows
    mode, why = choose_mode(recipe.data, len(rows.ids), machine.image_bytes, rows.streamable)
    if mode == "stream":
        raise UserError(
            f"a comparison holds its images in memory ({why}); lower data.limit or "
            "data.image_size, or set data.mode=resident"
        )
    catalog = machine.load(plan, folder)
    report_skipped(catalog, display)
    held = {"recipe": recipe.model_dump(mode="json"), "images": catalog.fingerprint}
    _check_images(request, catalog)
    if request.overwrite:
        _remove(folder)
    storage.write_json(folder / _MARK, held)
    note_images(folder, catalog)
    display.line(headline(recipe, catalog, machine.described))
    return _Comparison(recipe, catalog, folder)


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


def _plan(request: Request, display: Display) -> Plan:
    """Check the folder and the recipe, and list the images. Raises UserError.

    Checks the batch sizes and neighbours of only the stages whose settings the methods use.
    """
    recipe = request.recipe
    _check_folder(request)
    frozen = recipe.encoder.frozen
    if frozen:
        refuse_left_out(request.methods)
    elif recipe.encoder.weights is not None:
        raise UserError(
            "encoder.weights: methods that train the encoder start from random weights; set "
            "encoder.frozen=true to compare methods on its features, or leave encoder.weights out"
        )
    return make_plan(recipe, stages=stages_of(request.methods, frozen=frozen), display=display)


def _remove(folder: Path) -> None:
    """Remove the files of an earlier comparison, by name."""
    remove_tree(folder / "methods")
    remove_run(folder / ours.FOLDER)
    for name in (_MARK, IMAGES_FILE, "compare.csv", "compare.md"):
        (folder / name).unlink(missing_ok=True)


def _work(
    recipe: Recipe,
    folder: Path,
    name: str,
    catalog: Catalog,
    data: Images,
    device: torch.device,
    screen: Screen,
    *,
    shared: list[Features],
) -> tuple[MethodResult, float] | str | None:
    """Run one method, or what several start from. Return its result and seconds.

    Returns the reason if it failed. Raises Interrupted.
    """
    normalize = normalisation(recipe, catalog)
    context = Context(recipe, data, catalog.labels, normalize, device)
    study = Study(context, catalog, folder, screen, shared=shared)
    try:
        if name not in METHODS:
            ours.pretext(study)
            return None
        went_on = any(method_folder(folder, name).glob("*/latest.pt"))
        found = load(name)(study)
    except Interrupted:
        raise
    except Exception as error:  # the other methods run in any case
        text = " ".join(str(error).split())
        return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    if went_on:
        found = replace(
            found, note="; ".join(filter(None, [found.note, "seconds of the last attempt only"]))
        )
    return found, round(sum(study.seconds), 3)


def _keep(comparison: _Comparison, method: str, found: MethodResult, seconds: float) -> None:
    place = method_folder(comparison.folder, method)
    clusters = pa.array(found.clusters_N.int().numpy())
    table = pa.table({"id": comparison.catalog.ids.column, "cluster": clusters})
    tables.write_table(place / "assignments.parquet", table)
    outcome = {
        "identity": comparison.identity,
        "epochs": found.epochs,
        "seconds": seconds,
        "note": found.note,
    }
    storage.write_json(place / "outcome.json", outcome)


def _outcome(comparison: _Comparison, method: str) -> dict[str, Any] | None:
    """Return the saved outcome of a finished method, or None."""
    place = method_folder(comparison.folder, method)
    path = place / "outcome.json"
    if not path.exists() or not (place / "assignments.parquet").exists():
        return None
    outcome = storage.read_json(path)
    return dict(outcome) if outcome["identity"] == comparison.identity else None


def _rows(comparison: _Comparison, failed: dict[str, str]) -> list[Row]:
    """Return a row for each finished or failed method, in the table's order."""
    mined = None
    neighbors = comparison.folder / ours.FOLDER / "pretrain" / "neighbors.parquet"
    if neighbors.exists():
        mined = MinedNeighbors.load(neighbors).neighbors_NK
    clusters = comparison.recipe.data.num_clusters
    rows = []
    for method in METHODS:
        if method in failed:
            rows.append(Row(method, note=f"failed: {failed[method]}", frozen=comparison.frozen))
        elif outcome := _outcome(comparison, method):
            path = method_folder(comparison.folder, method) / "assignments.parquet"
            found = tables.read_table(path, ["cluster"])
            clusters_N = torch.tensor(found["cluster"].to_pylist())
            rows.append(
                Row(
                    method,
                    figures_of(clusters_N, comparison.catalog.labels, mined, clusters),
                    outcome["epochs"],
                    outcome["seconds"],
                    outcome["note"],
                    comparison.frozen,
                )
            )
    return rows
