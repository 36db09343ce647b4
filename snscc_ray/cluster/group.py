"""A group of Ray Train workers that run a recipe's stages, with retries."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from snscc_ray.cluster.nodes import bundle_of
from snscc_ray.cluster.relay import Relay, RelayScreen, show
from snscc_ray.cluster.scale import Scale, why_failed
from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.config.paths import arrow_storage, as_path
from snscc_ray.config.settings import Recipe, StageName
from snscc_ray.core import checkpoints, distributed
from snscc_ray.core.display import Screen
from snscc_ray.core.memory import share_one_pool
from snscc_ray.data.loading.ray_stream import Load
from snscc_ray.runs.folder import remove_tree
from snscc_ray.runs.monitor import Journal, NullMonitor, RunMonitor
from snscc_ray.runs.run import Result, execute
from snscc_ray.training.engine import Interrupted

# Ray Train's own folder in the run folder; removed when the run is finished.
RAY_FOLDER = "ray"
_POLL_SECONDS = 0.2
# Interval at which Ray retries to start a worker group when nodes are missing.
_START_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; sent to it pickled."""

    recipe: Recipe
    folder: str
    stages: tuple[StageName, ...]
    overwrite: bool
    catalog: Any  # reference to a Catalog
    load: Load
    store: str | None = None  # folder of stages, see `execute`
    work: Callable[..., Result] = execute  # takes the same arguments


def train_group(job: Job, scale: Scale, screen: Screen) -> None:
    """Train a job's stages on a group of workers, with retries. Returns when all are finished.

    Raises UserError, TrainingError, or Interrupted.
    """
    folder = as_path(job.folder)
    relay = start_relay()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "relay": relay},
        torch_config=_Torch(),
        scaling_config=_scaling(scale),
        run_config=_run_config(folder, job.recipe, scale),
    )
    _fit(trainer, relay, screen)
    remove_tree(folder / RAY_FOLDER)


def start_relay() -> Any:
    """Start a `Relay` on this node."""
    # Pinned, since others may be lost: Ray places an actor with num_cpus=0 anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Relay).options(num_cpus=0, scheduling_strategy=here).remote()


def _fit(trainer: TorchTrainer, relay: Any, screen: Screen) -> None:
    """Run the trainer in a thread, and show the messages of its first worker here.

    On the main thread, Ray would handle Ctrl-C itself and exit without a message.
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
        name=RAY_FOLDER,
        storage_path=storage,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(
            max_failures=recipe.runtime.max_failures,
            # Do not wait forever for nodes that do not come back.
            controller_failure_limit=max(1, math.ceil(scale.wait / _START_SECONDS)),
        ),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
    )


# ------------------------------------------------------------------------------ in the workers


def _name_interface() -> None:
    """Make gloo use the same network interface as Ray.

    By default gloo uses the address of the host's name. On many machines that is the loopback
    address, which no other host can reach.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _OwnInterface(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class _Torch(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OwnInterface


class RayWorker:
    """A worker of a Ray Train group; checkpoints go through Ray's report."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()

    def report(
        self, stage: str, metrics: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        """Report metrics and a checkpoint. All workers must call it; only rank 0's values count."""
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
    """Run the job in one worker, from the start or from where the group was lost."""
    share_one_pool()
    job: Job = config["job"]
    relay = config["relay"]
    if ray.get(relay.fault.remote()) is not None:
        return  # the same error would occur again
    device = get_device()
    first = distributed.rank() == 0
    # After a restart, the workers continue and do not overwrite their own results.
    start = ray.get(relay.started.remote()) if first else 0
    monitor: RunMonitor | NullMonitor = NullMonitor()
    folder = as_path(job.folder)
    try:
        if first:
            monitor = RunMonitor(Journal(folder), RelayScreen(relay.tell.remote))
        job.work(
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
