"""A run on Ray: each worker of a Ray Train group runs the same engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import ray
import torch
from rich.console import Console

from snscc_ray.cluster.group import RAY_FOLDER, Job, train_group
from snscc_ray.cluster.nodes import check_visible, connected, reserved
from snscc_ray.cluster.scale import Probe, Scale, check_alike, check_device, free_object_store
from snscc_ray.cluster.tasks import Tasks, Work, run_tasks
from snscc_ray.config.paths import absolute
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core import storage
from snscc_ray.core.claim import claimed
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.ray_stream import Shared, share_images
from snscc_ray.data.loading.resident import Images
from snscc_ray.runs.finished import final_figures
from snscc_ray.runs.folder import check_apart, prepare_folder, read_recipe, remove_tree
from snscc_ray.runs.local import headline, report_skipped
from snscc_ray.runs.monitor import Journal
from snscc_ray.runs.plan import Plan, make_plan
from snscc_ray.runs.run import Request, Result, execute
from snscc_ray.texts import counted

T = TypeVar("T")


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
    check_device(recipe, scale.gpu)
    display = Display(console)
    plan = make_plan(recipe, scale.counts, display=display)
    with workers_of(scale, display) as workers:
        catalog = workers.load(plan, folder)
        display.line(headline(plan.recipe, catalog, workers.described))
        report_skipped(catalog, display)
        return workers.run(plan.recipe, folder, request.stages, overwrite=overwrite)


@contextmanager
def workers_of(scale: Scale, display: Display) -> Iterator[RayWorkers]:
    """Join or start the cluster, and check its workers. Raises UserError."""
    # A report waits for the controller's next poll, by default every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with connected(scale):
        with reserved(scale, display.line) as probes:
            check_alike(probes, scale.gpu)
        yield RayWorkers(scale, probes, display)


class RayWorkers:
    """The workers of a cluster, which load images once and train on them."""

    several = True

    def __init__(self, scale: Scale, probes: Sequence[Probe], display: Display) -> None:
        self.counts, self.gpu = scale.counts, scale.gpu
        self._scale, self._probes, self._display = scale, probes, display
        self._shared: Shared | None = None

    @property
    def free_bytes(self) -> int:
        """Return the least free memory of a worker's device."""
        free = [p.memory if p.gpu_memory is None else p.gpu_memory for p in self._probes]
        return min(free)

    @property
    def image_bytes(self) -> int:
        """Return the memory that each worker has for images."""
        return free_object_store(self._probes)

    @property
    def described(self) -> str:
        fewest, most = self._scale.workers
        workers = counted(most, "Ray worker")
        if fewest != most:
            workers = f"{fewest} to {workers}"
        return f"{workers} with a {'GPU' if self.gpu else 'CPU share'} each"

    def load(self, plan: Plan, folder: Path) -> Catalog:
        """Read the images once, for all workers. Raises UserError.

        folder: of the run; every node must see it.
        """
        check_visible(absolute(folder), plan.rows.some_files)
        shared = share_images(plan.recipe, plan.rows, self.image_bytes, self._display)
        self._shared = shared
        if shared.catalog.skipped:  # fewer images than were checked
            plan.check(len(shared.catalog))
        return shared.catalog

    def images(self) -> Images:
        """Return the loaded images for this process."""
        assert self._shared is not None
        return self._shared.load(torch.device("cpu"))

    def each(
        self,
        waits: Mapping[str, Sequence[str]],
        work: Work[T],
        max_failures: int,
        began: Callable[[str], None],
    ) -> Generator[tuple[str, T | str]]:
        """Do each piece of work on one worker and on the loaded images; see `run_tasks`."""
        assert self._shared is not None
        tasks = Tasks(waits, work, max_failures)
        return run_tasks(tasks, self._shared, self._scale, self._display, began)

    def run(
        self,
        recipe: Recipe,
        folder: Path,
        stages: tuple[StageName, ...] = STAGES,
        *,
        overwrite: bool = False,
        work: Callable[..., Result] = execute,
    ) -> Result:
        """Run the stages on the loaded images by `work`, which takes the arguments of `execute`.

        Raises UserError, TrainingError or Interrupted.
        """
        assert self._shared is not None
        where, catalog = absolute(folder), ray.put(self._shared.catalog)
        load = self._shared.load
        job = Job(recipe, str(where), stages, overwrite, catalog, load, work=work)
        if overwrite:
            remove_tree(where / RAY_FOLDER)
        train_group(job, self._scale, self._display)
        figures = storage.read_json(where / "metrics.json")
        journal = Journal(where)
        journal.hyperparameters(read_recipe(where).model_dump(mode="json"), final_figures(figures))
        journal.finish()
        return Result(folder, figures)
