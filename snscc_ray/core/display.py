"""Progress output of a command: a bar with an ETA, and lines."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from snscc_ray.core.eta import Eta
from snscc_ray.texts import say

# Seconds between progress lines where no bar can be drawn.
_LINE_SECONDS = 4.0
# And until a line says that nothing else is to be said: later than a late line of progress.
_IDLE_SECONDS = 4.7


class Screen(Protocol):
    """Interface for progress output: a `Display`, or a proxy for one in another process."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None: ...

    def line(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Display:
    """Shows a progress bar on a terminal or in a notebook, and occasional lines elsewhere."""

    def __init__(self, console: Console, name: str = "", beside: Display | None = None) -> None:
        """name: begins each line. beside: a display of the same console."""
        self.console, self._name = console, name
        self._shared: _Shared = _Shared(console) if beside is None else beside._shared
        self._bar: TaskID | None = None
        self._stage = self._note = self._unit = ""
        self._done = self._total = 0
        self._shown = 0.0
        self._eta = Eta(0, 0, 0.0)

    def start(self, stage: str, epochs: int, steps: int, done: int, unit: str = "steps") -> None:
        self.finish()
        self._stage, self._total, self._unit = stage, epochs * steps, unit
        self._done = done
        self._shown = time.monotonic()
        self._eta = Eta(self._total, done, self._shown)
        self._note = ""
        if _draws(self.console):
            self._bar = self._shared.add(self._title, self._total, done, unit)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._eta.advance(steps)
        now = time.monotonic()
        if self._bar is not None:
            eta = _clock(self._eta.seconds(now))
            self._shared.bars.update(self._bar, advance=steps, eta=eta)
        elif now - self._shown > _LINE_SECONDS:
            self._shown = self._shared.printed = now
            self.console.print(
                f"{self._title:8} {self._done}/{self._total} {self._unit}  "
                f"ETA {_clock(self._eta.seconds(now))}  {self._note}",
                highlight=False,
            )

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self._note = _summary(figures)
        self._eta.epoch_ended(time.monotonic())
        if self._bar is not None:
            self._shared.bars.update(self._bar, note=self._note)

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None:
        """Show the progress of a task that has no epochs; `done` grows up to `total`."""
        if (self._stage, self._total) != (task, total) or done < self._done:
            self.start(task, 1, total, 0, unit)
        self.advance(done - self._done)

    def counting(self, task: str, unit: str) -> Callable[[int, int], None]:
        """Return a function that shows a task's progress; call it with (done, total)."""
        return lambda done, total: self.count(task, done, total, unit)

    def finding(self, task: str, unit: str) -> Callable[[int], None]:
        """Return a function that shows how many are found so far; their total is not known."""
        shown = time.monotonic()

        def tell(found: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > _LINE_SECONDS:
                shown = time.monotonic()
                self.line(f"{task}: {found:,} {unit} so far")

        return tell

    def line(self, text: str) -> None:
        self._shared.printed = time.monotonic()
        say(self.console, f"{self._name}: {text}" if self._name else text)

    def idle(self, text: str) -> None:
        """Print a line, unless a bar is drawn or something was printed a moment ago."""
        if not self._shared.drawn and time.monotonic() - self._shared.printed > _IDLE_SECONDS:
            self.line(text)

    def finish(self) -> None:
        if self._bar is not None:
            self._shared.remove(self._bar)
            self._bar = None

    @property
    def _title(self) -> str:
        return " ".join(dict.fromkeys(filter(None, (self._name, self._stage))))


class _Shared:
    """What the displays of one console share: the place of their bars, and when a line came."""

    def __init__(self, console: Console) -> None:
        self.printed = time.monotonic()
        self.drawn = 0
        self._console = console

    def add(self, title: str, total: int, done: int, unit: str) -> TaskID:
        if not self.drawn:
            self.bars = Progress(
                TextColumn("[bold]{task.description:8}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self.bars.start()
        self.drawn += 1
        return self.bars.add_task(title, total=total, completed=done, unit=unit, note="", eta="-")

    def remove(self, bar: TaskID) -> None:
        """Remove a bar; the last one stays on the terminal, as it is."""
        self.drawn -= 1
        if self.drawn:
            self.bars.remove_task(bar)
            self.bars.refresh()
        else:
            self.bars.stop()


def _draws(console: Console) -> bool:
    """Whether a bar can be drawn: on a terminal, or in a notebook with ipywidgets."""
    return console.is_terminal or (
        console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    )


class NullScreen:
    """A `Screen` that shows nothing."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None: ...

    def line(self, text: str) -> None: ...

    def finish(self) -> None: ...


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )


def _summary(figures: dict[str, float]) -> str:
    shown = {
        "loss": figures.get("loss/total"),
        "score": figures.get("health/score"),
        "ACC": figures.get("oracle/acc"),
    }
    return "  ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
