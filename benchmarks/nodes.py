"""Simulated clusters of many nodes, and what slow and lost nodes cost.

    python -m benchmarks.nodes [--nodes 2,4,8,16] [--out benchmarks/results/nodes.json]

All nodes are processes of this machine (`ray.cluster_utils.Cluster`): a head without CPUs, and N
nodes with one CPU and one training worker each. The work is tiny: 960 pictures of 32 pixels, a
ConvNet of four channels, and a checkpoint after every epoch. So what is seen is what grows with N:

- `joined`, `first step`: seconds of the command until all workers are placed and checked, and until
  the first stage starts to train; `cpu until then`: CPU seconds of all processes in that time.
- `epoch`: mean seconds of an epoch, with its checkpoint.
- `reports`, `events`: per epoch, what all workers report to Ray Train's controller, and what is
  sent to the display. `report`: seconds per epoch that a worker is held up by its report.
- `controller`: CPU seconds per epoch of Ray Train's controller and of the display's actor; `gcs`
  and `raylet`: of Ray's control store and of one node's daemon.
- `files`, `KB`: of one checkpoint, of the finished run, and of the run folder at its largest.
- `store`: peak bytes in the object store of one node, divided by the bytes of the images.
- `GB`: peak memory of all processes together, without what they share.

Then, on four nodes, two runs are compared with one that nothing happens to: one in which a worker
is stopped for three quarters of the time, and one in which a node that trains is lost every
INTERVAL seconds and another one joins. `same` tells whether weights and assignments
are equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from rich.console import Console

from benchmarks.kinds import make
from benchmarks.report import describe_machine, print_table, revision
from snscc_ray.cluster.run import workers_of
from snscc_ray.cluster.scale import Scale
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core import checkpoints
from snscc_ray.core.display import Display
from snscc_ray.runs.plan import make_plan
from snscc_ray.runs.run import Result, execute
from snscc_ray.training.workers import Worker

ROOT = Path(__file__).resolve().parents[1]
KINDS, EACH, SIDE, BATCH = 15, 64, 32, 240
STEPS = KINDS * EACH // BATCH
STORE_BYTES = 80 << 20  # about the least that Ray accepts
SHORT, LONG = (10, 4, 2), (60, 5, 2)  # epochs of the three stages
FAULT_NODES = 4
INTERVAL = 60.0  # seconds from one loss of a node to the next
SAMPLE_SECONDS = 0.5
LEAST_BYTES = 2e9  # of free memory on this machine; with less, Ray ends workers
_TRIES = 5
KINDS_OF_PROCESS = ("controller", "relay", "gcs", "raylets", "workers", "driver", "other")
SETTINGS = (
    f"data.image_size={SIDE}", f"data.num_clusters={KINDS}", "encoder.name=convnet",
    "encoder.width=4", "pretrain.projection_hidden=16", "pretrain.projection_dim=8",
    "pretrain.mined_neighbors=10", "pretrain.warmup_epochs=0", "train.num_neighbors=5",
    "boost.num_neighbors=5", "train.view.cutout=8", "boost.view.cutout=8",
    *(f"{stage}.batch_size={BATCH}" for stage in STAGES),
    f"runtime.checkpoint_steps={STEPS}", "runtime.device=cpu",
)  # fmt: skip


# ----------------------------------------------------------------------------- the command


class Timeline(Display):
    """A display that notes when what it is told arrives."""

    def __init__(self) -> None:
        super().__init__(Console())
        self.started: float | None = None
        self.epochs: list[tuple[str, int, float]] = []
        self.lines: list[str] = []
        self.events = 0

    def start(self, stage: str, epochs: int, steps: int, done: int, unit: str = "steps") -> None:
        if stage in STAGES and self.started is None:
            self.started = time.time()
        super().start(stage, epochs, steps, done, unit)

    def advance(self, steps: int = 1) -> None:
        self.events += self.started is not None
        super().advance(steps)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self.events += 1
        self.epochs.append((stage, epoch, time.time()))
        super().epoch(stage, epoch, figures)

    def line(self, text: str) -> None:
        self.lines.append(text)
        super().line(text)


@dataclass
class Reporting:
    """A worker that measures its reports."""

    worker: Worker
    count: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.rank, self.world_size = self.worker.rank, self.worker.world_size
        self.device = self.worker.device

    def report(
        self, stage: str, metrics: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        began = time.monotonic()
        self.worker.report(stage, metrics, checkpoint)
        self.count, self.seconds = self.count + 1, self.seconds + time.monotonic() - began

    def latest_checkpoint(self, stage: str) -> dict[str, Any] | None:
        return self.worker.latest_checkpoint(stage)


def observed(
    notes: str,
    recipe: Recipe,
    catalog: Any,
    data: Any,
    folder: Path,
    worker: Worker,
    *arguments: Any,
    **more: Any,
) -> Result:
    """Run the stages as `execute` does, and write down what this worker reported."""
    reporting = Reporting(worker)
    result = execute(recipe, catalog, data, folder, reporting, *arguments, **more)
    told = {"reports": reporting.count, "report_seconds": reporting.seconds}
    Path(notes, f"rank{worker.rank}.json").write_text(json.dumps(told))
    return result


def drive(address: str, nodes: int, photos: str, folder: str, notes: str, *epochs: int) -> None:
    """Run the recipe on the cluster, as `snscc run` does, and write the timeline into `notes`."""
    began = time.time()
    settings = [f"{stage}.epochs={count}" for stage, count in zip(STAGES, epochs, strict=True)]
    recipe = override(recipes.get("images"), [*SETTINGS, f"data.path={photos}", *settings])
    scale, timeline = Scale((nodes, nodes), cpus=1.0, address=address), Timeline()
    plan = make_plan(recipe, scale.counts)
    with workers_of(scale, timeline) as workers:
        joined = time.time()
        workers.load(plan, Path(folder))
        loaded = time.time()
        workers.run(plan.recipe, Path(folder), work=partial(observed, notes))
        ended = time.time()
    told = {
        "began": began, "joined": joined, "loaded": loaded, "started": timeline.started,
        "ended": ended, "epochs": timeline.epochs, "events": timeline.events,
        "lost": sum("workers were lost" in line for line in timeline.lines),
    }  # fmt: skip
    Path(notes, "timeline.json").write_text(json.dumps(told))


# -------------------------------------------------------------------------------- the cluster


@contextmanager
def cluster_of(nodes: int) -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False,
        },
    )  # fmt: skip
    try:
        for _ in range(nodes):
            join(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def join(cluster: Cluster) -> None:
    """Add a node. On a busy machine it may not be up in the half minute that Ray gives it."""
    for _ in range(_TRIES):
        with suppress(Exception):
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            return
    raise RuntimeError(f"no node came up in {_TRIES} tries")


def train_workers(below: psutil.Process) -> list[psutil.Process]:
    return [child for child in below.children(recursive=True) if kind_of(child) == "workers"]


def kind_of(process: psutil.Process) -> str:
    with suppress(psutil.Error, IndexError):
        word = process.cmdline()[0]
        titles = {
            "ray::TrainController": "controller",
            "ray::Relay": "relay",
            "ray::RayTrainWorker": "workers",
        }
        for title, kind in titles.items():
            if word.startswith(title):
                return kind
        return {"gcs_server": "gcs", "raylet": "raylets"}.get(Path(word).name, "other")
    return "other"


@dataclass
class Samples:
    """What is seen of the processes and the files while a command runs."""

    cluster: Cluster
    driver: int
    folder: Path
    cpu: dict[int, tuple[str, float]] = field(default_factory=dict)  # by process
    cpu_at: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # time, by kind
    memory: int = 0
    store_node: int = 0
    store_all: int = 0
    checkpoint: tuple[int, int] = (0, 0)  # files, bytes
    largest: tuple[int, int] = (0, 0)

    def take(self) -> None:
        memory = 0
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                # An actor's process has no name yet before it is one, and none when it ends.
                kind = self.cpu.get(child.pid, ("other", 0.0))[0]
                if kind == "other":
                    kind = "driver" if child.pid == self.driver else kind_of(child)
                times, held = child.cpu_times(), child.memory_info()
                self.cpu[child.pid] = kind, times.user + times.system
                memory += max(0, held.rss - held.shared)
        used = dict.fromkeys(KINDS_OF_PROCESS, 0.0)
        for kind, seconds in self.cpu.values():
            used[kind] += seconds
        self.cpu_at.append((time.time(), used))
        self.memory = max(self.memory, memory)
        self.largest = max(self.largest, size_of(self.folder), key=lambda found: found[1])
        for place in (self.folder / "ray").glob("*checkpoint_*"):
            self.checkpoint = max(self.checkpoint, size_of(place))

    def take_stores(self) -> None:
        """Ask every node how full its object store is; some may just be leaving."""
        used = []
        for node in self.cluster.global_state.node_table():
            if node["Alive"]:
                with suppress(Exception):
                    address, port = node["NodeManagerAddress"], node["NodeManagerPort"]
                    stats = node_stats(address, port, include_memory_info=False).store_stats
                    used.append(stats.object_store_bytes_used)
        self.store_node = max([self.store_node, *used])
        self.store_all = max(self.store_all, sum(used))

    def seconds(self, begin: float, end: float) -> dict[str, float]:
        """Return the CPU seconds of each kind of process from one time to another."""
        there = [used for when, used in self.cpu_at if begin <= when <= end]
        return {kind: there[-1][kind] - there[0][kind] for kind in KINDS_OF_PROCESS}


def size_of(folder: Path) -> tuple[int, int]:
    """Return the number of files below a folder and their bytes; files may vanish meanwhile."""
    sizes = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def epochs_of(folder: Path) -> int:
    """Return how many lines the run has written into its metrics."""
    with suppress(OSError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


# ---------------------------------------------------------------------------------- the faults


# Called at every sample, with the samples; returns when something was done to a node, if it was.
Fault = Callable[[Samples], float | None]


def nothing(samples: Samples) -> None:
    """An undisturbed run."""


def straggler(share: float) -> Fault:
    """Stop one worker for this share of the time, a quarter of a second at once."""
    stopped, running = 0.25, 0.25 * (1 - share) / share

    def slow(worker: psutil.Process) -> None:
        with suppress(psutil.Error):
            while True:
                worker.send_signal(signal.SIGSTOP)
                time.sleep(stopped)
                worker.send_signal(signal.SIGCONT)
                time.sleep(running)

    chosen: list[psutil.Process] = []

    def act(samples: Samples) -> None:
        if not chosen and epochs_of(samples.folder):
            chosen.append(train_workers(psutil.Process())[0])
            threading.Thread(target=slow, args=(chosen[0],), daemon=True).start()

    return act


def leaving(every: float) -> Fault:
    """Lose, every so many seconds, a node that trains; another one joins at once."""
    last, seen = time.time(), 0

    def act(samples: Samples) -> float | None:
        nonlocal last, seen
        there = epochs_of(samples.folder)
        if not there or (seen == 0 and there < 3):
            last = time.time()
            return None
        if time.time() - last < every or there == seen or not train_workers(psutil.Process()):
            return None
        above = {parent.pid for parent in train_workers(psutil.Process())[0].parents()}
        for node in list(samples.cluster.worker_nodes):
            pids = {info.process.pid for infos in node.all_processes.values() for info in infos}
            if pids & above:
                last, seen = time.time(), there
                samples.cluster.remove_node(node, allow_graceful=False)
                join(samples.cluster)
                return last
        return None

    return act


FAULTS: dict[str, tuple[str, Callable[[], Fault]]] = {
    "slow": ("a worker stopped for 3/4 of the time", partial(straggler, 0.75)),
    "lost": (f"a node lost every {INTERVAL:g} s", partial(leaving, INTERVAL)),
}


# ------------------------------------------------------------------------------ one measurement


@dataclass(frozen=True)
class Measured:
    folder: Path
    samples: Samples
    times: dict[str, Any]
    ranks: list[dict[str, Any]]
    losses: list[float]
    run: tuple[int, int]  # files and bytes of the finished run

    @property
    def epochs(self) -> int:
        return len({(stage, epoch) for stage, epoch, _ in self.times["epochs"]})

    @property
    def epoch_seconds(self) -> float:
        """Return the mean over Pretrain's epochs but the first, which warms up."""
        ends = [when for stage, _, when in self.times["epochs"] if stage == "pretrain"]
        return float(ends[-1] - ends[0]) / (len(ends) - 1)


def measure(
    nodes: int, epochs: Sequence[int], photos: Path, place: Path, fault: Fault = nothing
) -> Measured:
    """Run the command on a new cluster. Raises RuntimeError with what it said if it fails."""
    place.mkdir()
    folder, said = place / "run", place / "said"
    with cluster_of(nodes) as cluster, said.open("w") as out:
        words = [cluster.address, nodes, str(photos), str(folder), str(place), *epochs]
        code = f"from benchmarks.nodes import drive; drive(*{words!r})"
        driver = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=out, cwd=ROOT)
        samples, losses = Samples(cluster, driver.pid, folder), []
        try:
            while driver.poll() is None:
                if psutil.virtual_memory().available < LEAST_BYTES:
                    raise RuntimeError(f"{nodes} nodes: less than {LEAST_BYTES / 1e9} GB are free")
                samples.take()
                samples.take_stores()
                lost = fault(samples)
                if lost is not None:
                    losses.append(lost)
                time.sleep(SAMPLE_SECONDS)
        finally:
            driver.kill()
    if driver.returncode:
        raise RuntimeError(said.read_text()[-3000:])
    return Measured(
        folder,
        samples,
        json.loads((place / "timeline.json").read_text()),
        [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(nodes)],
        losses,
        size_of(folder),
    )


def growth(nodes: int, found: Measured) -> dict[str, Any]:
    """Return what grows with the number of nodes."""
    times, samples = found.times, found.samples
    start = samples.seconds(times["began"], times["started"])
    # Of Pretrain's epochs, the first apart: what the controller takes to start does not count.
    ends = [when for stage, _, when in times["epochs"] if stage == "pretrain"]
    epochs, cpu = len(ends) - 1, samples.seconds(ends[0], ends[-1])
    image_bytes = KINDS * EACH * 3 * SIDE**2
    return {
        "nodes": nodes,
        "joined_s": round(times["joined"] - times["began"], 1),
        "read_s": round(times["loaded"] - times["joined"], 1),
        "first_step_s": round(times["started"] - times["began"], 1),
        "cpu_until_first_step_s": round(sum(start.values()), 1),
        "epoch_s": round(found.epoch_seconds, 3),
        "reports_per_epoch": sum(rank["reports"] for rank in found.ranks) / found.epochs,
        "events_per_epoch": round(times["events"] / found.epochs, 1),
        "report_s_per_epoch": round(
            sum(rank["report_seconds"] for rank in found.ranks) / nodes / found.epochs, 3
        ),
        # Of a core, as most of it goes with time and not with epochs.
        **{f"{kind}_core": round(cpu[kind] / (ends[-1] - ends[0]), 3) for kind in cpu},
        "workers_cpu_s_per_epoch": round(cpu["workers"] / epochs, 2),
        "seconds": round(times["ended"] - times["began"], 1),
        "checkpoint_files": samples.checkpoint[0],
        "checkpoint_kb": round(samples.checkpoint[1] / 1000, 1),
        "run_files": found.run[0],
        "run_kb": round(found.run[1] / 1000, 1),
        "largest_run_files": samples.largest[0],
        "largest_run_kb": round(samples.largest[1] / 1000, 1),
        "image_bytes": image_bytes,
        "store_peak_of_a_node": samples.store_node,
        "store_peak_of_all": samples.store_all,
        "store_of_images": round(samples.store_node / image_bytes, 2),
        "memory_gb": round(samples.memory / 1e9, 2),
    }


def same(one: Path, other: Path) -> bool:
    """Whether the weights of all stages and the assignments of two runs are equal bit for bit."""
    for stage in STAGES:
        ours, theirs = (
            checkpoints.load(run / stage / "final.pt")["network"] for run in (one, other)
        )
        if ours.keys() != theirs.keys():
            return False
        if not all(torch.equal(ours[name], theirs[name]) for name in ours):
            return False
    name = "assignments.parquet"
    return (one / name).read_bytes() == (other / name).read_bytes()


def damage(what: str, found: Measured, whole: Measured) -> dict[str, Any]:
    """Compare a disturbed run with the undisturbed one."""
    ends = found.times["epochs"]
    back = []
    for lost in found.losses:
        before = {(stage, epoch) for stage, epoch, when in ends if when < lost}
        new = [when for stage, epoch, when in ends if (stage, epoch) not in before]
        back.append(round(min(new) - lost, 1) if new else None)
    return {
        "fault": what,
        "nodes": FAULT_NODES,
        "epochs": found.epochs,
        "seconds": round(found.times["ended"] - found.times["started"], 1),
        "epoch_s": round(found.epoch_seconds, 3),
        "epoch_of_undisturbed": round(found.epoch_seconds / whole.epoch_seconds, 2),
        "nodes_lost": len(found.losses),
        "workers_started_again": found.times["lost"],
        "s_until_a_new_epoch": back,
        "epochs_repeated": len(ends) - found.epochs,
        "same": same(found.folder, whole.folder),
    }


def _again_with_own_ray() -> int:
    """Run this command in a process whose Ray has a folder and a token of its own.

    Ray reads its environment when it is imported. Its sockets lie in its folder: their paths may
    not be long.
    """
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        own = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, "-m", "benchmarks.nodes", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | own).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", default="2,4,8,16", help="numbers of nodes, with commas")
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of these; '' for none")
    parser.add_argument("--out", type=Path, help="save the figures as JSON, beside those in it")
    given = parser.parse_args()
    if os.environ.get("RAY_TMPDIR") is None:
        sys.exit(_again_with_own_ray())
    with tempfile.TemporaryDirectory(prefix="nodes") as name:
        place = Path(name)
        photos = make(place / "photos", KINDS, EACH, seed=0)
        for nodes in map(int, filter(None, given.nodes.split(","))):
            found = measure(nodes, SHORT, photos, place / f"nodes{nodes}")
            keep(given.out, "growth", "nodes", growth(nodes, found))
        faults = list(filter(None, given.faults.split(",")))
        if faults:
            run = partial(measure, FAULT_NODES, LONG, photos)
            whole = run(place / "whole")
            keep(given.out, "faults", "fault", damage("none", whole, whole))
            for name in faults:
                what, make_fault = FAULTS[name]
                found = run(place / name, make_fault())
                keep(given.out, "faults", "fault", damage(what, found, whole))


def keep(out: Path | None, part: str, key: str, row: dict[str, Any]) -> None:
    """Print a row, and put it into the file in the place of an earlier one of the same name."""
    row |= {"load_average": round(os.getloadavg()[0], 1), "revision": revision()}
    print_table([{"figure": name, "value": value} for name, value in row.items()])
    if out is not None:
        held = json.loads(out.read_text()) if out.exists() else {}
        rows = [other for other in held.get(part, []) if other[key] != row[key]]
        held[part] = sorted([*rows, row], key=lambda other: str(other[key]).zfill(3))
        parts = {name: held[name] for name in ("growth", "faults") if name in held}
        out.write_text(json.dumps(describe_machine(1) | parts, indent=2) + "\n")


if __name__ == "__main__":
    main()
