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

# Seconds until a task gets a bar: many end sooner.
_BAR_SECONDS = 0.5
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
        self._stage: _Track | None = None
        self._task: _Track | None = None
        self._end: float | None = None

    def expect(self, end: float | None) -> None:
        """Show from now on when the whole is expected to end, on `time.monotonic`'s clock."""
        self._end = end

    def start(self, stage: str, epochs: int, steps: int, done: int, unit: str = "steps") -> None:
        self.finish()
        self._stage = _Track(stage, epochs * steps, done, unit)
        if _draws(self.console):
            self._draw(self._stage)

    def advance(self, steps: int = 1) -> None:
        self._end_task()
        if self._stage is not None:
            self._advance(self._stage, steps)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        if self._stage is None:
            return
        self._stage.note = _summary(figures)
        self._stage.eta.epoch_ended(time.monotonic())
        if self._stage.bar is not None:
            self._shared.bars.update(self._stage.bar, note=self._stage.note)

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None:
        """Show the progress of a task that has no epochs; `done` grows up to `total`.

        Within a stage, such as a clean pass, it is shown until its end or the next step.
        """
        held = self._task
        if held is None or (held.name, held.total) != (task, total) or done < held.done:
            self._end_task()
            held = self._task = _Track(task, total, 0, unit)
        self._advance(held, done - held.done)
        if done == total:
            self._end_task()

    def _advance(self, track: _Track, steps: int) -> None:
        now = time.monotonic()
        track.done += steps
        track.eta.advance(steps, now)
        if track.bar is None and _draws(self.console) and now - track.began > _BAR_SECONDS:
            self._draw(track)
        elif track.bar is not None:
            self._shared.bars.update(track.bar, completed=track.done, eta=self._left(track, now))
        elif now - min(track.shown, self._shared.printed) > _LINE_SECONDS:
            track.shown = self._shared.printed = now
            self.console.print(
                f"{self._title(track):8} {track.done}/{track.total} {track.unit}  "
                f"ETA {self._left(track, now)}  {track.note}",
                highlight=False,
            )

    def _left(self, track: _Track, now: float) -> str:
        own = track.eta.seconds(now)
        if self._end is None:
            return _clock(own)
        return f"{_clock(own)}, of all {_clock(max(self._end - now, own or 0.0))}"

    def _draw(self, track: _Track) -> None:
        track.bar = self._shared.add(self._title(track), track.total, track.done, track.unit)

    def _end_task(self) -> None:
        self._undraw(self._task)
        self._task = None

    def _undraw(self, track: _Track | None) -> None:
        if track is not None and track.bar is not None:
            self._shared.remove(track.bar)

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
        self._end_task()
        self._undraw(self._stage)
        self._stage = None

    def _title(self, track: _Track) -> str:
        return " ".join(dict.fromkeys(filter(None, (self._name, track.name))))


class _Track:
    """The progress of a stage, or of a task."""

    def __init__(self, name: str, total: int, done: int, unit: str) -> None:
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self.note = ""
        self.began = self.shown = time.monotonic()
        self.eta = Eta(total, done)
        self.bar: TaskID | None = None


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
