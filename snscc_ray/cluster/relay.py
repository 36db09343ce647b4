"""Relay display events from the first worker to the user's terminal; does not import Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from snscc_ray.core.display import Screen

# Interval between progress messages: one call per step would cost more than a small step itself.
_TELL_SECONDS = 0.5

# A method name of `Screen`, and its arguments.
Event = tuple[str, tuple[Any, ...]]


def show(events: list[Event], screen: Screen) -> None:
    for name, arguments in events:
        getattr(screen, name)(*arguments)


class Relay:
    """An actor that passes events from the first worker to the process with the display."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._fault: tuple[str, str] | None = None
        self._starts = 0

    def tell(self, events: list[Event]) -> None:
        self._events += events

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def started(self) -> int:
        """Return how many times the workers have been started, including this time."""
        self._starts += 1
        if self._starts > 1:
            self._events.append(("finish", ()))
            self._events.append(
                ("line", ("workers were lost; starting them again from the last checkpoint",))
            )  # fmt: skip
        return self._starts

    def give_up(self, kind: str, message: str) -> None:
        if self._fault is None:
            self._fault = (kind, message)

    def fault(self) -> tuple[str, str] | None:
        return self._fault


class RelayScreen:
    """A remote `Screen`. Progress is sent at intervals, everything else immediately."""

    def __init__(self, tell: Callable[[list[Event]], object]) -> None:
        self._send = tell
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

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None:
        if done == total or time.monotonic() - self._told > _TELL_SECONDS:
            self._tell("count", task, done, total, unit)

    def line(self, text: str) -> None:
        self._tell("line", text)

    def finish(self) -> None:
        self._tell("finish")

    def _tell(self, name: str | None = None, *arguments: Any) -> None:
        events: list[Event] = []
        if self._steps:
            events.append(("advance", (self._steps,)))
            self._steps = 0
        if name is not None:
            events.append((name, arguments))
        self._told = time.monotonic()
        self._send(events)
