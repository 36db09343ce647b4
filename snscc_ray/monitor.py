"""What a run shows as it goes (`Display`) and what it keeps of it (`Journal`)."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor

from snscc_ray.checkpoints import write_whole
from snscc_ray.eta import Eta
from snscc_ray.paths import as_text, is_url
from snscc_ray.texts import say

# Seconds between lines where there is no terminal to draw a bar on.
_LINE_SECONDS = 10.0
_SHOWN_VIEWS = 16


class Screen(Protocol):
    """Where a person looks: a `Display`, or what leads to one elsewhere."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def line(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Display:
    """A progress bar on a terminal or in a notebook, and a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
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
            self._progress = Progress(
                TextColumn("[bold]{task.description:8}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._progress.add_task(stage, total=self._total, completed=done, note="", eta="-")
            self._progress.start()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._eta.advance(steps)
        now = time.monotonic()
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, advance=steps, eta=_clock(self._eta.seconds(now)))
        elif now - self._shown > _LINE_SECONDS:
            self._shown = now
            self.console.print(
                f"{self._stage:8} {self._done}/{self._total} {self._unit}  "
                f"ETA {_clock(self._eta.seconds(now))}  {self._note}",
                highlight=False,
            )

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self._note = _summary(figures)
        self._eta.epoch_ended(time.monotonic())
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], note=self._note)

    def counting(self, task: str, unit: str) -> Callable[[int, int], None]:
        """A function that is told (done, total) of a task, now and then."""

        def tell(done: int, total: int) -> None:
            if self._stage != task:
                self.start(task, 1, total, 0, unit)
            self.advance(done - self._done)

        return tell

    def line(self, text: str) -> None:
        say(self.console, text)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _draws(console: Console) -> bool:
    """Whether a bar can be drawn: on a terminal, and in a notebook that has widgets."""
    return console.is_terminal or (
        console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    )


_print_of_thread = threading.excepthook


def _of_thread(args: threading.ExceptHookArgs) -> None:
    """What fails in TensorBoard's thread, on a full disk say, is raised here by the next flush:
    the thread need not print it too."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        _print_of_thread(args)


threading.excepthook = _of_thread


class Journal:
    """metrics.jsonl and TensorBoard's events, in the run folder.

    Both are appended to, which an object store cannot do: there they are kept in a temporary
    folder and put into the run folder whole, epoch by epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # TensorBoard's writer takes no folder either whose name is not UTF-8.
        self._remote = is_url(folder) or as_text(str(folder)) != str(folder)
        self._local = Path(tempfile.mkdtemp(prefix="snscc")) if self._remote else folder
        self._lines = self._local / "metrics.jsonl"
        self._writer: Any = None
        self._published: dict[Path, int] = {}
        if self._remote and (folder / "metrics.jsonl").exists():
            self._lines.write_bytes((folder / "metrics.jsonl").read_bytes())

    def start(self, stage: str, epoch: int) -> None:
        self.stop()
        self._forget(stage, epoch)
        # Imported here: it takes a second, which `--help` and errors should not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._local / "tensorboard" / stage), purge_step=epoch)

    def views(self, views: tuple[Tensor, ...]) -> None:
        from torchvision.utils import make_grid

        for index, view in enumerate(views):
            grid = make_grid(view[:_SHOWN_VIEWS].float().cpu(), nrow=8, normalize=True)
            self._writer.add_image(f"views/{index}", grid, 0)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, epoch)
        self.append({"stage": stage, "epoch": epoch, **figures})

    def hyperparameters(self, settings: dict[str, Any], figures: dict[str, float]) -> None:
        """Let TensorBoard's HPARAMS page compare runs."""
        write_hyperparameters(self._local / "tensorboard", settings, figures)
        self._publish()

    def append(self, line: dict[str, Any]) -> None:
        with self._lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._publish()

    def stop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._publish()

    def finish(self) -> None:
        self.stop()
        if self._remote:
            shutil.rmtree(self._local, ignore_errors=True)

    def _publish(self) -> None:
        if not self._remote:
            return
        if self._writer is not None:
            self._writer.flush()
        for path in self._local.rglob("*"):
            if not path.is_file() or self._published.get(path) == path.stat().st_mtime_ns:
                continue
            self._published[path] = path.stat().st_mtime_ns
            content = path.read_bytes()
            place = self.folder / path.relative_to(self._local).as_posix()
            write_whole(place, partial(_write, content))

    def _forget(self, stage: str, epoch: int) -> None:
        """Drop the lines of epochs that will be trained again."""
        if not self._lines.exists():
            return
        kept = []
        for text in self._lines.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut short by a kill
            if line["stage"] != stage or line["epoch"] < epoch:
                kept.append(text + "\n")
        write_whole(self._lines, lambda file: file.write("".join(kept).encode()))


class RunMonitor:
    """What the engine tells, shown and kept; the ranks but the first use `Silent`."""

    def __init__(self, journal: Journal, screen: Screen) -> None:
        self.journal, self.screen = journal, screen

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self.journal.start(stage, done // steps if steps else 0)
        self.screen.start(stage, epochs, steps, done)

    def advance(self) -> None:
        self.screen.advance()

    def views(self, stage: str, views: tuple[Tensor, ...]) -> None:
        self.journal.views(views)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self.journal.epoch(stage, epoch, figures)
        self.screen.epoch(stage, epoch, figures)

    def warn(self, stage: str, epoch: int, message: str) -> None:
        self.journal.append({"stage": stage, "epoch": epoch, "warning": message})
        self.screen.line(f"warning {stage} epoch {epoch}: {message}")

    def line(self, text: str) -> None:
        self.screen.line(text)

    def finish(self) -> None:
        self.journal.finish()
        self.screen.finish()


class Silent:
    """The monitor of every rank but the first."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self) -> None: ...

    def views(self, stage: str, views: tuple[Tensor, ...]) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def warn(self, stage: str, epoch: int, message: str) -> None: ...

    def line(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Nowhere:
    """A `Screen` nobody looks at."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def line(self, text: str) -> None: ...

    def finish(self) -> None: ...


def write_hyperparameters(
    folder: Path, settings: dict[str, Any], figures: dict[str, float]
) -> None:
    """One line of TensorBoard's HPARAMS page, into a folder of events on this machine."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        finals = {f"final/{name}": value for name, value in figures.items()}
        writer.add_hparams(_flat(settings), finals, run_name=".")


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


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


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            flat[prefix + name] = as_text(value)
        elif isinstance(value, bool | int | float | torch.Tensor):
            flat[prefix + name] = value
        else:
            flat[prefix + name] = json.dumps(value)
    return flat
