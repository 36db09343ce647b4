"""Two commands on one folder or one file: the second is refused at once, or both work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow.csv
import pytest

from snscc_ray.cli import options
from snscc_ray.core.claim import CLAIM
from tests.conftest import TINY, digits_table
from tests.test_cli import PHOTOS, Snscc, command, content, environment, refused, sets
from tests.test_pack import write_photos
from tests.test_predict import images

HOLD = """
import pathlib, sys
from snscc_ray.core.claim import claimed, claimed_file
kind, place, name = sys.argv[1:]
sys.argv = ["snscc", name]
with (claimed if kind == "folder" else claimed_file)(pathlib.Path(place), print):
    print("held", flush=True)
    sys.stdin.read()
"""
# What each command writes: a folder, which it has for itself, or a file.
WRITES = {
    "fit": "RUN", "run": "RUN", "run --resume": "RUN", "pack": "RUN", "sweep": "RUN",
    "compare": "RUN", "report": "RUN", "predict": "OUT.csv", "export": "OUT.pt2",
    "similar": "OUT.html",
}  # fmt: skip
WORDS = {
    "fit": "fit SCANS --out RUN --overwrite",
    "run": "run digits --out RUN --overwrite",
    "run --resume": "run --resume --out RUN",
    "pack": "pack SCANS RUN --overwrite",
    "sweep": "sweep epsilon --out RUN --overwrite",
    "compare": "compare digits --out RUN --overwrite",
    "report": "report RUN",
    "predict": "predict RUN SCANS --out OUT.csv",
    "export": "export RUN --torch OUT.pt2",
    "similar": "similar RUN 000.png --out OUT.html",
}


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and scans."""
    place = tmp_path_factory.mktemp("two")
    images(place / "scans", digits_table(60))
    run = command("run", "digits", "--out", place / "run", *sets(*TINY))
    subprocess.run(run, check=True, capture_output=True, env=environment())
    return place


def told(words: str, place: Path) -> list[str]:
    names = {"RUN": "run", "SCANS": "scans", "OUT": "out"}
    for name, folder in names.items():
        words = words.replace(name, str(place / folder))
    return words.split()


@contextmanager
def holder(what: str, name: str, place: Path) -> Iterator[int]:
    """A real process that holds it as the command does."""
    kind = "folder" if what == "RUN" else "file"
    words = [sys.executable, "-c", HOLD, kind, *told(what, place), name]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.kill()  # and so leaves its claim, which is in nobody's way
        process.wait()


@pytest.mark.parametrize("first", WRITES)
def test_who_comes_second_is_refused_at_once(first: str, place: Path, snscc: Snscc) -> None:
    with holder(WRITES[first], first, place) as pid:
        before = content(place)
        for second, words in WORDS.items():
            if WRITES[first] not in ("RUN", WRITES[second]):
                continue  # they write different files, see below
            began = time.monotonic()
            done = snscc(*told(words, place))
            said = f"in use by process {pid} (snscc {first}) since {time.strftime('%Y-')}"
            refused(done, said, "wait until it ends, or use another f")
            assert time.monotonic() - began < 20, second
            assert content(place) == before, second


@pytest.mark.slow
@pytest.mark.parametrize("first", ["predict", "export"])
def test_one_file_of_a_folder_is_in_nobody_elses_way(
    first: str, place: Path, snscc: Snscc, tmp_path: Path
) -> None:
    """Where a file in a folder is being written, what writes the folder finds it empty."""
    new = {name: tmp_path / name / "out" for name in ("fit", "run", "pack", "compare")}
    small = sets(*TINY)
    fit = [word for word in sets(*PHOTOS) if word != "--set" and word[:4] in ("pret", "trai")]
    fit = sets(*(word for word in fit if "view" not in word))
    asked = {
        "fit": ["fit", place / "scans", "--clusters", "3", "--out", new["fit"].parent, *fit],
        "run": ["run", "digits", "--out", new["run"].parent, *small],
        "pack": ["pack", place / "scans", new["pack"].parent],
        "compare": ["compare", "digits", "--methods", "kmeans", "--out", new["compare"].parent,
                    *small],
    }  # fmt: skip
    ending = Path(WRITES[first]).suffix
    held = [*new.values(), place / "run" / "out"]
    with ExitStack() as stack:
        for out in held:
            stack.enter_context(holder(f"OUT{ending}", first, out.parent))
        for name, words in asked.items():
            done = snscc(*words)
            assert done.status == 0, (name, done)
        words = told("report RUN", place)
        assert snscc(*words).status == 0
        assert snscc(*told("run --resume --out RUN", place)).status == 0
        other = {"predict": "export RUN --torch", "export": "predict RUN SCANS --out"}[first]
        target = tmp_path / ("new.pt2" if first == "predict" else "new.csv")
        assert snscc(*told(other, place), target).status == 0 and target.exists()
    for out in held:  # of who was killed
        (out.parent / f"{CLAIM}.out{ending}").unlink()


RACES = {
    "predict": ("predict RUN SCANS --out OUT.csv", "OUT.csv"),
    "export": ("export RUN --torch OUT.pt2", "OUT.pt2"),
    "fit": ("fit SCANS --clusters 3 --out OUT", "OUT/metrics.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RACES)
def test_of_two_real_commands_at_once_one_ends_well(name: str, place: Path, tmp_path: Path) -> None:
    words, made = RACES[name]
    for link in ("run", "scans"):
        (tmp_path / link).symlink_to(place / link)
    more = sets("pretrain.epochs=1", "train.epochs=1", "boost.epochs=1") * (name == "fit")
    two = [
        subprocess.Popen(
            command(*told(words, tmp_path), *more),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(), text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in two]
    status = sorted(process.returncode for process in two)
    # Who comes when the other has ended finds what it wrote.
    assert status == [0, 2], said
    [line] = [err for err, process in zip(said, two, strict=True) if process.returncode == 2]
    assert line.count("\n") == 1 and line.startswith("snscc: "), line
    pid = next(process.pid for process in two if process.returncode == 0)
    assert f"in use by process {pid} (" in line or "exists" in line or "holds" in line, line
    [written] = told(made, tmp_path)
    assert Path(written).exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(CLAIM)]
    if name == "predict":
        assert pyarrow.csv.read_csv(written).num_rows == 60
    if name == "fit":
        assert json.loads(Path(written).read_text())["rows"] == 60


def test_a_pack_that_is_under_way_is_not_taken_for_the_whole(snscc: Snscc, tmp_path: Path) -> None:
    photos, out = write_photos(tmp_path / "photos", 42, 410), tmp_path / "shards"
    words = ("pack", photos, out, "--shard-mb", 1, "--jobs", 1)
    process = subprocess.Popen(command(*words), env=environment(), start_new_session=True)
    asked = ["run", "images", "--data", out, "--out", tmp_path / "run", *sets(*PHOTOS)]
    while not list(out.glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        done = snscc(*asked)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    refused(done, f"{out} holds only ", "shards in its pack.json", "snscc pack")
    assert not (tmp_path / "run").exists()
    refused(snscc(*asked), "holds only")
    assert snscc(*words).status == 0
    done = snscc(*asked)
    assert done.status == 0 and "42 images" in done.out, done
    next(out.glob("*.parquet")).unlink()
    refused(snscc(*asked, "--overwrite"), "holds only", "remove pack.json")
