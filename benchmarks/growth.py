"""How time and memory of every phase grow with the number of images, on this machine.

    python -m benchmarks.growth --work FOLDER --out benchmarks/results/growth.json

Each phase runs in a process of its own, on 10,000 to 160,000 tiny images (8 × 8 pixels, 50 kinds),
or on features of 128 numbers that lie near a curved surface of 16 dimensions. Counted are CPU
seconds, of all threads and processes together, after the imports: they do not depend on what else
the machine does. `peak_mb` is the peak memory of the process above that after the imports. To the
seconds and to the memory of a phase, a + b N^p is fitted: p is the exponent. Writes a figure
beside the JSON file, and prints a table. Phases that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from scipy.optimize import curve_fit

from benchmarks.report import describe_machine, print_table, revision, save
from snscc_ray.answers.predict import PredictRequest, predict
from snscc_ray.answers.report import report
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, DataSettings, Recipe
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.mining import mine
from snscc_ray.core.display import Display, NullScreen
from snscc_ray.core.memory import share_one_pool
from snscc_ray.data import pack
from snscc_ray.data.imageset import assemble
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.loading.survey import survey
from snscc_ray.data.pack.plan import Options
from snscc_ray.data.sources import list_rows
from snscc_ray.fit.count import estimate
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.run import execute
from snscc_ray.training.workers import LocalWorker

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
SIZES = (10_000, 20_000, 40_000, 80_000, 160_000)
SIDE, KINDS, WIDTH, SURFACE, PER_FOLDER = 8, 50, 128, 16, 1000
SETTINGS = (
    "encoder.width=8", "pretrain.epochs=1", "train.epochs=1", "boost.epochs=1",
    "pretrain.batch_size=512", "train.batch_size=512", "boost.batch_size=512",
    "pretrain.warmup_epochs=0.5",
)  # fmt: skip
QUIET = Console(quiet=True)
Seconds = dict[str, float]


def data_of(place: Path) -> DataSettings:
    return recipe_of(place).data


def recipe_of(place: Path) -> Recipe:
    common = [f"data.path={json.dumps(str(place))}", f"data.num_clusters={KINDS}"]
    return override(
        recipes.get("images"),
        [*common, f"data.image_size={SIDE}", "data.channels=1", "encoder.name=convnet", *SETTINGS],
    )


def write_images(folder: Path, rows: int) -> None:
    """Write PNG files: noisy pictures of 50 kinds."""
    drawing = np.random.default_rng(0)
    kinds = drawing.integers(0, 256, (KINDS, SIDE, SIDE))
    for row in range(rows):
        place = folder / f"{row // PER_FOLDER:04d}"
        place.mkdir(parents=True, exist_ok=True)
        noise = drawing.normal(0, 40, (SIDE, SIDE))
        pixels = np.clip(kinds[row % KINDS] + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        (place / f"{row % PER_FOLDER:04d}.png").write_bytes(file.getvalue())


def features(rows: int) -> torch.Tensor:
    """Return features of length 1 near a curved surface, (rows, 128)."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(SURFACE, WIDTH, generator=generator)
    second = torch.randn(WIDTH, WIDTH, generator=generator)
    found = torch.empty(rows, WIDTH)
    for part in found.split(65_536):
        on_surface = torch.randn(len(part), SURFACE, generator=generator) @ first
        torch.matmul(on_surface.sin(), second, out=part)
        part /= part.norm(dim=1, keepdim=True)
    return found


# ------------------------------------------------------------------------------------- the phases


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Clock(RunMonitor):
    """Takes the time of each epoch, and of all work between the epochs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Journal(folder), NullScreen())
        self.seconds: Seconds = defaultdict(float)
        self._since, self._within = cpu_seconds(), "start"

    def _lap(self, next_one: str) -> None:
        now = cpu_seconds()
        self.seconds[self._within] += now - self._since
        self._since, self._within = now, next_one

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self._lap(f"epoch of {stage}")
        super().start(stage, epochs, steps, done)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self._lap(f"after {stage}")
        super().epoch(stage, epoch, figures)

    def finish(self) -> None:
        self._lap("")
        super().finish()


def timed(name: str, work: Callable[[], object]) -> Seconds:
    began = cpu_seconds()
    work()
    return {name: cpu_seconds() - began}


def list_files(work: Path, rows: int) -> Seconds:
    return timed("list files", lambda: list_rows(data_of(work / "files")))


def pack_files(work: Path, rows: int) -> Seconds:
    request = pack.Request(
        work / "files", work / "shards", Options(shard_mb=1), jobs=1, overwrite=True
    )
    return timed("pack", lambda: pack.pack(request, QUIET))


def list_shards(work: Path, rows: int) -> Seconds:
    return timed("list shards", lambda: list_rows(data_of(work / "shards")))


def survey_shards(work: Path, rows: int) -> Seconds:
    data = data_of(work / "shards")
    listed = list_rows(data)
    return timed("survey", lambda: survey(listed, data))


def stages(work: Path, rows: int) -> Seconds:
    recipe, folder = recipe_of(work / "shards"), work / "run"
    held = assemble(list_rows(recipe.data), recipe.data, 0, None)
    device, clock = torch.device("cpu"), Clock(folder)
    catalog = held.catalog.for_clusters(KINDS)
    data = ResidentData(held.images, device)
    execute(recipe, catalog, data, folder, LocalWorker(folder, device), clock, overwrite=True)
    clock.finish()
    wanted = {f"{when} {stage}" for stage in STAGES for when in ("epoch of", "after")}
    return {name: value for name, value in clock.seconds.items() if name in wanted}


def mining(work: Path, rows: int) -> Seconds:
    held = features(rows)
    return timed("mining", lambda: mine(held, 20))


def clusters(work: Path, rows: int) -> Seconds:
    held = features(rows)
    return timed("k-means", lambda: kmeans(held, KINDS, 0))


def counting(work: Path, rows: int) -> Seconds:
    held = features(rows)
    return timed("count", lambda: estimate(held, 0))


def page(work: Path, rows: int) -> Seconds:
    return timed("report", lambda: report(work / "run", work / "report.html", Display(QUIET)))


def predicting(work: Path, rows: int) -> Seconds:
    question = PredictRequest(work / "run", str(work / "shards"), work / "new.parquet")
    return timed("predict", lambda: predict(question, QUIET))


PHASES = {
    phase.__name__: phase
    for phase in (
        list_files, pack_files, list_shards, survey_shards, stages, mining, clusters, counting,
        page, predicting,
    )
}  # fmt: skip


def measure(name: str, work: Path, rows: int) -> dict[str, Any]:
    """Run a phase in this process; return its seconds and peak memory above the present one."""
    share_one_pool()  # as the command line does
    before = psutil.Process().memory_info().rss
    seconds = PHASES[name](work, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_mb": (peak - before) / 2**20}


# ---------------------------------------------------------------------------------- what it tells


def exponent(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float, float]:
    """Fit a + b (N / N_least)^p with a, b ≥ 0 by least squares of relative errors; return it."""
    x, y = np.array(sizes) / sizes[0], np.array(values)

    def model(x: np.ndarray, a: float, b: float, p: float) -> np.ndarray:
        return a + b * x**p

    bounds = ([0, 0, 0], [y.max() + 1e-9, y.max() + 1e-9, 3])
    start = (y.min() / 2, y.min() / 2, 1.0)
    found, _ = curve_fit(model, x, y, start, sigma=np.maximum(y, 1e-9), bounds=bounds, maxfev=9999)
    return float(found[0]), float(found[1]), float(found[2])


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per phase: seconds and memory at each size, and both exponents."""
    phases: dict[str, dict[int, float]] = defaultdict(dict)
    memory: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        for name, value in row["seconds"].items():
            phases[name][row["rows"]] = value
            memory[name][row["rows"]] = row["peak_mb"]
    lines = []
    for name, seconds in phases.items():
        sizes = sorted(seconds)
        line: dict[str, Any] = {"phase": name}
        line |= {f"{size:,}": round(seconds[size], 2) for size in sizes}
        line["MB"] = " ".join(f"{memory[name][size]:.0f}" for size in sizes)
        if len(sizes) > 3:
            line["exponent"] = exponent(sizes, [seconds[size] for size in sizes])[2]
            line["of memory"] = exponent(sizes, [memory[name][size] for size in sizes])[2]
        lines.append(line)
    return lines


def draw(lines: list[dict[str, Any]], sizes: Sequence[int], file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for number, line in enumerate(lines):
        values = [line[f"{size:,}"] for size in sizes]
        axes.loglog(sizes, values, "o-v^s"[number % 5] + "-", label=line["phase"], markersize=4)
    axes.set_xlabel("images")
    axes.set_ylabel("CPU seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.work, sizes[0])))
        return
    out: Path = arguments.out
    rows = json.loads(out.read_text())["results"] if out.exists() else []
    done = {(row["phase"], row["rows"]) for row in rows}
    for size in sizes:
        work = arguments.work / str(size)
        if not (work / "files").exists():
            write_images(work / "new", size)
            (work / "new").rename(work / "files")
        for phase in arguments.phases.split(","):
            if (phase, size) in done:
                continue
            command = [sys.executable, "-m", "benchmarks.growth", "--work", str(work), "--one"]
            told = subprocess.run(
                [*command, phase, "--sizes", str(size)], cwd=ROOT, check=True, stdout=-1
            ).stdout
            row = {"phase": phase, "rows": size} | json.loads(told.splitlines()[-1])
            print(row, flush=True)
            rows.append(row | {"revision": revision()})
            save(out, describe_machine(torch.get_num_threads()), rows)
    lines = summary(rows)
    print_table(lines)
    if all(f"{size:,}" in line for size in sizes for line in lines):
        draw(lines, sizes, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
