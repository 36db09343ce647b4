"""Show the progress of a run (`Display`) and record it (`Journal`)."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from snscc_ray.config.paths import as_text, is_url
from snscc_ray.core.display import Screen
from snscc_ray.core.storage import write_whole

_SHOWN_VIEWS = 16


_print_of_thread = threading.excepthook


def _of_thread(args: threading.ExceptHookArgs) -> None:
    """Keep TensorBoard's thread from printing its errors (such as a full disk).

    The next flush raises them in this thread.
    """
    if type(args.thread).__name__ != "_AsyncWriterThread":
        _print_of_thread(args)


threading.excepthook = _of_thread


class Journal:
    """Write metrics.jsonl and TensorBoard's events to the run folder.

    An object store cannot append. For a run folder there, both files are kept in a temporary folder
    and uploaded whole after each epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # TensorBoard's writer also refuses folder names that are not UTF-8.
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
        # Imported here: it takes a second, and `--help` and errors should be fast.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._local / "tensorboard" / stage), purge_step=epoch)

    def views(self, views: tuple[Tensor, ...]) -> None:
        if views[0].ndim != 4:
            return  # cached features are no pictures
        from torchvision.utils import make_grid

        for index, view in enumerate(views):
            grid = make_grid(view[:_SHOWN_VIEWS].float().cpu(), nrow=8, normalize=True)
            self._writer.add_image(f"views/{index}", grid, 0)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, epoch)
        self.append({"stage": stage, "epoch": epoch, **figures})

    def hyperparameters(self, settings: dict[str, Any], figures: dict[str, float]) -> None:
        """Record settings and results for TensorBoard's HPARAMS page, which compares runs."""
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
                continue  # incomplete because of a kill
            if line["stage"] != stage or line["epoch"] < epoch:
                kept.append(text + "\n")
        write_whole(self._lines, lambda file: file.write("".join(kept).encode()))


class RunMonitor:
    """Show and record what the engine reports. Ranks other than the first use `NullMonitor`."""

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

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None:
        self.screen.count(task, done, total, unit)

    def warn(self, stage: str, epoch: int, message: str) -> None:
        self.journal.append({"stage": stage, "epoch": epoch, "warning": message})
        self.screen.line(f"warning {stage} epoch {epoch}: {message}")

    def line(self, text: str) -> None:
        self.screen.line(text)

    def finish(self) -> None:
        self.journal.finish()
        self.screen.finish()


class NullMonitor:
    """The monitor of every rank but the first. It does nothing."""

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None: ...

    def advance(self) -> None: ...

    def views(self, stage: str, views: tuple[Tensor, ...]) -> None: ...

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None: ...

    def count(self, task: str, done: int, total: int, unit: str = "rows") -> None: ...

    def warn(self, stage: str, epoch: int, message: str) -> None: ...

    def line(self, text: str) -> None: ...

    def finish(self) -> None: ...


def write_hyperparameters(
    folder: Path, settings: dict[str, Any], figures: dict[str, float]
) -> None:
    """Write one line of TensorBoard's HPARAMS page into a local folder of events."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        finals = {f"final/{name}": value for name, value in figures.items()}
        writer.add_hparams(_flat(settings), finals, run_name=".")


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


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
