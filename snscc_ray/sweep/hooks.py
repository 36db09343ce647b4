"""What Ray Tune calls while the trials of a stage run: a scheduler, and a watch over them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from snscc_ray.cluster.nodes import LINE_SECONDS, bundle_of
from snscc_ray.cluster.scale import Scale, amounts, too_small
from snscc_ray.config.errors import UserError
from snscc_ray.core.display import Display
from snscc_ray.sweep.plan import Job, Ledger

# How often nodes are counted while trials run.
_ASK_SECONDS = 2.0
# Figures of a trial that was stopped which are recorded.
_KEPT = ("health/", "oracle/", "loss/")


class PerSeed(FIFOScheduler):  # type: ignore[misc]
    """One scheduler per seed: a trial is compared only with trials of the same seed.

    Records each decision to stop at once; it is final, also when the sweep is resumed. On resuming,
    the results of trials that ended before are replayed to the schedulers first.
    """

    def __init__(
        self,
        make: Callable[[], TrialScheduler],
        jobs: Sequence[Job],
        open_jobs: Sequence[Job],
        ledger: Ledger,
    ) -> None:
        super().__init__()
        self._schedulers = {job.seed: make() for job in jobs}
        self._jobs, self._ledger = open_jobs, ledger
        for job in jobs:
            if job not in open_jobs:
                self._replay(job)

    def _replay(self, job: Job) -> None:
        trial: Any = SimpleNamespace(trial_id=job.identity)
        scheduler = self._schedulers[job.seed]
        scheduler.on_trial_add(None, trial)
        for line in self._ledger.lines(job.stage, job.identity):
            scheduler.on_trial_result(None, trial, line | {"epoch": line["epoch"] + 1})

    def _of(self, trial: Any) -> TrialScheduler:
        return self._schedulers[trial.config["trial"]["seed"]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = self._of(trial).on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            job = self._jobs[trial.config["trial"]["job"]]
            figures = {name: result[name] for name in result if name.startswith(_KEPT)}
            record = {"epoch": result["epoch"], "figures": figures}
            self._ledger.write("stopped", job.identity, record)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


class Watch(TrialProgressCallback):  # type: ignore[misc]
    """Show progress in place of Tune, keep the trials given up, and limit the wait for nodes.

    Tune would wait silently, and forever. Its results do not say which trial it gave up before the
    first report.
    """

    def __init__(self, display: Display, scale: Scale) -> None:
        self.given_up: list[Any] = []  # trials
        self._display, self._scale = display, scale
        self._asked = self._shown = self._fitting = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to restore them; we never restore

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """Raise UserError if no running node could hold a trial's worker for `scale.wait` s."""
        now, scale = time.monotonic(), self._scale
        if now - self._asked < _ASK_SECONDS:
            return
        self._asked = now
        bundle = bundle_of(scale)
        small = too_small(bundle, [n["Resources"] for n in ray.nodes() if n["Alive"]])
        if small is None:
            self._fitting = now
            return
        left = self._fitting + scale.wait - now
        if left < 0:
            raise UserError(
                f"no trial could run for {scale.wait:g} s: {small}; see with `ray status` why "
                "nodes do not come, and run the same command again to continue"
            )
        if now - self._shown > LINE_SECONDS:
            self._shown = now
            self._display.line(
                f"waiting for a node for a trial ({amounts(bundle)}): {small}; giving up in "
                f"{left:.0f} s"
            )

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._display.advance()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Print nothing."""

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.given_up.append(trial)
