"""The only training loop: precision, optimiser, schedule, logging, checkpoints, resume.

A stage defines one step; everything else happens here. Random draws are keyed by (seed, stage,
epoch, row), so a run that was stopped anywhere and resumed gets the weights of an uninterrupted
run.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from snscc_ray.config.errors import TrainingError
from snscc_ray.core import checkpoints, distributed
from snscc_ray.core.clustering.metrics import warnings
from snscc_ray.data.loading.resident import Batch
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.schedules import build_optimizer, learning_rate
from snscc_ray.training.workers import Worker

# Several processes compare clocks only every so many steps, as each time they wait for one another.
_AGREE_STEPS = 10
# A larger share of an epoch spent waiting for images is worth a warning, unless the epoch is short.
_LONG_WAIT, _LEAST_SECONDS = 0.5, 10.0


class Monitor(Protocol):
    """Interface that shows and records a stage's progress."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self) -> None: ...

    def views(self, stage: str, views: tuple[Tensor, ...]) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None:
        """Show the progress of work outside the epochs, such as a search for neighbours."""
        ...

    def warn(self, stage: str, epoch: int, message: str) -> None: ...

    def line(self, text: str) -> None: ...


class Interrupted(Exception):
    """The user or the machine asked to stop; a checkpoint has been written."""


def fit(stage: Stage, context: Context, worker: Worker, monitor: Monitor, identity: str) -> None:
    """Train a stage from its latest checkpoint of the same identity to its last epoch.

    Raises TrainingError on a NaN loss, Interrupted on SIGTERM or Ctrl-C.
    """
    loop = _Loop(stage, context, worker, monitor, identity)
    loop.resume()
    with _graceful_stop() as stopped, context.float32_as_asked(), context.few_threads():
        loop.run(stopped)


class _Loop:
    def __init__(
        self, stage: Stage, context: Context, worker: Worker, monitor: Monitor, identity: str
    ) -> None:
        self.stage, self.context, self.worker, self.monitor = stage, context, worker, monitor
        self.identity = identity
        self.settings = stage.settings
        self.steps = context.data.steps(self.settings.batch_size)
        self.optimizer = build_optimizer(self.settings, stage.network)
        self.weights = list(stage.network.parameters())
        self.forward: nn.Module = stage.network
        self.epoch = 0
        self.step = 0
        # Sums over the epoch's steps, kept on the device so that no step waits for it.
        self.totals: dict[str, Tensor] = {}
        self.waited = 0.0  # seconds of the epoch, for batches
        self.warned: set[str] = set()
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        saved = self.worker.latest_checkpoint(self.stage.name)
        if saved is not None and saved["identity"] == self.identity:
            checkpoints.load_weights(
                self.stage.network, saved["network"], f"the {self.stage.name} checkpoint"
            )
            self.optimizer.load_state_dict(saved["optimizer"])
            self.stage.load_state(saved["stage"])
            self.epoch, self.step, self.totals = saved["epoch"], saved["step"], saved["totals"]
            _set_rng_state(saved["rng"])
        self.forward = distributed.wrap(self.stage.network)
        if self.context.recipe.runtime.compile:
            # The network itself is unchanged, and so are the names in its checkpoints. A stage has
            # at most two batch sizes: two fixed graphs are better than one for any size.
            self.forward = cast(nn.Module, torch.compile(self.forward, dynamic=False))

    def run(self, stopped: threading.Event) -> None:
        name, last_epoch = self.stage.name, self.settings.epochs
        done = self.epoch * self.steps + self.step
        self.monitor.start(name, last_epoch, self.steps, done)
        self.stage.network.train()
        while self.epoch < last_epoch:
            began, first, self.waited = time.monotonic(), self.step, 0.0
            if self.step == 0:
                self.stage.begin_epoch(self.epoch)
            self._train_epoch(stopped)
            figures = self._means()
            # Take the time after reading the means, which waits for the device.
            seconds = time.monotonic() - began
            figures |= self.stage.end_epoch(self.epoch)
            figures["learning_rate"] = learning_rate(self.settings, self.epoch + 1)
            figures["images_per_second"] = (
                len(self.context.data) * (1 - first / self.steps) / seconds
            )
            figures["wait_share"] = self.waited / seconds
            self.monitor.epoch(name, self.epoch, figures)
            self._warn(figures, seconds)
            self.epoch, self.step, self.totals = self.epoch + 1, 0, {}
            # No process may stop alone, so they agree at the end of an epoch.
            stop = distributed.any_process(stopped.is_set())
            # Always save after the last epoch, as what follows (mining, for example) may take long.
            self._checkpoint(figures, due=self.epoch == last_epoch, stop=stop)

    def _warn(self, figures: dict[str, float], seconds: float) -> None:
        """Report each warning once per stage, not once per epoch."""
        found = warnings(figures, self.context.recipe.data.num_clusters)
        if figures["wait_share"] > _LONG_WAIT and seconds > _LEAST_SECONDS:
            found["waits-for-images"] = (
                f"{figures['wait_share']:.0%} of the epoch was spent waiting for images; pack them "
                "with `snscc pack`, or hold them in memory with data.mode=resident"
            )
        for name, message in found.items():
            if name not in self.warned:
                self.monitor.warn(self.stage.name, self.epoch, f"{name}: {message}")
                self.warned.add(name)

    def _train_epoch(self, stopped: threading.Event) -> None:
        stage = self.stage
        viewer = stage.viewer(self.epoch)
        batches = self.context.data.epoch(
            self.settings.batch_size,
            self.context.key(stage.name, self.epoch, "order"),
            self.step,
            viewer if self.context.recipe.data.augment_in == "data" else None,
        )
        for batch in self._timed(batches):
            rate = learning_rate(self.settings, self.epoch + self.step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            views = batch.views or viewer(batch.inputs, batch.drawing_rows_B)
            if self.epoch == 0 and self.step == 0:
                self.monitor.views(stage.name, views)
            with self.context.autocast():
                terms = stage.step(self.forward, views, batch)
            loss = torch.stack(list(terms.values())).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.weights, self.settings.clip_norm, foreach=True)
            self.optimizer.step()
            stage.after_step()
            self._add(terms | {"total": loss})
            self.step += 1
            self.monitor.advance()
            if self.step < self.steps:
                alone = self.worker.world_size == 1
                self._checkpoint({}, due=False, stop=alone and stopped.is_set())

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and count the seconds that this process waits for them."""
        left = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(left, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def _add(self, terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            term = term.detach()
            self.totals[name] = self.totals[name] + term if name in self.totals else term

    def _means(self) -> dict[str, float]:
        """Return each loss term's mean over the epoch. Raises TrainingError if not finite."""
        names = list(self.totals)
        values = torch.stack(list(self.totals.values())).double().cpu() / self.steps
        broken = [name for name, value in zip(names, values, strict=True) if not value.isfinite()]
        if broken:
            message = (
                f"nan-loss: {', '.join(broken)} is not a finite number in stage {self.stage.name}, "
                f"epoch {self.epoch}; lower {self.stage.name}.learning_rate or set "
                f"{self.stage.name}.clip_norm"
            )
            self.monitor.warn(self.stage.name, self.epoch, message)
            raise TrainingError(message)
        return {f"loss/{name}": float(value) for name, value in zip(names, values, strict=True)}

    def _checkpoint(self, figures: dict[str, float], *, due: bool, stop: bool) -> None:
        """Save a checkpoint if one is due; with `stop`, save and raise Interrupted."""
        every = self.context.recipe.runtime.checkpoint_steps
        position = self.epoch * self.steps + self.step
        if not (due or stop or (every and position % every == 0) or self._late()):
            return
        if self.totals:
            self._means()  # a checkpoint with NaN weights would replace the last good one
        state = self._state() if self.worker.rank == 0 else None
        self.worker.report(self.stage.name, figures, state)
        self.saved_at = time.monotonic()
        if stop:
            raise Interrupted

    def _late(self) -> bool:
        """Whether the last checkpoint is too old; the same answer on every process."""
        late = time.monotonic() - self.saved_at >= self.context.recipe.runtime.checkpoint_seconds
        if self.worker.world_size == 1:
            return late
        # Clocks differ, but all processes must report together, so they agree now and then.
        return self.step % _AGREE_STEPS == 0 and distributed.any_process(late)

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "network": self.stage.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage.state(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.totals,
            "rng": _rng_state(),
        }


def _rng_state() -> dict[str, Tensor]:
    """Our code does not draw from these generators, but an encoder with dropout would."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def _graceful_stop() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a request to stop at the next step boundary."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def ask(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
