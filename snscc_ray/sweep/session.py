"""Sweeps on Ray Tune: each distinct stage is one Tune trial, trained once for all that need it.

Only the folder of stages records what has been trained: the same command finds finished stages by
their identity, continues unfinished ones, and trains the rest.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from rich.console import Console

from snscc_ray.cluster.group import Job as GroupJob
from snscc_ray.cluster.group import train_group
from snscc_ray.cluster.nodes import check_visible, reserved
from snscc_ray.cluster.scale import (
    Probe,
    Scale,
    amounts,
    check_alike,
    free_object_store,
    free_of,
    probe_node,
)
from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.config.paths import absolute, arrow_storage
from snscc_ray.config.settings import Recipe, StageName
from snscc_ray.core.claim import claimed
from snscc_ray.core.display import Display, NullScreen
from snscc_ray.data.loading.ray_stream import Shared, share_images
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.runs.local import report_skipped
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.pace import Seconds, measure
from snscc_ray.runs.plan import make_plan
from snscc_ray.runs.run import execute
from snscc_ray.sweep.hooks import PerSeed, Watch
from snscc_ray.sweep.plan import Job, Ledger, searched
from snscc_ray.texts import counted
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import LocalWorker, choose_device

# Turn off Tune's reports on every trial; we show a progress bar and a table.
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"

# Tune prints pages for every trial that fails; we print one line.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

Scheduler = Literal["none", "asha", "median"]
Searcher = Literal["random", "optuna"]


@dataclass(frozen=True)
class Options:
    """How to search, and the resources of each trial."""

    searcher: Searcher = "random"
    scheduler: Scheduler = "none"
    metric: str = "health/score"
    grace: int = 1  # epochs before ASHA may stop a trial
    reduction: float = 3.0  # ASHA keeps one in this many at each rung
    workers_per_trial: int = 1
    cpus_per_trial: float = 1.0  # per worker
    gpus_per_trial: float = 0.0
    max_concurrent: int | None = None
    address: str | None = None

    def scale(self) -> Scale:
        """Return the scale of one trial's workers."""
        workers = (self.workers_per_trial, self.workers_per_trial)
        return Scale(
            workers,
            self.gpus_per_trial > 0,
            self.cpus_per_trial,
            self.address,
            fewer="use fewer --workers-per-trial",
            smaller="lower --cpus-per-trial or --gpus-per-trial",
        )

    def needs(self) -> dict[str, float]:
        """Return the total resources of one trial."""
        each = {"CPU": self.cpus_per_trial, "GPU": self.gpus_per_trial}
        return {kind: amount * self.workers_per_trial for kind, amount in each.items() if amount}


@dataclass(frozen=True)
class _Shared:
    """What every trial needs; kept in the object store."""

    images: Shared
    ledger: Ledger
    options: Options


class Session:
    """Ray and the images of a sweep, ready for its trials."""

    def __init__(self, recipe: Recipe, folder: Path, options: Options, console: Console) -> None:
        self.options, self.display = options, Display(console)
        self.folder = absolute(folder)
        # Beside the sweep's folder, so that other sweeps can reuse the stages.
        self.ledger = Ledger(self.folder.parent / "stages", self.folder)
        plan = make_plan(recipe, (options.workers_per_trial,), display=self.display)
        self.recipe, rows = plan.recipe, plan.rows
        probes = _probed(options, self.display.line)
        check_visible(self.folder, rows.some_files)
        self.concurrent = _concurrent(options)
        # Each trial holds the dataset, and the object store holds it once more.
        free = free_object_store(probes) // (self.concurrent + 1)
        self.images = share_images(self.recipe, rows, free, self.display)
        report_skipped(self.images.catalog, self.display)
        self._shared = ray.put(_Shared(self.images, self.ledger, options))

    def train(self, stage: StageName, jobs: Sequence[Job]) -> None:
        """Train the jobs of one stage, whose parents are finished. Raises Interrupted on Ctrl-C.

        A job whose worker is lost is started again up to `runtime.max_failures` times. One that
        fails is recorded in the ledger with the reason.
        """
        for job in jobs:
            if not self.ledger.ended(job):
                self.ledger.forget("failed", job.identity)
        lost: dict[str, str] = {}
        for _ in range(self.recipe.runtime.max_failures + 1):
            lost = self._run(stage, jobs)
            if not lost:
                break
            self.display.line(f"{counted(len(lost), 'trial')} lost with a worker; starting again")
        for identity, reason in lost.items():
            self.ledger.write("failed", identity, {"reason": reason})
        for job in jobs:
            if (record := self.ledger.read("failed", job.identity)) is not None:
                told = f"{stage} of {job.overrides}, seed {job.seed}"
                self.display.line(f"failed: {told}: {record['reason']}")

    def _run(self, stage: StageName, jobs: Sequence[Job]) -> dict[str, str]:
        """Run every job that has not ended or failed. Returns why jobs were lost, by identity.

        Tune itself starts a trial again up to `runtime.max_failures` times. But when it hears twice
        of one loss, it gives the trial up at once: only such a job is returned.
        """
        open_jobs = [job for job in jobs if not self._over(job)]
        if not open_jobs:
            return {}
        epochs = {job.identity: getattr(job.recipe, stage).epochs for job in open_jobs}
        began = [len(self.ledger.lines(stage, job.identity)) for job in open_jobs]
        watch = Watch(self.display, self.options.scale())
        self.display.start(stage, 1, sum(epochs.values()), sum(began), "epochs")
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trainable, given=self._shared, jobs=open_jobs),
                self._resources(),
            ),
            param_space={
                "trial": tune.grid_search(
                    [
                        {"job": number, "seed": job.seed, **job.overrides}
                        for number, job in enumerate(open_jobs)
                    ]
                )
            },
            tune_config=tune.TuneConfig(
                scheduler=self._scheduler(stage, jobs, open_jobs),
                max_concurrent_trials=self.concurrent,
                reuse_actors=self.options.workers_per_trial == 1,
            ),
            run_config=self._run_config(stage, watch),
        )
        tuner.fit()
        self.display.finish()
        lost = {}
        for trial in watch.given_up:
            identity = open_jobs[trial.config["trial"]["job"]].identity
            reason = _reason(trial.get_error())
            if trial.run_metadata.num_failures > self.recipe.runtime.max_failures:
                self.ledger.write("failed", identity, {"reason": reason})
            else:
                lost[identity] = reason
        if not all(job.identity in lost or self._over(job) for job in open_jobs):
            raise Interrupted
        return lost

    def _over(self, job: Job) -> bool:
        """Return whether the job is finished, was stopped early, or failed."""
        return self.ledger.ended(job) or self.ledger.read("failed", job.identity) is not None

    def measure(self) -> Seconds:
        """Run `pace.measure` where a trial would run. Empty for a streamed dataset."""
        if self.images.order_name != ResidentData.order_name:
            return {}
        task = ray.remote(_measure).options(
            num_cpus=self.options.cpus_per_trial, num_gpus=self.options.gpus_per_trial
        )
        return dict(ray.get(task.remote(self._shared, self.recipe)))

    def _resources(self) -> dict[str, float]:
        if self.options.workers_per_trial > 1:
            # The trial itself only waits for its workers: keep it on the head node, which a cloud
            # does not take back.
            return {"node:__internal_head__": 0.001}
        return self.options.needs()

    def _scheduler(
        self, stage: StageName, jobs: Sequence[Job], open_jobs: Sequence[Job]
    ) -> TrialScheduler:
        options = self.options
        epochs = max(getattr(job.recipe, stage).epochs for job in jobs)
        makers: dict[str, Callable[[], TrialScheduler]] = {
            "asha": lambda: AsyncHyperBandScheduler(
                time_attr="epoch",
                metric=options.metric,
                mode="max",
                max_t=max(epochs, 1),
                grace_period=min(options.grace, max(epochs, 1)),
                reduction_factor=options.reduction,
                stop_last_trials=False,  # after the last epoch, the stage still has to finish
            ),
            "median": lambda: MedianStoppingRule(
                time_attr="epoch", metric=options.metric, mode="max", grace_period=options.grace
            ),
        }
        make = makers.get(options.scheduler)
        if make is None or not searched(jobs):
            return FIFOScheduler()
        return PerSeed(make, jobs, open_jobs, self.ledger)

    def _run_config(self, stage: StageName, watch: Watch) -> tune.RunConfig:
        storage, filesystem = arrow_storage(self.folder / "tune")
        return tune.RunConfig(
            name=f"{stage}-{int(time.time())}",
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=self.recipe.runtime.max_failures),
            callbacks=[TBXLoggerCallback(), watch],
            verbose=0,
        )


def _probed(options: Options, say: Callable[[str], None]) -> list[Probe]:
    """Probe where one trial would run; a cluster may have to grow first.

    Raises UserError if a trial does not fit, or if nodes differ from this machine.
    """
    scale = options.scale()
    if scale.alone:
        if not _fitting(options):
            there = free_of(ray.available_resources(), ray.cluster_resources())
            raise UserError(
                f"a trial takes {amounts(options.needs())} and there are {there}: lower "
                "--workers-per-trial, --cpus-per-trial or --gpus-per-trial"
            )
        return [probe_node(ray.util.get_node_ip_address(), scale.gpu)]
    with reserved(scale, say) as probes:
        check_alike(probes, scale.gpu)
        return probes


def _fitting(options: Options) -> int:
    """Return how many trials fit on all nodes that are up."""
    there = ray.cluster_resources()
    return min(int(there.get(kind, 0) / need + 1e-6) for kind, need in options.needs().items())


def _concurrent(options: Options) -> int:
    """Return how many trials may run at once; a cluster can grow to `max_concurrent`."""
    if options.max_concurrent and not options.scale().alone:
        return options.max_concurrent
    fitting = max(1, _fitting(options))
    return min(fitting, options.max_concurrent or fitting)


def _reason(error: object) -> str:
    """Return the last line of a trial's error, which gives the cause."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[-1][:300] if said else type(error).__name__


# -------------------------------------------------------------------------------- in the trials


def _measure(shared: _Shared, recipe: Recipe) -> Seconds:
    device = choose_device("cuda" if shared.options.gpus_per_trial else "cpu")
    held = shared.images.load(torch.device("cpu"))
    return measure(recipe, shared.images.catalog, held, device, shared.ledger.store.parent)


class _TuneScreen(NullScreen):
    """A `Screen` that reports figures to Tune, which may then stop the trial."""

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        tune.report({**figures, "epoch": epoch + 1})


def _trainable(config: dict[str, Any], given: _Shared, jobs: Sequence[Job]) -> None:
    """Train one stage, from the start or from its checkpoint."""
    job = jobs[config["trial"]["job"]]
    # Two sweeps may need the same stage at once: the second waits and finds it finished.
    with claimed(given.ledger.stage_folder(job), lambda _: None, patient=True):
        if given.ledger.finished(job):
            return
        try:
            _train(job, given)
        except (UserError, TrainingError) as error:
            # Not raised: Tune would start the trial again, only to fail in the same way.
            given.ledger.write("failed", job.identity, {"reason": _reason(error)})


def _train(job: Job, given: _Shared) -> None:
    store, folder, options = given.ledger.store, given.ledger.stage_folder(job), given.options
    if options.workers_per_trial > 1:
        catalog, load = ray.put(given.images.catalog), given.images.load
        group = GroupJob(
            job.recipe, str(folder), (job.stage,), False, catalog, load, str(store)
        )  # fmt: skip
        train_group(group, options.scale(), _TuneScreen())
        return
    device = choose_device("cuda" if options.gpus_per_trial else "cpu")
    monitor = RunMonitor(Journal(folder), _TuneScreen())
    try:
        execute(
            job.recipe,
            given.images.catalog,
            given.images.load(device),
            folder,
            LocalWorker(folder, device),
            monitor,
            (job.stage,),
            store=store,
        )
    finally:
        monitor.finish()
