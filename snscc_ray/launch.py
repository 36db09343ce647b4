"""A run on Ray: the same engine in each worker of a Ray Train group, with retries."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from snscc_ray import checkpoints, distributed, recipes
from snscc_ray.cluster import Probe, Scale, check_alike, check_visible, connected, placed
from snscc_ray.config import Recipe, StageName
from snscc_ray.data.imageset import Catalog, Rows, assemble
from snscc_ray.data.resident import Images, ResidentData
from snscc_ray.data.sources import list_rows
from snscc_ray.data.stream import ray_reader, ray_resident, ray_survey, resident_images
from snscc_ray.data.streamed import StreamedData, StreamedSet, choose_mode
from snscc_ray.engine import Interrupted
from snscc_ray.errors import TrainingError, UserError
from snscc_ray.monitor import Display, Journal, RunMonitor, Screen, Silent
from snscc_ray.paths import as_path, is_url
from snscc_ray.run import Result, check, check_streamed, execute, final_figures
from snscc_ray.run_folder import prepare_folder, read_recipe, remove_tree

# Ray Train's own folder within the run folder; it is removed once the run is finished.
_RAY = "ray"
_IMAGES = "images"
_POLL_SECONDS = 0.2
# Progress is told this often: a call per step would cost more than small steps themselves.
_TELL_SECONDS = 0.5
# How often a worker group is put together again when nodes are missing: Ray tries once a minute.
_START_SECONDS = 60


@dataclass(frozen=True)
class _Data:
    """What is known of the set, and how a worker comes by its images."""

    catalog: Catalog
    load: Callable[[torch.device], Images]
    datasets: dict[str, Any]  # Ray Data sets that Ray Train hands to every worker


@dataclass(frozen=True)
class Job:
    """All a worker needs to know; goes to it pickled."""

    recipe: Recipe
    folder: str
    stages: tuple[StageName, ...]
    overwrite: bool
    catalog: Any  # reference to a Catalog
    load: Callable[[torch.device], Images]
    store: str | None = None  # of stages, see `execute`


def run_on_ray(
    name: str | None,
    overrides: list[str],
    folder: Path,
    stages: tuple[StageName, ...],
    resume: bool,
    overwrite: bool,
    console: Console,
    scale: Scale,
) -> Result:
    """Run a recipe on the workers of a cluster, or of Ray on this machine.

    An unfinished run of the same recipe in `folder` is continued. Workers that are lost are
    started again from the last checkpoint, up to `runtime.max_failures` times.
    Raises UserError, TrainingError, or Interrupted once there is a run to resume.
    """
    recipe = recipes.get(name) if name else read_recipe(folder)
    recipe = recipes.override(recipe, overrides)
    unfinished = (folder / "recipe.json").exists() and not (folder / "metrics.json").exists()
    resume = resume or (unfinished and not overwrite)
    prepare_folder(folder, recipe, resume=resume, overwrite=overwrite)
    if recipe.runtime.device == "cuda" and not scale.gpu:
        raise UserError("runtime.device=cuda needs workers with a GPU each; add --gpu")
    rows = list_rows(recipe.data)
    counts = range(scale.workers[0], scale.workers[1] + 1)
    for workers in counts:
        check(recipe, len(rows.ids), workers)
    display = Display(console)
    began = time.monotonic()
    # A report waits for the controller to look, which by default is every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with connected(scale):
        with placed(scale, display.line) as probes:
            check_alike(probes, scale.gpu)
        where = folder if is_url(folder) else folder.absolute()
        check_visible(where, some_files(rows))
        data = _prepare(recipe, rows, probes, display)
        display.finish()
        for workers in counts:
            check(recipe, len(data.catalog), workers)
        display.line(_headline(recipe, data.catalog, scale))
        for identifier, reason in data.catalog.skipped:
            display.line(f"left out {identifier}: {reason}")
        job = Job(recipe, str(where), stages, overwrite, ray.put(data.catalog), data.load)
        if overwrite:
            remove_tree(where / _RAY)
        train_group(job, scale, data.datasets, display)
    figures = checkpoints.read_json(where / "metrics.json")
    journal = Journal(where)
    journal.hyperparameters(recipe.model_dump(mode="json"), final_figures(figures))
    journal.finish()
    figures["seconds_in_all"] = round(time.monotonic() - began, 3)
    return Result(folder, figures)


def train_group(job: Job, scale: Scale, datasets: dict[str, Any], screen: Screen) -> None:
    """Train a job's stages by a group of workers, retries and all; returns once it is finished.

    Raises UserError, TrainingError, or Interrupted.
    """
    folder = as_path(job.folder)
    # On this node, as the others may be lost: Ray would put an actor that takes nothing anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay = (
        ray.remote(_Relay)
        .options(num_cpus=0, max_concurrency=16, scheduling_strategy=here)
        .remote()
    )
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "relay": relay},
        torch_config=_Torch(),
        scaling_config=_scaling(scale),
        run_config=_run_config(folder, job.recipe, scale),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    _fit(trainer, relay, screen)
    remove_tree(folder / _RAY)


def some_files(rows: Rows) -> list[str]:
    """All shards, or the first and the last image file."""
    if rows.shards is not None:
        return [str(shard.file) for shard in rows.shards]
    return [str(rows.files[0]), str(rows.files[-1])] if rows.files else []


def _prepare(recipe: Recipe, rows: Rows, probes: Sequence[Probe], display: Display) -> _Data:
    """Decide where the images will be, and read the set once. Raises UserError."""
    data = recipe.data
    mode, why = choose_mode(data, len(rows.ids), _room(probes), rows.streamable)
    display.line(f"images {mode}: {why}")
    progress = display.counting("reading", "images")
    if mode == "stream":
        check_streamed(recipe)
        streamed = ray_survey(rows, data, progress=progress)
        load = partial(load_streamed, ray.put(streamed), data.memory_mb)
        return _Data(streamed.catalog, load, {})
    if rows.streamable:
        dataset, streamed = ray_resident(rows, data, progress=progress)
        load = partial(_load_dataset, ray.put(streamed))
        return _Data(streamed.catalog, load, {_IMAGES: dataset})
    images = assemble(rows, data, recipe.runtime.decode_workers, progress)
    return _Data(images.catalog, partial(load_array, ray.put(images.images.numpy())), {})


def _room(probes: Sequence[Probe]) -> int:
    """Bytes that each worker could hold images in."""
    on_node = Counter(probe.node for probe in probes)
    # On a node, each worker holds the set, and the object store holds it once.
    host = min(probe.memory // (on_node[probe.node] + 1) for probe in probes)
    return min([host, *(probe.gpu_memory for probe in probes if probe.gpu_memory is not None)])


def load_streamed(streamed: Any, memory_mb: int, device: torch.device) -> Images:
    held: StreamedSet = ray.get(streamed)
    return StreamedData(held, device, ray_reader(held, memory_mb))


def _load_dataset(streamed: Any, device: torch.device) -> Images:
    shard = ray.train.get_dataset_shard(_IMAGES)
    return ResidentData(resident_images(shard, ray.get(streamed)), device)


def load_array(images: Any, device: torch.device) -> Images:
    # A copy: what the object store holds may not be written to, which torch minds.
    return ResidentData(torch.from_numpy(np.array(ray.get(images))), device)


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
            _show(ray.get(relay.drain.remote()), screen)
        _show(ray.get(relay.drain.remote()), screen)
        fault = ray.get(relay.fault.remote())
    except KeyboardInterrupt as stop:
        raise Interrupted from stop
    finally:
        screen.finish()
    if fault is not None:
        kind, message = fault
        raise (UserError if kind == "user" else TrainingError)(message)
    if failed:
        raise TrainingError(_why_failed(failed[0])) from failed[0]


def _show(events: list[tuple[str, tuple[Any, ...]]], screen: Screen) -> None:
    for name, arguments in events:
        getattr(screen, name)(*arguments)


def _why_failed(error: BaseException) -> str:
    """The last line of what Ray has to say, which is what happened."""
    failures = getattr(error, "worker_failures", None) or {}
    cause: object = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (
        f"the workers failed too often: {lines[-1] if lines else type(error).__name__}; mend that "
        "and run the same command again to continue, or raise runtime.max_failures"
    )


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
        resources_per_worker=scale.bundle(),
        placement_strategy="PACK",
    )


def _run_config(folder: Path, recipe: Recipe, scale: Scale) -> RunConfig:
    filesystem = None
    storage = str(folder)
    if is_url(folder):
        # The same credentials and settings as for our own files.
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        store: Any = folder
        filesystem, storage = PyFileSystem(FSSpecHandler(store.fs)), store.path
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


class _Relay:
    """An actor that carries what the first worker tells to the process the person looks at."""

    def __init__(self) -> None:
        self._events: list[tuple[str, tuple[Any, ...]]] = []
        self._fault: tuple[str, str] | None = None
        self._starts = 0

    def tell(self, events: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._events += events

    def drain(self) -> list[tuple[str, tuple[Any, ...]]]:
        events, self._events = self._events, []
        return events

    def started(self) -> int:
        """Count the times the workers were started, this one included."""
        self._starts += 1
        if self._starts > 1:
            self._events.append(("finish", ()))
            self._events.append(
                ("line", ("workers were lost and have been started again: going on from the last "
                          "checkpoint",))
            )  # fmt: skip
        return self._starts

    def give_up(self, kind: str, message: str) -> None:
        if self._fault is None:
            self._fault = (kind, message)

    def fault(self) -> tuple[str, str] | None:
        return self._fault


class _Telling:
    """A `Screen` that is elsewhere; progress is told now and then, the rest at once."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._steps = 0
        self._told = 0.0

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self._tell("start", stage, epochs, steps, done)

    def advance(self, steps: int = 1) -> None:
        self._steps += steps
        if time.monotonic() - self._told > _TELL_SECONDS:
            self._tell()

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self._tell("epoch", stage, epoch, figures)

    def line(self, text: str) -> None:
        self._tell("line", text)

    def finish(self) -> None:
        self._tell("finish")

    def _tell(self, name: str | None = None, *arguments: Any) -> None:
        events: list[tuple[str, tuple[Any, ...]]] = []
        if self._steps:
            events.append(("advance", (self._steps,)))
            self._steps = 0
        if name is not None:
            events.append((name, arguments))
        self._told = time.monotonic()
        self._relay.tell.remote(events)


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
            monitor = RunMonitor(Journal(folder), _Telling(relay))
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
