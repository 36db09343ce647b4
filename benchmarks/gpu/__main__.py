"""The command for a quarter of an hour on a GPU.

    python -m benchmarks.gpu --data DIR --seconds S --out OUT [--from BUNDLE]

Three phases, each in its own process with a deadline: the GPU tests, the speed, and CIFAR-10 in the
remaining time. A failed phase does not stop the next one, and the bundle is always packed.
OUT gets `report.json`, `log.txt` and `bundle.tar.NN`: at most 8 files of at most 15 MB.
Exit status 1: a phase failed; the report names it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.gpu import bundle
from benchmarks.gpu.cifar10 import STOPPED, progress
from benchmarks.report import describe_machine, print_table, revision
from snscc_ray.config.errors import UserError
from snscc_ray.core import storage

PHASES = ("tests", "speed", "cifar10")
_MOST_FILES, _MOST_BYTES = 8, 64 * 2**20
# Limits of the first two phases: in seconds, and as a share of the total time.
_TESTS, _SPEED = (60.0, 0.15), (80.0, 0.25)
_PACKING = 15.0  # seconds reserved for the bundle
_GRACE = 10.0  # seconds to write a checkpoint after SIGTERM
# Estimated before any measurement, from others' figures and the network's operations. The report
# shows them beside the measurements.
_EXPECTED = {
    "pretrain": "24,000-28,000",
    "train": "14,000-16,000",
    "pretrain utilisation": ">= 0.25",
    "pretrain / torchvision, 8 loaders": ">= 10",
}


@dataclass(frozen=True)
class Ended:
    """How a phase ended: ok, skipped, stopped (as intended, at its deadline), killed, or failed."""

    phase: str
    status: str
    seconds: float
    why: str = ""


def run_phase(phase: str, command: list[str], seconds: float, log: TextIO) -> Ended:
    """Run a phase until it ends, or to its deadline: then SIGTERM, and later SIGKILL.

    Its output is printed and logged as it comes.
    """
    print(f"--- {phase}: at most {seconds:.0f} s", flush=True)
    log.write(f"--- {phase}\n")
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    last: list[str] = []
    reader = threading.Thread(target=_copy, args=(process, log, last), daemon=True)
    reader.start()
    asked = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        asked = True
    finally:  # also if this process itself is told to stop
        _end(process)
        reader.join(5)
        log.flush()
    code, took = process.returncode, round(time.monotonic() - began, 1)
    if code == 0:
        return Ended(phase, "ok", took)
    if code == STOPPED:
        return Ended(phase, "stopped", took)
    if asked:
        return Ended(phase, "killed", took, f"did not end within {seconds:.0f} s")
    return Ended(phase, "failed", took, f"exit status {code}: {last[-1] if last else 'no output'}")


def _end(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to a process and its children, and SIGKILL after the grace period."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _copy(process: subprocess.Popen[str], log: TextIO, last: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        print(line, end="", flush=True)
        if line.strip():
            last[:] = [line.strip()]


def share(limit: tuple[float, float], seconds: float) -> float:
    return min(limit[0], limit[1] * seconds)


def beside_expected(speed: dict[str, float], utilisation: float | None) -> list[dict[str, Any]]:
    """Return expected beside measured figures; `-` if not measured."""
    measured: dict[str, float | None] = {
        "pretrain": speed.get("pretrain"),
        "train": speed.get("train"),
        "pretrain utilisation": utilisation,
        "pretrain / torchvision, 8 loaders": speed["pretrain"] / speed["torchvision, 8 loaders"]
        if {"pretrain", "torchvision, 8 loaders"} <= speed.keys()
        else None,
    }
    return [
        {
            "what": what,
            "expected": expected,
            "measured": "-" if measured[what] is None else measured[what],
        }
        for what, expected in _EXPECTED.items()
    ]


def phases(arguments: argparse.Namespace, run: Path, log: TextIO) -> Iterator[Ended]:
    """Run the requested phases, one after another."""
    ends_at = time.monotonic() + arguments.seconds - _PACKING - _GRACE
    speed: Path = arguments.out / "speed.json"
    tiny = ["--tiny"] if arguments.tiny else []
    python = [sys.executable, "-m"]
    if "tests" in arguments.phases:
        command = [*python, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
        command += ["-k", "cuda"] if torch.cuda.is_available() else []
        one = run_phase("tests", command, share(_TESTS, arguments.seconds), log)
        if one.status == "ok" and not torch.cuda.is_available():
            one = Ended("tests", "ok", one.seconds, "without a GPU: what needs one was skipped")
        yield one
    if "speed" in arguments.phases:
        seconds = share(_SPEED, arguments.seconds)
        command = [*python, "benchmarks.gpu.speed", "--data", str(arguments.data)]
        command += ["--out", str(speed), "--seconds", str(seconds), *tiny]
        yield run_phase("speed", command, seconds, log)
    artifacts = arguments.out / "compiled.bin"
    if artifacts.exists():
        run.mkdir(parents=True, exist_ok=True)
        artifacts.rename(run / "compiled.bin")
    if "cifar10" in arguments.phases:
        seconds = ends_at - time.monotonic()
        if seconds <= 0:
            yield Ended("cifar10", "failed", 0.0, "no time was left")
        elif (run / "metrics.json").exists():
            yield Ended("cifar10", "skipped", 0.0, "the bundle's run is finished")
        else:
            command = [*python, "benchmarks.gpu.cifar10", "--data", str(arguments.data)]
            command += ["--run", str(run), "--speed", str(speed), "--seconds", str(seconds)]
            command += ["--sittings", str(arguments.sittings), *tiny]
            yield run_phase("cifar10", command, seconds, log)


def conclude(arguments: argparse.Namespace, run: Path, ended: list[Ended]) -> int:
    """Pack the bundle, write the report, print both; return the exit status."""
    out: Path = arguments.out
    bundled = ""
    if (run / "recipe.json").exists():
        bundled = bundle.describe(bundle.pack(run, out))
    speed_file = out / "speed.json"
    speed = storage.read_json(speed_file) if speed_file.exists() else {"results": []}
    rates = {row["what"]: row["images_per_second"] for row in speed["results"]}
    used = {row["what"]: row["utilisation"] for row in speed["results"]}
    state = progress(run)
    report = {
        **describe_machine(torch.get_num_threads()),
        "revision": revision(),
        "images": "CIFAR-10, " + arguments.data.name,
        "tiny": arguments.tiny,
        "seconds_asked": arguments.seconds,
        "phases": [asdict(one) for one in ended],
        "expected": beside_expected(rates, used.get("pretrain")),
        "speed": speed,
        "cifar10": state,
        "bundle": bundled,
    }
    storage.write_json(out / "report.json", report)
    speed_file.unlink(missing_ok=True)  # included in the report
    print_table([asdict(one) for one in ended])
    print_table(report["expected"])
    for stage, found in state["stages"].items():
        figures = found["figures"] or found["last_epoch"]
        acc = figures.get("oracle/acc")
        print(
            f"{stage}: {found['epochs_done']} of {found['epochs']} epochs, "
            f"{found['images_per_second']:,.0f} images/s, ACC "
            + ("-" if acc is None else f"{acc:.3f}")
        )
    files = sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} files, {size / 2**20:.1f} MiB in {out}; bundle: {bundled or 'none'}")
    problems = [f"{one.phase}: {one.why}" for one in ended if one.status in ("failed", "killed")]
    if len(files) > _MOST_FILES or size > _MOST_BYTES:
        problems.append(f"{len(files)} files of {size / 2**20:.0f} MiB are too many or too large")
    for problem in problems:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: shards, or torchvision")
    parser.add_argument("--seconds", type=float, required=True, help="that all of it may take")
    parser.add_argument("--out", type=Path, required=True, help="a folder for what is to be kept")
    parser.add_argument("--from", dest="bundle", type=Path, help="go on with this bundle")
    parser.add_argument(
        "--phases",
        type=lambda text: text.split(","),
        default=list(PHASES),
        help=f"some of {','.join(PHASES)}  [default: all]",
    )
    parser.add_argument(
        "--sittings",
        type=int,
        default=4,
        help="of a new run: how many such times its epochs are chosen for  [default: 4]",
    )
    parser.add_argument("--tiny", action="store_true", help="a try of the command without a GPU")
    arguments = parser.parse_args()
    if unknown := set(arguments.phases) - set(PHASES):
        parser.error(f"--phases: {', '.join(sorted(unknown))} is none of {', '.join(PHASES)}")
    if not arguments.data.exists():
        parser.error(f"--data: {arguments.data} does not exist")
    arguments.data = arguments.data.absolute()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if any(arguments.out.iterdir()):
        parser.error(f"--out: {arguments.out} is not empty; name another folder")
    work = Path(tempfile.mkdtemp(prefix="gpu-"))
    run = work / "run"
    try:
        if arguments.bundle:
            bundle.unpack(arguments.bundle, run)
        ended: list[Ended] = []
        # An outside time limit sends SIGTERM: pack what exists by then.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with (arguments.out / "log.txt").open("w") as log:
            try:
                for one in phases(arguments, run, log):
                    ended.append(one)
            except KeyboardInterrupt:
                ended.append(Ended("the rest", "failed", 0.0, "stopped from outside"))
        sys.exit(conclude(arguments, run, ended))
    except UserError as error:
        sys.exit(f"benchmarks.gpu: {error}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
