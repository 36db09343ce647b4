"""`snscc fit`: from a folder of images to clusters, choosing the settings."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from snscc_ray.answers.names import keep_edited
from snscc_ray.answers.report import content
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override, validate
from snscc_ray.config.paths import as_path, is_url
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core import storage
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.data.loading.resident import Images
from snscc_ray.data.look import ImageStats, inspect_images, resolve_reading
from snscc_ray.data.rows import Rows
from snscc_ray.data.sources import list_rows
from snscc_ray.fit.choose import Pick, Preferences, choose
from snscc_ray.fit.count import execute_counted, expected_seconds
from snscc_ray.fit.embeddings import choose_for_embeddings
from snscc_ray.fit.here import Here, Machine
from snscc_ray.fit.overrides import as_paced, as_set, data_settings, with_overrides
from snscc_ray.models.frozen import components_of, feature_width
from snscc_ray.runs.finished import RECORD
from snscc_ray.runs.folder import (
    FIT_FILE,
    holds_something,
    prepare_folder,
    refuse_moved,
    remove_run,
)
from snscc_ray.runs.local import device_bytes, report_skipped, terminated_like_interrupted
from snscc_ray.runs.pace import paced
from snscc_ray.runs.plan import check_plan
from snscc_ray.runs.run import Result, execute
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import choose_device

_PROVISIONAL = 10  # number of clusters before counting; Pretrain does not depend on it


@dataclass(frozen=True)
class FitRequest:
    """The arguments of `snscc fit`, with absolute paths."""

    source: str
    folder: Path
    wishes: Preferences
    folders_are_labels: bool | Literal["deepest"] = False
    overrides: tuple[str, ...] = ()
    budget: float | None = None  # seconds; None: see `paced`
    device: str = "auto"
    overwrite: bool = False

    def where(self) -> dict[str, Any]:
        """Return the fields of DataSettings that say where the images are."""
        return {
            "source": "auto",
            "path": self.source,
            "skip_corrupt": True,
            "folders_are_labels": self.folders_are_labels,
        }

    def asked(self) -> dict[str, Any]:
        """Return the arguments that identify a run, to recognise a stopped one."""
        wishes = self.wishes
        return {
            "source": self.source,
            "clusters": wishes.clusters,
            "image_size": wishes.image_size,
            "max_imbalance": wishes.max_imbalance,
            "encoder": wishes.encoder and wishes.encoder.model_dump(mode="json"),
            "from_scratch": wishes.from_scratch,
            "folders_are_labels": self.folders_are_labels,
            "overrides": list(self.overrides),
            "budget": self.budget,
        }


@dataclass(frozen=True)
class FitResult:
    result: Result
    images: tuple[Catalog, Images]  # for the report
    expected_end: float | None  # when the report was expected, by `time.monotonic`


@dataclass(frozen=True)
class Start:
    """What is known of a fit before a machine is needed."""

    begun: Recipe | None  # of a run that the same request began
    rows: Rows
    seen: ImageStats


def fit_images(request: FitRequest, console: Console) -> FitResult:
    """Fit in this process: `look_at` and `fit_on`."""
    display = Display(console)
    device = choose_device(request.device)
    return fit_on(Here(device, display), request, look_at(request, display), display)


@terminated_like_interrupted()
def look_at(request: FitRequest, display: Display) -> Start:
    """Find a stopped run of the same request, and list and inspect the images.

    Changes nothing. Raises UserError.
    """
    folder = request.folder
    begun = None if request.overwrite else _begun(request)
    if begun is not None:
        refuse_moved(folder)
        finished = (folder / STAGES[-1] / RECORD).exists()
        display.line(
            f"the run in {folder} is finished; its report is written again"
            if finished
            else f"continuing the run in {folder}"
        )
        settings = begun.data
    else:
        if holds_something(folder) and not request.overwrite:
            raise UserError(
                f"{folder} already holds files that are not from `snscc fit`; use --overwrite to "
                "replace a run there, or another --out"
            )
        settings = data_settings(request.where(), request.overrides)
    rows = list_rows(settings, display.finding("listing", "images"))
    return Start(begun, rows, inspect_images(rows, display.counting("looking", "images")))


@terminated_like_interrupted()
def fit_on(machine: Machine, request: FitRequest, start: Start, display: Display) -> FitResult:
    """Choose a recipe, print the reasons and the expected time, and run it on a machine.

    The same request continues a stopped run. Raises UserError before anything is written,
    TrainingError from the training loop, and Interrupted once there is a run to continue.
    """
    folder, begun, rows, seen = request.folder, start.begun, start.rows, start.seen
    picks: list[Pick] = []
    if begun is None:
        choosing = choose if rows.vectors is None else choose_for_embeddings
        recipe, picks = choosing(
            request.folder.name,
            request.where(),
            seen,
            gpu=machine.gpu,
            free_bytes=machine.free_bytes,
            workers=machine.counts,
            wishes=with_overrides(request.wishes, request.overrides),
        )
        clusters = request.wishes.clusters or min(_PROVISIONAL, len(rows.ids) // 2)
        recipe = override(recipe, [f"data.num_clusters={clusters}", *request.overrides])
        picks = as_set(picks, recipe, request.overrides)
    else:
        recipe = begun
    settings, rows = resolve_reading(recipe.data, rows, seen)
    recipe = recipe.model_copy(update={"data": settings})
    plan = check_plan(recipe, rows, machine.counts)
    if begun is None:
        prepare_folder(folder, recipe, resume=False, overwrite=request.overwrite)
    catalog = machine.load(plan, folder)
    counting = request.wishes.clusters is None
    if counting and catalog.distinct == 1:
        raise UserError(
            f"all {len(catalog):,} images are identical, so there is nothing to cluster; give "
            "others"
        )
    report_skipped(catalog, display)
    for pick in picks:
        display.line(f"  {pick.what}: {pick.value} ({pick.why})")
    expected_end = None
    try:
        if picks:
            chosen = recipe
            recipe, expected_end = _paced(request, recipe, catalog, machine, display)
            display.expect(expected_end)
            picks = as_paced(picks, chosen, recipe)
            if request.overwrite:
                if kept := keep_edited(request.folder):
                    display.line(
                        f"the names that were edited are kept in {kept}: they are of the "
                        "former clusters"
                    )
                remove_run(request.folder)
            # With this the same request recognises and continues the run if it is stopped.
            noted = {
                "asked": request.asked(),
                "picked": [pick.as_dict() for pick in picks],
                "recipe": recipe.model_dump(mode="json"),
            }
            storage.write_json(request.folder / FIT_FILE, noted)
        result = machine.run(recipe, folder, work=execute_counted if counting else execute)
    except KeyboardInterrupt as stop:
        raise Interrupted from stop
    return FitResult(result, (catalog, machine.images()), expected_end)


def _paced(
    request: FitRequest, recipe: Recipe, catalog: Catalog, machine: Machine, display: Display
) -> tuple[Recipe, float | None]:
    """Fit the epochs into the time, and print and return when the report is expected.

    Only this process is measured: elsewhere the recipe stays, and the time is None. Raises
    UserError.
    """
    if not isinstance(machine, Here):
        return recipe, None
    data = machine.images()
    recipe, seconds = paced(
        recipe, catalog, data, machine.device, request.budget, display, request.folder.parent
    )
    if seconds is None:
        return recipe, None
    counting = ""
    if request.wishes.clusters is None:
        counting = "counting the clusters and "
        if isinstance(data, FeatureBank):
            width = components_of(recipe, data.width, len(catalog))
        else:
            width = feature_width(recipe, len(catalog))
        seconds += expected_seconds(len(catalog), width)
    seconds += content.expected_seconds(recipe, len(catalog))
    display.line(f"with {counting}the report about {seconds / 60:.1f} minutes from now")
    return recipe, time.monotonic() + seconds


def recipe_for(
    source: str, wishes: Preferences, overrides: Sequence[str], gpu: bool | None = None
) -> Recipe:
    """Choose a recipe for images as `fit_images` does, without a limit of time.

    overrides: they must hold data.num_clusters. gpu: whether workers elsewhere have GPUs; None: it
    is for this machine, whose free memory counts in any case. Raises UserError.
    """
    where = {"source": "auto", "path": source, "skip_corrupt": True}
    runtime = [text for text in overrides if text.strip().startswith("runtime.")]
    here = override(recipes.get("images"), runtime).runtime.device
    device = choose_device({None: here, True: "auto", False: "cpu"}[gpu])
    recipe, _ = choose(
        name_of(source),
        where,
        inspect_images(list_rows(data_settings(where, overrides))),
        gpu=gpu or device.type == "cuda",
        free_bytes=device_bytes(device),
        wishes=with_overrides(wishes, overrides),
    )
    return override(recipe, overrides)


def name_of(source: str) -> str:
    """Return the name that a run on these images has by default."""
    # Resolve `..` to the name of the folder it points to.
    whole = source if is_url(source) else os.path.abspath(source)
    return re.sub(r"\.(parquet|npy|npz)$", "", as_path(whole).name) or "images"


def _begun(request: FitRequest) -> Recipe | None:
    """Return the recipe of a run that this same request began in the folder, or None.

    Raises UserError if a request with other options began it.
    """
    path = request.folder / FIT_FILE
    if not path.exists():
        return None
    held = storage.read_json(path)
    try:
        asked, recipe = held["asked"], held["recipe"]
        earlier = {"from_scratch": False} | asked  # older versions do not note it
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is damaged; use --overwrite to replace the run, or another --out"
        ) from None
    if difference := _difference(earlier, request.asked()):
        raise UserError(
            f"{request.folder} holds a fit with other options ({difference}); use --overwrite to "
            "replace it, or another --out"
        )
    return validate(recipe)


# The names of FitRequest.asked on the command line.
_OPTIONS = {
    "source": "DATA",
    "clusters": "--clusters",
    "image_size": "--image-size",
    "max_imbalance": "--max-cluster-imbalance",
    "encoder": "--encoder",
    "from_scratch": "--from-scratch",
    "folders_are_labels": "--labels or --labels-deepest",
    "overrides": "--set, --seed or --column",
    "budget": "--budget",
}


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Say which option differs between two requests, by its name on the command line."""

    def said(name: str, value: Any) -> str:
        if value in (None, False, []):
            return "auto" if name == "clusters" else "not given"
        if name == "encoder":
            return " + ".join(part["name"] for part in (value, *value.get("further", ())))
        if isinstance(value, list):
            return " ".join(value)
        return "given" if value is True else str(value)

    for name, option in _OPTIONS.items():
        was, now = there.get(name), here.get(name)
        if was != now:
            before, after = said(name, was), said(name, now)
            if before == after:  # such as another file of weights
                before, after = str(was), str(now)
            return f"{option} was {before} there and is {after} here"
    return None
