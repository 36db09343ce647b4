"""A run on Ray: the same engine in each worker of a Ray Train group, with retries."""

from __future__ import annotations

import math
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)
from rich.console import Console

from snscc_ray import checkpoints, distributed
from snscc_ray.checkpoints import write_whole
from snscc_ray.cluster import (
    Probe,
    Scale,
    amounts,
    check_alike,
    check_fits,
    check_reachable,
    free_of,
    look,
    room,
    stderr_into,
    unseen,
    why_failed,
    why_not_joined,
)
from snscc_ray.config import Recipe, StageName
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.sources import list_rows
from snscc_ray.data.stream import Load, share_images
from snscc_ray.engine import Interrupted
from snscc_ray.errors import TrainingError, UserError
from snscc_ray.local import terminated_like_interrupted
from snscc_ray.monitor import Display, Journal, RunMonitor, Screen, Silent
from snscc_ray.paths import arrow_storage, as_path, is_url
from snscc_ray.pretrained import check_encoder
from snscc_ray.relay import Relay, Telling, show
from snscc_ray.run import Request, Result, check, execute, final_figures
from snscc_ray.run_folder import SEEN, prepare_folder, remove_tree

# Ray Train's own folder within the run folder; it is removed once the run is finished.
_RAY = "ray"
_POLL_SECONDS = 0.2
_LINE_SECONDS = 10.0
# How often a worker group is put together again when nodes are missing: Ray tries once a minute.
_START_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """All a worker needs to know; goes to it pickled."""

    recipe: Recipe
    folder: str
    stages: tuple[StageName, ...]
    overwrite: bool
    catalog: Any  # reference to a Catalog
    load: Load
    store: str | None = None  # of stages, see `execute`


# ---------------------------------------------------------------------------------- the cluster


@contextmanager
def connected(scale: Scale) -> Iterator[None]:
    """Join the cluster, or start Ray on this machine. Raises UserError when that fails."""
    address = scale.address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    check_reachable(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        quiet["include_dashboard"] = False
    with tempfile.TemporaryFile("w+") as said:
        try:
            with stderr_into(said):
                ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            said.seek(0)
            raise UserError(why_not_joined(address, error, said.read())) from error
    try:
        # Ray has put its own handler of SIGTERM in place, which aborts with a dump of the stack.
        with terminated_like_interrupted():
            yield
    finally:
        ray.shutdown()


@contextmanager
def placed(scale: Scale, say: Callable[[str], None]) -> Iterator[list[Probe]]:
    """Reserve the fewest workers asked for, probe where they stand, and let go of them after.

    Raises UserError when they cannot be placed: at once on this machine alone, which does not
    grow, and after `scale.wait` seconds on a cluster, saying what is free.
    """
    bundle, fewest = bundle_of(scale), scale.workers[0]
    if scale.alone:
        check_fits(bundle, fewest, ray.available_resources(), ray.cluster_resources())
    group = placement_group([bundle] * fewest, strategy="PACK")
    try:
        give_up, shown = time.monotonic() + scale.wait, time.monotonic()
        while not group.wait(1):
            if time.monotonic() > give_up:
                raise UserError(
                    f"{fewest} workers of {amounts(bundle)} could not be placed within "
                    f"{scale.wait:g} s: {_free()}; use fewer --workers, wait longer with --wait, "
                    "or see why nodes do not come with `ray status`"
                )
            if time.monotonic() - shown > _LINE_SECONDS:
                shown = time.monotonic()
                left = give_up - shown
                say(
                    f"waiting for {fewest} workers of {amounts(bundle)} each: {_free()}; "
                    f"giving up in {left:.0f} s"
                )
        yield _probe(group, bundle, fewest)
    finally:
        remove_placement_group(group)


def bundle_of(scale: Scale) -> dict[str, float]:
    """What each worker holds of the cluster."""
    return scale.bundle(ray.cluster_resources().get("CPU", 1))


def _free() -> str:
    return free_of(ray.available_resources(), ray.cluster_resources())


def _probe(group: Any, bundle: dict[str, float], workers: int) -> list[Probe]:
    """What each worker's place offers, looked at from there."""
    task = ray.remote(lambda: look(ray.util.get_node_ip_address()))
    results = [
        task.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
        ).remote()
        for index in range(workers)
    ]
    try:
        return ray.get(results)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, ImportError):
            raise UserError(
                f"a node of the cluster lacks a package ({cause}): install snscc_ray on every "
                "node, as cluster.yaml does in its setup_commands"
            ) from error
        raise


def check_visible(folder: Path, files: Sequence[str]) -> None:
    """Refuse a run folder or shards that some node cannot see. Raises UserError naming both."""
    marker, token = folder / f"{SEEN}{secrets.token_hex(8)}", secrets.token_hex(8)
    made = [] if is_url(folder) else [p for p in (folder, *folder.parents) if not p.exists()]
    write_whole(marker, lambda file: file.write(token.encode()))
    try:
        ask_every_node(unseen, str(marker), token, list(files))
    finally:
        with suppress(OSError):
            marker.unlink()
            for place in made:  # what is refused leaves no folder behind
                place.rmdir()


def ask_every_node(problem_of: Callable[..., str | None], *arguments: object) -> None:
    """Raises UserError for the first node that has a problem with what it is asked.

    One task on every node that is up, wherever workers will be placed: after a loss they may be
    placed anywhere.
    """
    task = ray.remote(lambda *what: problem_of(ray.util.get_node_ip_address(), *what))
    checks = [
        task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(*arguments)
        for node in ray.nodes()
        if node["Alive"]
    ]
    for problem in ray.get(checks):
        if problem is not None:
            raise UserError(problem)


# -------------------------------------------------------------------------------------- the run


def run_on_ray(request: Request, console: Console, scale: Scale) -> Result:
    """Run what is asked for on the workers of a cluster, or of Ray on this machine.

    An unfinished run of the same recipe in its folder is continued. Workers that are lost are
    started again from the last checkpoint, up to `runtime.max_failures` times.
    Raises UserError, TrainingError, or Interrupted once there is a run to resume.
    """
    recipe, folder, overwrite = request.recipe(), request.folder, request.overwrite
    unfinished = (folder / "recipe.json").exists() and not (folder / "metrics.json").exists()
    resume = request.resume or (unfinished and not overwrite)
    prepare_folder(folder, recipe, resume=resume, overwrite=overwrite)
    if recipe.runtime.device == "cuda" and not scale.gpu:
        raise UserError("runtime.device=cuda needs workers with a GPU each; add --gpu")
    rows = list_rows(recipe.data)
    counts = range(scale.workers[0], scale.workers[1] + 1)
    for workers in counts:
        check(recipe, len(rows.ids), workers)
    check_encoder(recipe, scale.workers[1])
    display = Display(console)
    # A report waits for the controller to look, which by default is every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with connected(scale):
        with placed(scale, display.line) as probes:
            check_alike(probes, scale.gpu)
        where = folder if is_url(folder) else folder.absolute()
        check_visible(where, rows.some_files)
        data = share_images(recipe, rows, room(probes), display)
        for workers in counts:
            check(recipe, len(data.catalog), workers)
        display.line(_headline(recipe, data.catalog, scale))
        for identifier, reason in data.catalog.skipped:
            display.line(f"left out {identifier}: {reason}")
        job = Job(recipe, str(where), request.stages, overwrite, ray.put(data.catalog), data.load)
        if overwrite:
            remove_tree(where / _RAY)
        train_group(job, scale, display)
    figures = checkpoints.read_json(where / "metrics.json")
    journal = Journal(where)
    journal.hyperparameters(recipe.model_dump(mode="json"), final_figures(figures))
    journal.finish()
    return Result(folder, figures)


def train_group(job: Job, scale: Scale, screen: Screen) -> None:
    """Train a job's stages by a group of workers, retries and all; returns once it is finished.

    Raises UserError, TrainingError, or Interrupted.
    """
    folder = as_path(job.folder)
    # On this node, as the others may be lost: Ray would put an actor that takes nothing anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay = (
        ray.remote(Relay).options(num_cpus=0, max_concurrency=16, scheduling_strategy=here).remote()
    )
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "relay": relay},
        torch_config=_Torch(),
        scaling_config=_scaling(scale),
        run_config=_run_config(folder, job.recipe, scale),
    )
    _fit(trainer, relay, screen)
    remove_tree(folder / _RAY)


def _fit(trainer: TorchTrainer, relay: Any, screen: Screen) -> None:
    """Run the trainer in a thread, and show here what its first worker tells.

    In a thread, because Ray would else take Ctrl-C for itself and end without a word.
    """
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            show(ray.get(relay.drain.remote()), screen)
        show(ray.get(relay.drain.remote()), screen)
        fault = ray.get(relay.fault.remote())
    except KeyboardInterrupt as stop:
        raise Interrupted from stop
    finally:
        screen.finish()
    if fault is not None:
        kind, message = fault
        raise (UserError if kind == "user" else TrainingError)(message)
    if failed:
        raise TrainingError(why_failed(failed[0])) from failed[0]


def _headline(recipe: Recipe, catalog: Catalog, scale: Scale) -> str:
    fewest, most = scale.workers
    workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"{recipe.name}: {len(catalog):,} images of {recipe.data.image_size} px, "
        f"{recipe.data.num_clusters} clusters, seed {recipe.seed}, on {workers} Ray "
        f"worker{'s' * (most > 1)} with a {'GPU' if scale.gpu else 'CPU share'} each"
    )


def _scaling(scale: Scale) -> ScalingConfig:
    fewest, most = scale.workers
    return ScalingConfig(
        num_workers=fewest if fewest == most else (fewest, most),
        use_gpu=scale.gpu,
        resources_per_worker=bundle_of(scale),
        placement_strategy="PACK",
    )


def _run_config(folder: Path, recipe: Recipe, scale: Scale) -> RunConfig:
    storage, filesystem = arrow_storage(folder)
    return RunConfig(
        name=_RAY,
        storage_path=storage,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(
            max_failures=recipe.runtime.max_failures,
            # Nodes that do not come back must not be waited for for ever.
            controller_failure_limit=max(1, math.ceil(scale.wait / _START_SECONDS)),
        ),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
    )


# ------------------------------------------------------------------------------ in the workers


def _name_interface() -> None:
    """Tell gloo which network to use: that of Ray.

    By itself it takes the address that the host's name stands for, which on many a machine is its
    own loopback, where no other host can reach it.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _OwnInterface(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class _Torch(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OwnInterface


class RayWorker:
    """One of the workers of a Ray Train group; checkpoints go through Ray's own report."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()

    def report(
        self, stage: str, metrics: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        """Every worker must call it; the first one's metrics and checkpoint count."""
        if checkpoint is None:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save(Path(folder) / f"{stage}.pt", checkpoint)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    def latest_checkpoint(self, stage: str) -> dict[str, Any] | None:
        latest = ray.train.get_checkpoint()
        if latest is None:
            return None
        with latest.as_directory() as folder:
            path = Path(folder) / f"{stage}.pt"
            return checkpoints.load(path, self.device) if path.exists() else None


def _work(config: dict[str, Any]) -> None:
    """What each worker runs, from its start or from where the group was lost."""
    job: Job = config["job"]
    relay = config["relay"]
    if ray.get(relay.fault.remote()) is not None:
        return  # a mistake is not mended by trying again
    device = get_device()
    first = distributed.rank() == 0
    # Started again, the workers go on with what they have done, and replace it no more.
    start = ray.get(relay.started.remote()) if first else 0
    monitor: RunMonitor | Silent = Silent()
    folder = as_path(job.folder)
    try:
        if first:
            monitor = RunMonitor(Journal(folder), Telling(relay.tell.remote))
        execute(
            job.recipe,
            ray.get(job.catalog),
            job.load(device),
            folder,
            RayWorker(device),
            monitor,
            job.stages,
            overwrite=job.overwrite and start == 1,
            store=as_path(job.store) if job.store else None,
        )
    except (UserError, TrainingError) as error:
        kind = "user" if isinstance(error, UserError) else "training"
        ray.get(relay.give_up.remote(kind, str(error)))
        raise
    finally:
        monitor.finish()
