"""Independent pieces of work on the same images, each on one worker of a cluster."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
import torch

from snscc_ray.cluster.group import start_relay
from snscc_ray.cluster.nodes import bundle_of, not_placed
from snscc_ray.cluster.relay import RelayScreen, show
from snscc_ray.cluster.scale import Scale
from snscc_ray.core.display import Display, Screen
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.ray_stream import Shared
from snscc_ray.data.loading.resident import Images
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import choose_device

T = TypeVar("T")

# Does the piece of this name, and returns its result, or a text: why it failed. It must be
# picklable. Any other error than Interrupted ends all pieces.
Work = Callable[[str, Catalog, Images, torch.device, Screen], T | str]

_POLL_SECONDS = 0.2
# How long pieces may take to save a checkpoint when they are told to stop.
_STOP_SECONDS = 10.0


class _Lost:
    """In place of a result: the worker was lost."""


@dataclass(frozen=True)
class Tasks(Generic[T]):
    """Pieces of work. `waits` maps the name of each, in order, to those it needs the results of."""

    waits: Mapping[str, Sequence[str]]
    work: Work[T]
    max_failures: int
    """How often a piece is started again after its worker was lost."""


def run_tasks(
    tasks: Tasks[T], shared: Shared, scale: Scale, display: Display, began: Callable[[str], None]
) -> Generator[tuple[str, T | str]]:
    """Do the pieces of work, up to `scale.workers` at the same time; yield each as it ends.

    A piece whose worker is lost is started again. If it fails, so do those that wait for it, with
    the same reason. Closed early, as on Ctrl-C, it tells the pieces to stop and waits a moment.
    began: called with the name when a piece begins.
    """
    crew = _Crew(tasks, shared, scale, display, began)
    try:
        yield from crew.work()
    finally:
        crew.stop()


class _Crew(Generic[T]):
    def __init__(
        self,
        tasks: Tasks[T],
        shared: Shared,
        scale: Scale,
        display: Display,
        began: Callable[[str], None],
    ) -> None:
        self._tasks, self._scale, self._display, self._began = tasks, scale, display, began
        bundle = bundle_of(scale)
        self._task = ray.remote(_in_worker).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_retries=0,  # they are counted, and told, here
        )
        self._relay = start_relay()
        self._given = ray.put((tasks.work, shared, scale.gpu))
        self._running: dict[Any, str] = {}
        self._screens: dict[str, Display] = {}  # of the pieces that have begun
        self._lost: Counter[str] = Counter()
        self._placed = time.monotonic()  # when a piece was last seen on a worker

    def work(self) -> Generator[tuple[str, T | str]]:
        waiting = dict(self._tasks.waits)
        failed: dict[str, str] = {}
        while waiting or self._running:
            for name, needed in list(waiting.items()):
                reasons = [failed[other] for other in needed if other in failed]
                free = len(self._running) < self._scale.workers[1]
                if reasons:
                    del waiting[name]
                    failed[name] = reasons[0]
                    yield name, reasons[0]
                elif free and not {*needed} & {*waiting, *self._running.values()}:
                    del waiting[name]
                    self._start(name)
            for name, result in self._ended():
                if isinstance(result, str):
                    failed[name] = result
                yield name, result

    def stop(self) -> None:
        """Tell the pieces that still run to stop, and wait until they have."""
        for reference in self._running:
            ray.cancel(reference)  # as Ctrl-C there: the training loop saves a checkpoint
        try:
            give_up = time.monotonic() + _STOP_SECONDS
            while self._running and time.monotonic() < give_up:
                ended, _ = ray.wait(list(self._running), timeout=_POLL_SECONDS)
                for reference in ended:
                    del self._running[reference]
                self._display.idle(f"stopping: {', '.join(self._running.values())}")
        finally:
            for screen in self._screens.values():
                screen.finish()

    def _start(self, name: str) -> None:
        self._running[self._task.remote(name, self._given, self._relay)] = name

    def _ended(self) -> Generator[tuple[str, T | str]]:
        """Show what the pieces tell, and yield those that have ended; wait a moment for one."""
        if not self._running:
            return
        ended, _ = ray.wait(list(self._running), timeout=_POLL_SECONDS)
        self._show()
        for reference in ended:
            name = self._running.pop(reference)
            if name in self._screens:
                self._screens.pop(name).finish()
            result = self._result_of(reference, name)
            if not isinstance(result, _Lost):
                yield name, result
                continue
            self._display.line(
                f"{name}: its worker was lost; starting it again from its last checkpoint"
            )
            self._start(name)

    def _result_of(self, reference: Any, name: str) -> T | str | _Lost:
        why = "its worker was lost"
        try:
            result: T | str | _Lost = ray.get(reference)
            if not isinstance(result, _Lost):
                return result
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.OutOfMemoryError:
            why = "its node ran out of memory"
        except ray.exceptions.RayError:
            pass
        self._lost[name] += 1
        if self._lost[name] <= self._tasks.max_failures:
            return _Lost()
        return (
            f"{why} ({self._lost[name]} times): run the same command again to continue, or raise "
            "runtime.max_failures"
        )

    def _show(self) -> None:
        for name, event in ray.get(self._relay.drain.remote()):
            if name not in self._running.values():
                continue  # late, from a worker that was lost
            if name not in self._screens:
                self._screens[name] = Display(self._display.console, name, self._display)
                if not self._lost[name]:
                    self._began(name)
            show([event], self._screens[name])
        waiting = [name for name in self._running.values() if name not in self._screens]
        if self._screens:
            self._placed = time.monotonic()
        elif time.monotonic() - self._placed > self._scale.wait:
            raise not_placed(self._scale, 1)
        lists = {"running": self._screens, "waiting for workers to start": waiting}
        self._display.idle(
            "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
        )


# ------------------------------------------------------------------------------ in the workers


def _in_worker(name: str, given: tuple[Work[T], Shared, bool], relay: Any) -> T | str | _Lost:
    work, shared, gpu = given
    # Ray's number of CPUs, or the user's; a process that has done other tasks has theirs.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    device = choose_device("cuda" if gpu else "cpu")

    def tell(events: list[Any]) -> Any:
        return relay.tell.remote([(name, event) for event in events])

    tell([("finish", ())])  # it has begun
    try:
        return work(name, shared.catalog, shared.load(device), device, RelayScreen(tell))
    except Interrupted:
        return _Lost()  # told to end by another than the driver, as when a machine is taken back
    finally:
        ray.get(tell([]))  # what was told comes before the result
