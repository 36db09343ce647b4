"""A run on Ray: each worker of a Ray Train group runs the same engine."""

from __future__ import annotations

import os

import ray
from rich.console import Console

from snscc_ray.cluster.group import RAY_FOLDER, Job, train_group
from snscc_ray.cluster.nodes import check_visible, connected, reserved
from snscc_ray.cluster.scale import Scale, check_alike, free_object_store
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import Recipe
from snscc_ray.core import storage
from snscc_ray.core.claim import claimed
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.ray_stream import share_images
from snscc_ray.runs.folder import check_apart, prepare_folder, remove_tree
from snscc_ray.runs.local import report_skipped
from snscc_ray.runs.monitor import Journal
from snscc_ray.runs.plan import check, make_plan
from snscc_ray.runs.run import Request, Result, final_figures
from snscc_ray.texts import counted


def run_on_ray(request: Request, console: Console, scale: Scale) -> Result:
    """Run a recipe on the workers of a cluster, or of Ray on this machine.

    Continues an unfinished run of the same recipe in the folder. Lost workers are restarted from
    the last checkpoint, up to `runtime.max_failures` times.
    Raises UserError, TrainingError, or, once there is a run to resume, Interrupted.
    """
    check_apart(request.folder, request.recipe().data.path)
    with claimed(request.folder, Display(console).line):
        return _run_on_ray(request, console, scale)


def _run_on_ray(request: Request, console: Console, scale: Scale) -> Result:
    recipe, folder, overwrite = request.recipe(), request.folder, request.overwrite
    unfinished = (folder / "recipe.json").exists() and not (folder / "metrics.json").exists()
    resume = request.resume or (unfinished and not overwrite)
    prepare_folder(folder, recipe, resume=resume, overwrite=overwrite)
    if recipe.runtime.device == "cuda" and not scale.gpu:
        raise UserError("runtime.device=cuda needs workers with one GPU each; add --gpu")
    counts = range(scale.workers[0], scale.workers[1] + 1)
    plan = make_plan(recipe, counts)
    recipe, rows = plan.recipe, plan.rows
    display = Display(console)
    # A report waits for the controller's next poll, by default every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with connected(scale):
        with reserved(scale, display.line) as probes:
            check_alike(probes, scale.gpu)
        where = folder if is_url(folder) else folder.absolute()
        check_visible(where, rows.some_files)
        data = share_images(recipe, rows, free_object_store(probes), display)
        if data.catalog.skipped:  # fewer images than were checked
            for workers in counts:
                check(recipe, len(data.catalog), workers)
        display.line(_headline(recipe, data.catalog, scale))
        report_skipped(data.catalog, display)
        job = Job(recipe, str(where), request.stages, overwrite, ray.put(data.catalog), data.load)
        if overwrite:
            remove_tree(where / RAY_FOLDER)
        train_group(job, scale, display)
    figures = storage.read_json(where / "metrics.json")
    journal = Journal(where)
    journal.hyperparameters(recipe.model_dump(mode="json"), final_figures(figures))
    journal.finish()
    return Result(folder, figures)


def _headline(recipe: Recipe, catalog: Catalog, scale: Scale) -> str:
    fewest, most = scale.workers
    workers = counted(most, "Ray worker")
    if fewest != most:
        workers = f"{fewest} to {workers}"
    return (
        f"{recipe.name}: {len(catalog):,} images of {recipe.data.image_size} px, "
        f"{recipe.data.num_clusters} clusters, seed {recipe.seed}, on {workers} "
        f"with a {'GPU' if scale.gpu else 'CPU share'} each"
    )
