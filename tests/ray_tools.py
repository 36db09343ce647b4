"""Ray for tests: commands and nodes as processes of their own, which are ended whatever happens."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from snscc_ray.config.settings import STAGES
from snscc_ray.core import checkpoints
from tests.conftest import TINY, equal_states

# A checkpoint at every step, as TINY has it, costs Ray a fifth of a second each.
FEW_CHECKPOINTS = (*TINY, "runtime.checkpoint_seconds=1000")
HANG_SECONDS = 300.0


def sets(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def until(
    condition: Callable[[], bool], what: Callable[[], object], seconds: float = HANG_SECONDS
) -> None:
    """Wait for the condition; on a hang, fail with what there is to see."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, what()
        time.sleep(0.01)


class Ray:
    """A place for one Ray of the tests: its folder, its token, and all of its processes."""

    def __init__(self) -> None:
        # Short: Ray's sockets lie in it, and the path of a socket may not be long.
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
        self.environment |= {
            "COLUMNS": "160",
            "CUDA_VISIBLE_DEVICES": "",  # the same everywhere
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._count = 0

    def start(self, *command: object, **more: str) -> Running:
        self._count += 1
        return Running(command, self.environment | more, self.folder / f"said{self._count}")

    def snscc(self, *arguments: object, **more: str) -> Running:
        return self.start(sys.executable, "-m", "snscc_ray", *arguments, **more)

    def processes(self) -> list[psutil.Process]:
        """Everything that was started with this Ray's folder in its environment or command."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                told = process.environ().get("RAY_TMPDIR") == str(self.folder)
                if told or any(str(self.folder) in word for word in process.cmdline()):
                    found.append(process)
        below = [child for process in found for child in _below(process)]
        return list({process.pid: process for process in (*found, *below)}.values())

    def train_workers(self) -> list[psutil.Process]:
        """The processes that train, as Ray names them."""
        return self.actors("RayTrainWorker")

    def actors(self, name: str) -> list[psutil.Process]:
        return [process for process in self.processes() if _title(process) == name]

    def alive(self) -> list[psutil.Process]:
        return _alive(self.processes())

    def end(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        until(lambda: not self.alive(), self.alive, 30)
        shutil.rmtree(self.folder, ignore_errors=True)


def _below(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        words = process.cmdline()
        if words and words[0].startswith("ray::"):
            return words[0][5:].split(".")[0]
    return ""


@contextmanager
def own_ray() -> Iterator[Ray]:
    ray = Ray()
    try:
        yield ray
    finally:
        ray.end()


class Running:
    """A command that runs; what it says goes into files, which no full pipe can hold up."""

    def __init__(self, command: Sequence[object], environment: dict[str, str], said: Path) -> None:
        self._out, self._err = said.with_suffix(".out"), said.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                list(map(str, command)),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def said(self) -> str:
        return f"exit status {self.process.poll()}\n{self.out}\n{self.err}"

    def wait(self, status: int = 0, seconds: float = HANG_SECONDS) -> Running:
        """Until it has ended, by itself and with that status."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        assert self.process.poll() == status, self.said()
        return self

    def reaches(self, folder: Path, stage: str, epoch: int) -> int:
        """Wait until the run has trained an epoch of a stage; returns the last one it has."""

        def there() -> bool:
            assert self.process.poll() is None, self.said()
            return max(epochs(folder, stage), default=-1) >= epoch

        until(there, self.said)
        return max(epochs(folder, stage))

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def refused(running: Running, *says: str) -> None:
    """One line on stderr that holds all of `says`."""
    err = running.err
    assert err.startswith("snscc: ") and err.count("\n") == 1, running.said()
    assert "Traceback" not in err + running.out
    for words in says:
        assert words in err, err


# ------------------------------------------------------------------------ what a run left behind


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the warnings; of a run under way those that are whole."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [line for line in map(json.loads, whole) if "warning" not in line]


def epochs(folder: Path, stage: str) -> list[int]:
    return [line["epoch"] for line in lines(folder) if line["stage"] == stage]


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {stage: checkpoints.load(folder / stage / "final.pt")["network"] for stage in STAGES}


def assert_same_run(folder: Path, other: Path) -> None:
    """The weights bit for bit, the assignments, and all figures but those of time."""
    ours, theirs = weights(folder), weights(other)
    for stage in STAGES:
        assert equal_states(ours[stage], theirs[stage]), stage
    name = "assignments.parquet"
    assert (folder / name).read_bytes() == (other / name).read_bytes()
    figures = [json.loads((place / "metrics.json").read_text()) for place in (folder, other)]
    assert _timeless(figures[0]) == _timeless(figures[1])
    assert [_timeless(line) for line in lines(folder)] == [_timeless(line) for line in lines(other)]


def _timeless(figures: Any) -> Any:
    if not isinstance(figures, dict):
        return figures
    of_time = ("seconds", "seconds_in_all", "images_per_second", "wait_share")
    return {name: _timeless(value) for name, value in figures.items() if name not in of_time}


def starts(folder: Path, stage: str) -> list[int]:
    """The epoch at which each start of a stage began or went on, as TensorBoard's events tell."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted((folder / "tensorboard" / stage).glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):
                found.append((event.wall_time, event.step))
    return [step for _, step in sorted(found)]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


# ----------------------------------------------------------------------------- several machines


class Cluster:
    """Ray as `ray start` starts it: a head without CPUs, and nodes, each a process to be killed."""

    def __init__(self, ray: Ray) -> None:
        self.ray = ray
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.partition(":")[2]
        head = self._ray_start(
            "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=0"
        )
        self._up(head)
        self.head = head

    def add(self, *before: object, cpus: int = 1) -> Running:
        """A node; `before` is what its command is started with (`unshare`, say)."""
        node = self._ray_start(f"--address={self.address}", f"--num-cpus={cpus}", before=before)
        self._up(node)
        return node

    def _ray_start(self, *arguments: object, before: Sequence[object] = ()) -> Running:
        start = "from ray.scripts.scripts import main; main()"
        return self.ray.start(
            *before, sys.executable, "-c", start, "start", "--block",
            "--object-store-memory=100000000", *arguments,
        )  # fmt: skip

    def _up(self, node: Running) -> None:
        def there() -> bool:
            assert node.process.poll() is None, node.said()
            return "Ray runtime started" in node.out

        until(there, node.said, 120)

    @staticmethod
    def node_of(actor: psutil.Process, nodes: Sequence[Running]) -> Running:
        above = {parent.pid for parent in actor.parents()}
        (node,) = [node for node in nodes if node.process.pid in above]
        return node

    @staticmethod
    def lose(node: Running) -> None:
        """As when the power fails: all of the node's processes at once, without a word."""
        first = psutil.Process(node.process.pid)
        for process in (first, *_below(first)):
            with suppress(psutil.Error):
                process.kill()
        node.process.wait(30)
