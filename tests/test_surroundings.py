"""Names, consoles and users that are not as one has them."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snscc_ray import SNSCC
from snscc_ray.cli import options
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import expanded
from tests.conftest import TINY
from tests.ray_tools import own_ray
from tests.test_cli import PHOTOS, Done, Snscc, command, environment, refused, sets, start


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


def photographs(folder: Path) -> Path:
    folder.mkdir()
    for number in range(42):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def started(*arguments: object, **changed: str) -> Done:
    done = subprocess.run(
        command(*arguments), env={**environment(), **changed}, capture_output=True, text=True
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_names_that_are_not_utf8(snscc: Snscc, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    photos, out = photographs(tmp_path / name), tmp_path / f"run {name}"
    asked = ("run", "images", "--data", photos, "--out", out, *sets(*PHOTOS))
    for words in (asked, ("report", out), ("predict", out, photos, "-o", tmp_path / f"{name}.csv")):
        done = snscc(*words)
        assert done.status == 0, done.err
        assert "caf\\udce9" in done.out
    assert "caf\\udce9" in (out / "report.html").read_text()
    assert list((out / "tensorboard").rglob("events*")) and (out / "metrics.jsonl").exists()
    assert snscc("pack", photos, tmp_path / f"shards {name}").status == 0


def test_a_console_that_is_not_utf8(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    (photos / "😀.png").write_text("half")
    asked = ("run", "images", "--data", photos, "--out", tmp_path / "run", *sets(*PHOTOS))
    done = started(*asked, "--set", "data.skip_corrupt=true", PYTHONIOENCODING="ascii")
    assert done.status == 0, done.err
    assert "left out \\U0001f600.png" in done.out
    assert started("--help", PYTHONIOENCODING="ascii").status == 0


def test_a_reader_that_has_gone() -> None:
    shell = " ".join(command("recipes", "digits")) + " | true; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", shell], env=environment(), capture_output=True, text=True)
    assert done.returncode in (0, 1, 128 + signal.SIGPIPE) and not done.stderr


def test_no_home_and_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(UserError, match="the home folder is unknown"):
        expanded("~/photos")
    options.ready_for_ray()
    assert getpass.getuser() == str(os.getuid())
    assert Path.home().is_relative_to(tempfile.gettempdir())
    shutil.rmtree(Path.home())


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs another user")
def test_a_sweep_without_a_home_and_a_name(tmp_path: Path) -> None:
    """By a user that is known by a number alone, as in a container."""
    nobody = ["unshare", "-U", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*nobody, "true"], capture_output=True).returncode:
        pytest.skip("a user of one process's own is not permitted")
    out = tmp_path / "sweep"
    few = sets(*TINY, "pretrain.epochs=1", "train.epochs=1", "boost.epochs=1")
    asked = command("sweep", "gamma", "--seeds", 1, "--samples", 1, "--out", out, *few)
    unset = ["env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME"]
    with own_ray() as ray:
        done = ray.start(*unset, *nobody, *asked).wait()
        assert (out / "results.csv").exists() and done.err == "", done.said()


def test_nothing_is_written_among_the_images(snscc: Snscc, tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    for words in (
        ("run", "images", "--data", photos, "--out", photos, "--overwrite"),
        ("fit", photos, "--out", f"{photos}/../photos/", "--overwrite"),
        ("compare", "images", "--data", photos, "--out", photos),
    ):
        refused(snscc(*words), "is the folder of the images")
    assert len(list(photos.iterdir())) == 42
    out = tmp_path / "run"
    done = snscc("run", "images", "--data", photos, "--out", out, *sets(*PHOTOS))
    assert done.status == 0
    among = snscc("predict", out, photos, "-o", photos / "new.parquet")
    refused(among, "is the folder of the images")
    (tmp_path / "file").write_text("")
    refused(snscc("predict", out, photos, "-o", tmp_path / "file" / "new.csv"), "is a file")
    refused(snscc("export", out, "--torch", tmp_path / "file" / "model.pt2"), "is a file")


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("unshare"), reason="root may write")
def test_what_may_not_be_written_is_found_first(tmp_path: Path) -> None:
    photos, out = photographs(tmp_path / "photos"), tmp_path / "run"
    done = started("run", "images", "--data", photos, "--out", out, *sets(*PHOTOS))
    assert done.status == 0, done.err
    (photos / "broken.png").write_text("half")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    other = ["unshare", "-U", "--map-user=12345", "--map-group=12345"] * (os.getuid() == 0)
    asked = [*other, *command("predict", out, photos, "-o", locked / "new.csv")]
    found = subprocess.run(asked, env=environment(), capture_output=True, text=True)
    assert found.returncode == 2 and "left out" not in found.stdout
    assert f"{locked} is not writable" in found.stderr


def test_the_estimator_names_what_it_has(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    (photos / "broken.png").write_text("half")
    with pytest.raises(ValueError, match="does not exist: give an existing folder") as absent:
        SNSCC(2).fit(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"repair or remove it$") as broken:
        SNSCC(2).fit(sorted(str(path) for path in photos.iterdir()))
    with pytest.raises(ValueError, match=r"settings=\['train.batch_size=") as large:
        settings = [s for s in PHOTOS if not s.startswith("data.")]
        SNSCC(2, recipe="images", settings=[*settings, "train.batch_size=4096"]).fit(
            [str(photos / f"{number:02}.png") for number in range(42)]
        )
    for error in (absent, broken, large):
        assert "--" not in str(error.value)


def test_export_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    photos, out = photographs(tmp_path / "photos"), tmp_path / "run"
    done = start("run", "images", "--data", photos, "--out", out, *sets(*PHOTOS))
    assert done.status == 0, done.err
    full = start("export", out, "--torch", tmp_path / "model.pt2", file_limit=20_000)
    refused(full, "no space left", "--torch")
    assert not (tmp_path / "model.pt2").exists()


def test_a_closed_stdout_is_no_failure(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    words = " ".join(map(str, command("pack", photos, tmp_path / "shards", "--jobs", "1")))
    done = subprocess.run(f"{words} >&-", shell=True, env=environment(), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list((tmp_path / "shards").glob("*.parquet"))


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = " ".join(map(str, command("predict", "run", "photos")))
    done = subprocess.run(
        f"rmdir {gone}; {words}",
        shell=True, cwd=gone, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "snscc: the current folder no longer exists; change to one that does\n"


def test_who_reads_has_gone(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    (photos / "half.png").write_text("half")
    read, write = os.pipe()
    os.close(read)
    words = command("pack", photos, tmp_path / "shards", "--skip-corrupt", "--jobs", "1")
    done = subprocess.run(words, env=environment(), stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_disk_that_fills_under_tensorboard_is_told_once(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from snscc_ray.runs.monitor import write_hyperparameters\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "try: write_hyperparameters(Path(sys.argv[1]), {'a': 'b' * 999}, {'c': 1.0})\n"
        "except OSError as error: print(error.strerror)"
    )
    asked = [sys.executable, "-c", code, tmp_path / "events"]
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "File too large" and not done.stderr, done
