"""What a run shows and keeps as it goes: a progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from snscc_ray.checkpoints import write_whole

# Seconds between lines where there is no terminal to draw a bar on.
_LINE_SECONDS = 10.0
_SHOWN_VIEWS = 16


class RunMonitor:
    """Writes to the run folder from rank 0; the other ranks use `Silent`."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self._lines = folder / "metrics.jsonl"
        self._writer: Any = None
        self._progress: Progress | None = None
        self._stage = ""
        self._note = ""
        self._done = self._total = self._first = 0
        self._began = self._shown = 0.0

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self.finish()
        self._stage, self._total = stage, epochs * steps
        self._first = self._done = done
        self._began = self._shown = time.monotonic()
        self._note = ""
        epoch = done // steps if steps else 0
        self._forget(stage, epoch)
        # Imported here: it takes a second, which `--help` and errors should not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / "tensorboard" / stage), purge_step=epoch)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description:8}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._progress.add_task(stage, total=self._total, completed=done, note="")
            self._progress.start()

    def advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])
        elif time.monotonic() - self._shown > _LINE_SECONDS:
            self._shown = time.monotonic()
            rate = (self._done - self._first) / (self._shown - self._began)
            eta = (self._total - self._done) / rate
            self.console.print(
                f"{self._stage:8} {self._done}/{self._total} steps  "
                f"ETA {int(eta) // 60}:{int(eta) % 60:02d}  {self._note}",
                highlight=False,
            )

    def views(self, stage: str, views: tuple[Tensor, ...]) -> None:
        from torchvision.utils import make_grid

        for index, view in enumerate(views):
            grid = make_grid(view[:_SHOWN_VIEWS].float().cpu(), nrow=8, normalize=True)
            self._writer.add_image(f"views/{index}", grid, 0)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self._append({"stage": stage, "epoch": epoch, **figures})
        for name, value in figures.items():
            self._writer.add_scalar(name, value, epoch)
        self._note = _summary(figures)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], note=self._note)

    def warn(self, stage: str, epoch: int, message: str) -> None:
        self._append({"stage": stage, "epoch": epoch, "warning": message})
        self.console.print(f"[yellow]warning[/] {stage} epoch {epoch}: {message}", highlight=False)

    def hyperparameters(self, settings: dict[str, Any], figures: dict[str, float]) -> None:
        """Let TensorBoard's HPARAMS page compare runs."""
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / "tensorboard")) as writer:
            writer.add_hparams(
                _flat(settings), {f"final/{k}": v for k, v in figures.items()}, run_name="."
            )

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _append(self, line: dict[str, Any]) -> None:
        with self._lines.open("a") as file:
            file.write(json.dumps(line) + "\n")

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


class Silent:
    """The monitor of every rank but the first."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self) -> None: ...

    def views(self, stage: str, views: tuple[Tensor, ...]) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def warn(self, stage: str, epoch: int, message: str) -> None: ...

    def finish(self) -> None: ...


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
        elif isinstance(value, bool | int | float | str | torch.Tensor):
            flat[prefix + name] = value
        else:
            flat[prefix + name] = json.dumps(value)
    return flat
