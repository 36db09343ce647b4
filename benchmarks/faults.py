"""Test every command with random faults: no wrong result with exit status 0, no lost result.

python -m benchmarks.faults [--rounds 200] [--seed 0] [--minutes 60] [--save]

In each round one command gets one fault at a random moment: SIGKILL, SIGTERM, files that cannot
grow (as on a full disk), images that vanish, or the same command run a second time. Half of the
rounds start with a finished result in place. A command that succeeds must give the same answer as
without a fault; a finished result must not be lost; and the same command, run again without a
fault, must succeed. Every command first gets every fault once. With --save, the results are added
to those saved before.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.kinds import make
from benchmarks.report import describe_machine, revision
from snscc_ray import cli
from snscc_ray.answers import predict, report  # noqa: F401  (warm)
from snscc_ray.compare import comparison as compare  # noqa: F401  (warm)
from snscc_ray.core import storage
from snscc_ray.data import pack
from snscc_ray.fit import fit  # noqa: F401  (warm)

FAULTS = ("kill", "term", "full", "vanish", "second")
_PHOTOS = 42
_PLACES = re.compile(r"/[^\s'\",:]*/(?=(at|setup|snscc_ray|site-packages)/)")  # local paths
SAVED = Path(__file__).parent / "results" / "faults.json"
_SMALL = (
    "pretrain.epochs=2", "pretrain.batch_size=16", "pretrain.projection_hidden=16",
    "pretrain.mined_neighbors=10", "pretrain.warmup_epochs=0", "encoder.name=convnet",
    "encoder.width=4", "train.epochs=2", "train.batch_size=16", "train.num_neighbors=5",
    "boost.epochs=1", "boost.batch_size=16", "boost.num_neighbors=5", "data.image_size=8",
    "data.num_clusters=3", "train.view.cutout=2", "boost.view.cutout=2",
    "runtime.checkpoint_seconds=0", "runtime.device=cpu",
)  # fmt: skip
_SETS = [word for setting in _SMALL for word in ("--set", setting)]
_FIT_SETS = [
    word
    for setting in _SMALL
    if not setting.startswith(("data.", "encoder.name", "runtime.device")) and "view" not in setting
    for word in ("--set", setting)
]


@dataclass(frozen=True)
class Command:
    words: Callable[[Path], list[str]]  # in a folder with `photos`, `run` and `out`
    answer: Callable[[Path], Any]  # None while it is not finished
    again: Callable[[Path], list[str]] | None = None  # the command to resume, if another one
    prepared: str | None = None  # the folder that `out` starts as a copy of
    weight: float = 1.0


# ------------------------------------------------------------------------------- the answers


def _of_run(out: Path) -> Any:
    if not (out / "metrics.json").exists():
        return None
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    found = pq.read_table(out / "assignments.parquet").to_pydict()
    assert rows == len(found["id"]), f"{rows} rows told, {len(found['id'])} kept"
    return found


def _of_file(out: Path) -> Any:
    return out.read_bytes() if out.is_file() else None


def _of_pack(out: Path) -> Any:
    if not (out / pack.MANIFEST).exists():
        return None
    entries = json.loads((out / pack.MANIFEST).read_text())["shards"]
    if not all("sha256" in entry for entry in entries):
        return None
    return [pq.read_table(out / entry["file"]).to_pydict() for entry in entries]


def _of_table(path: Path) -> Any:
    """Read a CSV without the columns that depend on time or place."""
    if not path.exists():
        return None
    with path.open() as file:
        return [
            {k: v for k, v in row.items() if "seconds" not in k and "folder" not in k}
            for row in csv.DictReader(file)
        ]


def _of_report(out: Path) -> Any:
    page, data = out / "report.html", out / "report.json"
    if not (page.exists() and data.exists()):
        return None
    assert page.read_text().rstrip().endswith("</html>"), "the page is cut off"
    held = json.loads(data.read_text())
    return {k: v for k, v in held.items() if k in ("clusters", "images", "trust", "map")} or held


def _of_export(out: Path) -> Any:
    path = out / "model.pt2"
    if not path.exists():
        return None
    images = torch.arange(2 * 3 * 64, dtype=torch.int64).remainder(256).to(torch.uint8)
    answer = torch.export.load(path).module()(images.reshape(2, 3, 8, 8))
    return [part.tolist() for part in answer]


COMMANDS = {
    "fit": Command(
        lambda at: [
            *("fit", f"{at}/photos", "--clusters", "3", "--image-size", "8"),
            *("--out", f"{at}/out", *_FIT_SETS),
        ],
        lambda at: _of_run(at / "out"),
    ),
    "run": Command(
        lambda at: ["run", "images", "--data", f"{at}/photos", "--out", f"{at}/out", *_SETS],
        lambda at: _of_run(at / "out"),
        again=lambda at: ["run", "--resume", "--out", f"{at}/out"],
    ),
    "resume": Command(
        lambda at: ["run", "--resume", "--out", f"{at}/out"],
        lambda at: _of_run(at / "out"),
        prepared="begun",
    ),
    "predict": Command(
        lambda at: ["predict", f"{at}/run", f"{at}/photos", "-o", f"{at}/new.csv", "--overwrite"],
        lambda at: _of_file(at / "new.csv"),
    ),
    "pack": Command(
        lambda at: ["pack", f"{at}/photos", f"{at}/out", "--jobs", "1", "--skip-corrupt"],
        lambda at: _of_pack(at / "out"),
    ),
    "compare": Command(
        lambda at: [
            *("compare", "images", "--methods", "kmeans,nmf,pretext", "--out", f"{at}/out"),
            *("--data", f"{at}/photos", *_SETS),
        ],
        lambda at: (
            _of_table(at / "out" / "compare.csv")
            if (at / "out" / "methods" / "pretext" / "outcome.json").exists()
            else None
        ),
    ),
    "report": Command(lambda at: ["report", f"{at}/run"], lambda at: _of_report(at / "run")),
    "export": Command(
        lambda at: ["export", f"{at}/run", "--torch", f"{at}/out/model.pt2", "--overwrite"],
        lambda at: _of_export(at / "out"),
    ),
    "sweep": Command(
        lambda at: [
            *("sweep", "gamma", "--recipe", "images", "--data", f"{at}/photos"),
            *("--seeds", "1", "--samples", "2", "--out", f"{at}/disk/out", *_SETS),
        ],
        lambda at: _of_table(at / "disk" / "out" / "results.csv"),
        weight=0.15,  # Ray is slow to start
    ),
}


# --------------------------------------------------------------------------------- processes


def start(words: list[str], log: Path, limit: int | None = None) -> int:
    """Run the command in a process forked from this one, where torch is already imported."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        _become(words, log, limit)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
    finally:  # always: the fork must not run its parent's clean-up
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)


def _become(words: list[str], log: Path, limit: int | None) -> None:
    os.setsid()
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if words[0] == "sweep":  # Ray does not work in a forked process
        os.execv(sys.executable, [sys.executable, "-m", "snscc_ray", *words])
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails; the process survives
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # A fork loses torch's thread pool, which is recreated on the next use. Recreate it in this
    # thread: of two threads that do so at once, one would find no pool.
    torch.set_num_threads(1)
    sys.argv = ["snscc", *words]
    cli.main()


def ended(child: int) -> int:
    """Wait for the child; return its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sent(child: int, number: int) -> None:
    """Send a signal to the child. SIGKILL goes to its whole group, to leave no processes behind."""
    with suppress(ProcessLookupError):
        os.killpg(child, number) if number == signal.SIGKILL else os.kill(child, number)


# ------------------------------------------------------------------------------------ rounds


class Wrong(Exception):
    """A result that must never happen."""


def one(command: Command, fault: str, finished: bool, truth: Any, setup: Path, spans: float,
        chance: random.Random) -> str:  # fmt: skip
    """Run one round in a new folder; return the command's exit status. Raises Wrong."""
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        at = Path(name) / "at"
        shutil.copytree(setup, at)
        _move_in(at, setup)
        log = Path(name) / "log"
        log.touch()
        if not finished:
            for made in ("out", "disk", "new.csv", "run/report.html", "run/report.json"):
                shutil.rmtree(at / made, ignore_errors=True)
                (at / made).unlink(missing_ok=True)
            if command.prepared:
                shutil.copytree(at / command.prepared, at / "out")
        words = command.words(at)
        limit = chance.choice([2_000, 6_000, 20_000, 60_000, 200_000]) if fault == "full" else None
        disk: AbstractContextManager[None] = nullcontext()
        if limit is not None and words[0] == "sweep":  # Ray's own files may grow
            disk, limit = _small_disk(at / "disk", limit), None
        other = None
        gone: list[str] = []
        with disk:
            child = start(words, log, limit)
            time.sleep(chance.uniform(0, spans) if fault not in ("full", "second") else 0)
            if fault == "second":
                time.sleep(chance.uniform(0, spans / 2))
                other = ended(start(words, log))
            elif fault == "vanish":
                for photo in chance.sample(sorted((at / "photos").rglob("*.png")), 3):
                    gone.append(photo.relative_to(at / "photos").as_posix())
                    photo.rename(at / gone[-1].replace("/", "-"))
            elif fault in ("kill", "term"):
                sent(child, signal.SIGKILL if fault == "kill" else signal.SIGTERM)
            status = ended(child)
        text = log.read_text(errors="replace")
        if "Traceback" in text:
            raise Wrong(f"a traceback: {text[-1500:]}")
        now = command.answer(at)
        if status == 0 and now != truth and not _fewer(now, truth, gone, text):
            raise Wrong(f"exit status 0 and another answer: {text[-800:]}")
        if other == 0 and now != truth:
            raise Wrong(f"exit status 0 of the second and another answer: {text[-800:]}")
        if finished and now != truth and not (status == 0 and gone):
            raise Wrong(f"a finished result is lost (exit status {status}): {text[-800:]}")
        for name in gone:
            (at / name.replace("/", "-")).rename(at / "photos" / name)
        _undisturbed(command, at, truth, log)
        return str(status)


@contextmanager
def _small_disk(folder: Path, spare: int) -> Iterator[None]:
    """Mount a file system with `spare` free bytes in place of a folder."""
    folder.mkdir(exist_ok=True)
    held = Path(shutil.move(folder, folder.with_name("held")))
    folder.mkdir()
    files = [path.stat().st_size for path in held.rglob("*") if path.is_file()]
    size = sum(-(-each // 4096) * 4096 for each in files) + spare
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=0", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        shutil.copytree(held, folder, dirs_exist_ok=True)
        yield
        shutil.rmtree(held)
        shutil.copytree(folder, held)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
        held.rename(folder)


def _fewer(now: Any, truth: Any, gone: list[str], text: str) -> bool:
    """Return whether an answer is right for the remaining images, and says which are missing."""
    if not gone or now is None:
        return False
    told = [f"left out {name}" in text for name in gone]
    if any(told):
        return all(told) or all(f"{name}" not in str(now) for name in gone)
    if isinstance(now, list) and now and "image" in now[0]:  # of a pack
        there = {name for shard in now for name in shard["id"]}
        return not there & set(gone)
    return any(f"{_PHOTOS - count} images" in text for count in (1, 2, 3)) or (
        isinstance(now, dict) and not set(gone) & set(now.get("id", gone))
    )


def _undisturbed(command: Command, at: Path, truth: Any, log: Path) -> None:
    if command.answer(at) == truth and command.again:
        return  # finished: `run` refuses to run again
    begun = command.again and (at / "out" / "recipe.json").exists()
    words = command.again(at) if begun and command.again else command.words(at)
    status = ended(start(words, log))
    tail = log.read_text(errors="replace")[-4000:]
    if status == 2 and "has just started; try again in a moment" in tail:  # killed at the start
        time.sleep(21)
        status = ended(start(words, log))
    if status == 2 and ("other images" in tail or "have changed since" in tail):
        status = ended(start([*command.words(at), "--overwrite"], log))
    if status != 0 or command.answer(at) != truth:
        tail = log.read_text(errors="replace")[-4000:]
        raise Wrong(f"the same command again ends with {status} or another answer: {tail}")


def _move_in(at: Path, setup: Path) -> None:
    """Update the image paths in copied runs."""
    for name in ("recipe.json", "fit.json", "compare.json", "sweep.json"):
        for recipe in at.rglob(name):
            recipe.write_text(recipe.read_text().replace(str(setup), str(at)))


def prepared(place: Path) -> Path:
    """Prepare photos, a finished run, and a run stopped after Train."""
    at = place / "setup"
    make(at / "photos", 3, _PHOTOS // 3, seed=0)
    run = ["run", "images", "--data", f"{at}/photos", *_SETS, "--out"]
    for folder in ("run", "begun"):
        if ended(start([*run, f"{at}/{folder}"], place / "log")) != 0:
            raise SystemExit((place / "log").read_text())
    for name in ("metrics.json", "boost/stage.json", "boost/final.pt"):
        (at / "begun" / name).unlink()
    return at


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--commands", default=",".join(COMMANDS))
    options.add_argument("--save", action="store_true")
    asked = options.parse_args()
    torch.set_num_threads(1)
    chance, began = random.Random(asked.seed), time.monotonic()
    names = asked.commands.split(",")
    ends: dict[str, Counter[str]] = {}
    faults: list[dict[str, Any]] = []
    rounds = 0
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        base = prepared(Path(name))
        truths: dict[str, tuple[Any, Path, float]] = {}
        pairs = [(kind, fault) for kind in names for fault in FAULTS]
        chance.shuffle(pairs)
        while rounds < asked.rounds and time.monotonic() - began < asked.minutes * 60:
            rounds += 1
            likely = chance.choices(names, [COMMANDS[n].weight for n in names])[0]
            kind, fault = pairs.pop() if pairs else (likely, chance.choice(FAULTS))
            command = COMMANDS[kind]
            if kind not in truths:
                truths[kind] = _truth(command, base, Path(name) / kind)
            truth, setup, seconds = truths[kind]
            finished = chance.random() < 0.5 and kind != "resume"
            what = f"{kind}, {fault}{', finished' * finished}"
            try:
                how = one(command, fault, finished, truth, setup, seconds, chance)
            except (Wrong, AssertionError) as wrong:
                how = "wrong"
                said = _PLACES.sub("", str(wrong))
                faults.append({"round": rounds, "what": what, "said": said[-1500:]})
                print(f"round {rounds}: {what}: {wrong}", flush=True)
            ends.setdefault(f"{kind}, {fault}", Counter())[how] += 1
    piece = {
        "revision": revision(),
        "seed": asked.seed,
        "commands": names,
        "rounds": rounds,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "wrong": faults,
    }
    print(f"{rounds} rounds in {piece['minutes']} minutes, {len(faults)} wrong")
    for what, found in sorted(ends.items()):
        print(f"{what}: {dict(found)}")
    if asked.save:
        _save(piece, ends)
    sys.exit(bool(faults))


def _save(piece: dict[str, Any], ends: dict[str, Counter[str]]) -> None:
    before = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    pieces = [*before.get("pieces", []), piece]
    for what, found in before.get("exit_status", {}).items():
        ends.setdefault(what, Counter()).update(found)
    result = {
        "machine": describe_machine(1),
        "rounds": sum(each["rounds"] for each in pieces),
        "wrong": sum(len(each["wrong"]) for each in pieces),
        "exit_status": {what: dict(sorted(found.items())) for what, found in sorted(ends.items())},
        "pieces": pieces,
    }
    storage.write_json(SAVED, result)


def _truth(command: Command, base: Path, place: Path) -> tuple[Any, Path, float]:
    """Run a command without faults; return its answer, the folder afterwards, and the seconds."""
    shutil.copytree(base, place)
    _move_in(place, base)
    if command.prepared:
        shutil.copytree(place / command.prepared, place / "out")
    began = time.monotonic()
    status = ended(start(command.words(place), place / "log"))
    answer = command.answer(place)
    if status != 0 or answer is None:
        raise SystemExit((place / "log").read_text())
    return answer, place, time.monotonic() - began


if __name__ == "__main__":
    main()
