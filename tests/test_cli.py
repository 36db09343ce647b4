"""The command as a person uses it: what it prints, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import snscc_ray.runs.run
from snscc_ray import cli
from snscc_ray.cli import options
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core import checkpoints
from snscc_ray.runs.folder import read_recipe
from tests.conftest import TINY

# A folder of forty small images.
PHOTOS = (
    "data.num_clusters=3",
    "data.image_size=8",
    "encoder.name=convnet",
    "encoder.width=4",
    "pretrain.epochs=1",
    "pretrain.batch_size=8",
    "pretrain.projection_hidden=16",
    "pretrain.mined_neighbors=10",
    "train.epochs=1",
    "train.batch_size=8",
    "train.num_neighbors=5",
    "train.view.cutout=2",
    "boost.epochs=1",
    "boost.batch_size=8",
    "boost.num_neighbors=5",
    "boost.view.cutout=2",
    "runtime.device=cpu",
)


class Done(NamedTuple):
    status: int
    out: str
    err: str


def sets(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "snscc_ray", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def start(*arguments: object, file_limit: int | None = None) -> Done:
    """A process of its own, able to write files of at most `file_limit` bytes."""

    def shrink() -> None:
        assert file_limit is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(
        command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=None if file_limit is None else shrink,
    )
    return Done(done.returncode, done.stdout, done.stderr)


class Snscc:
    """The command in this process: much faster than another one."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Done:
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.setattr(sys, "argv", ["snscc", *map(str, arguments)])
            cli.main()
        written = self.capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Done(exit.value.code, written.out, written.err)


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(done: Done, *says: str, status: int = 2) -> None:
    """One line on stderr that holds all of `says`."""
    assert done.status == status, done
    assert done.err.startswith("snscc: ") and done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err + done.out
    for words in says:
        assert words in done.err, done.err


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "finished"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["snscc", "run", "digits", *sets(*TINY), "--out", str(folder)])
        cli.main()
    assert exit.value.code == 0
    return folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A finished run of the tiny digits that a test may spoil."""
    return Path(shutil.copytree(finished_once, tmp_path / "finished"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(40):
        colour = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]][number % 3])
        pixels = (colour + draw.integers(-30, 30, (8, 8, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


# ------------------------------------------------------------------------------ what it says


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        ([], "snscc run digits"),
        (["run"], "snscc run cifar10 --data ~/cifar"),
        (["recipes"], "snscc recipes cifar10"),
        (["doctor"], "snscc doctor"),
    ],
)
def test_help_shows_examples(arguments: list[str], example: str, snscc: Snscc) -> None:
    done = snscc(*arguments, "--help")
    assert (done.status, done.err) == (0, "")
    assert "Examples:" in done.out or "Example:" in done.out
    assert example in done.out


def test_without_arguments_it_helps(snscc: Snscc) -> None:
    done = snscc()
    assert (done.status, done.err) == (0, "")
    assert all(word in done.out for word in ("Usage", "run", "recipes", "doctor"))


def test_recipes_are_listed_and_printed(snscc: Snscc) -> None:
    done = snscc("recipes")
    assert done.status == 0
    assert all(name in done.out for name in recipes.RECIPES)
    done = snscc("recipes", "cifar10")
    assert done.status == 0
    assert Recipe.model_validate_json(done.out) == recipes.get("cifar10")


def test_doctor_names_what_a_run_would_use(snscc: Snscc) -> None:
    done = snscc("doctor")
    assert (done.status, done.err) == (0, "")
    for what in ("torch", "ray", "faiss", "memory", "a run would use", torch.__version__):
        assert what in done.out


# ------------------------------------------------------------------------------------- runs

COLUMNS = ["id", "cluster", "confidence", "second", "second_confidence"]  # of assignments.parquet


def test_a_run_leaves_its_table_and_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "r[red]"  # no markup of the terminal library
    done = start("run", "digits", *sets(*TINY), "--out", folder)
    assert done.status == 0, done.err
    for words in ("k-means on pixels", "Pretrain", "Train", "Boost", "ACC", "NMI", "ARI"):
        assert words in done.out
    assert f"Run folder: {folder}" in done.out
    files = {path for path in content(folder) if "tfevents" not in path}
    assert files - {"images.parquet"} == {
        "recipe.json", "metrics.json", "metrics.jsonl", "baselines.json", "assignments.parquet",
        "pretrain", "pretrain/final.pt", "pretrain/stage.json", "pretrain/neighbors.parquet",
        "train", "train/final.pt", "train/stage.json", "boost", "boost/final.pt",
        "boost/stage.json", "tensorboard", "tensorboard/pretrain", "tensorboard/train",
        "tensorboard/boost",
    }  # fmt: skip
    tiny = override(recipes.get("digits"), TINY)
    assert read_recipe(folder) == tiny
    mined = pq.read_table(folder / "pretrain" / "neighbors.parquet")
    assert mined.column_names == ["row", "neighbors", "distances", "confidence"]
    assert mined.num_rows == 200
    assert len(mined["neighbors"][0]) == tiny.pretrain.mined_neighbors
    table = pq.read_table(folder / "assignments.parquet")
    assert table.column_names == [*COLUMNS, "label"]
    assert table.num_rows == 200 and set(table["cluster"].to_pylist()) <= set(range(10))
    assert table["id"][7].as_py() == "digits/0007"
    figures = json.loads((folder / "metrics.json").read_text())
    assert (figures["recipe"], figures["seed"]) == ("digits", 0)
    assert list(figures["stages"]) == list(STAGES)
    for stage, row in figures["stages"].items():
        assert {"oracle/acc", "oracle/nmi", "oracle/ari", "health/score", "seconds"} <= set(row)
        assert json.loads((folder / stage / "stage.json").read_text())["figures"] == row
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [(line["stage"], line["epoch"]) for line in lines if "warning" not in line]
    assert epochs == [(stage, epoch) for stage in STAGES for epoch in range(3)]


def test_a_folder_without_labels_runs_the_same(snscc: Snscc, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    done = snscc("run", "images", "--data", photos, *sets(*PHOTOS), "--out", folder)
    assert done.status == 0, done.err
    figures = json.loads((folder / "metrics.json").read_text())
    assert list(figures["stages"]) == list(STAGES) and figures["baselines"] == {}
    assert all("health/score" in row for row in figures["stages"].values())
    for name in ("metrics.json", "metrics.jsonl"):
        assert "oracle/" not in (folder / name).read_text()
    table = pq.read_table(folder / "assignments.parquet")
    assert table.column_names == COLUMNS
    assert table["id"].to_pylist() == [f"{number:02d}.png" for number in range(40)]


def test_stage_by_stage_is_the_run_at_once(
    snscc: Snscc, finished_once: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    tiny = ["digits", *sets(*TINY)]
    assert snscc("run", *tiny, "--out", folder, "--stages", "pretrain").status == 0
    assert not (folder / "train").exists()
    done = snscc("run", *tiny, "--out", folder, "--stages", "train", "--resume")
    assert done.status == 0, done.err
    assert not (folder / "boost").exists()
    before = (folder / "train" / "final.pt").stat().st_mtime_ns
    done = snscc("run", "--resume", "--out", folder)
    assert done.status == 0, done.err
    assert (folder / "train" / "final.pt").stat().st_mtime_ns == before
    assert list(json.loads((folder / "metrics.json").read_text())["stages"]) == list(STAGES)
    whole = (finished_once / "assignments.parquet").read_bytes()
    assert (folder / "assignments.parquet").read_bytes() == whole


def test_the_seed_decides(snscc: Snscc, finished_once: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        out = ["--out", tmp_path / str(seed)]
        assert snscc("run", "digits", *sets(*TINY), "--seed", seed, *out).status == 0
    first = (finished_once / "assignments.parquet").read_bytes()
    assert (tmp_path / "0" / "assignments.parquet").read_bytes() == first
    assert (tmp_path / "1" / "assignments.parquet").read_bytes() != first


def test_a_finished_run_resumed_is_shown_again(snscc: Snscc, finished: Path) -> None:
    before = content(finished)
    done = snscc("run", "--resume", "--out", finished)
    assert done.status == 0 and "Boost" in done.out
    after = content(finished)
    assert {n for n in before if after.get(n) != before[n] and "tfevents" not in n} == set()


# ------------------------------------------------------------------------ stops and full disks

LONG = [setting for setting in TINY if "checkpoint_seconds" not in setting] + [
    "pretrain.epochs=15", "train.epochs=15", "runtime.checkpoint_seconds=1000",
]  # fmt: skip


def stopped_run(folder: Path, number: signal.Signals, stage: str) -> Done:
    """A run that gets a signal once it has trained an epoch of the stage."""
    arguments = command("run", "digits", *sets(*LONG), "--out", folder)
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = folder / "metrics.jsonl"
    while process.poll() is None:
        if lines.exists() and f'"stage": "{stage}"' in lines.read_text():
            process.send_signal(number)
            break
        time.sleep(0.01)
    out, err = process.communicate()
    return Done(process.returncode, out, err)


def test_a_terminated_run_says_how_to_go_on(snscc: Snscc, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    done = stopped_run(folder, signal.SIGTERM, "pretrain")
    refused(done, f"snscc run --resume --out '{folder}'", status=130)
    assert not (folder / "pretrain" / "final.pt").exists()
    done = snscc("run", "--resume", "--out", folder, "--stages", "pretrain")
    assert done.status == 0, done.err
    assert (folder / "pretrain" / "final.pt").exists()


def test_an_interrupt_then_a_full_disk_then_the_end(snscc: Snscc, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    done = stopped_run(folder, signal.SIGINT, "train")
    refused(done, f"snscc run --resume --out {folder}", status=130)
    latest = folder / "train" / "latest.pt"
    saved = latest.read_bytes()
    limit = len(saved) - 1
    others = [path for path in folder.rglob("*") if path.is_file() and path != latest]
    assert max(path.stat().st_size for path in others if "tfevents" not in path.name) < limit
    # The next checkpoint, at the latest at the end of the stage, does not fit.
    resume = ["run", "--resume", "--out", folder]
    done = start(*resume, *sets("runtime.checkpoint_seconds=0"), file_limit=limit)
    refused(done, "no space left", "--resume")
    assert latest.read_bytes() == saved
    assert checkpoints.load(latest)["epoch"] >= 1
    assert not [path for path in folder.rglob(".*")]
    done = snscc(*resume)
    assert done.status == 0, done.err
    assert list(json.loads((folder / "metrics.json").read_text())["stages"]) == list(STAGES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_the_loops_also_says_how_to_go_on(
    number: signal.Signals, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = signal.getsignal(number)

    def stop(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)  # the signal comes first

    monkeypatch.setattr(snscc_ray.runs.run, "Pretrain", stop)
    folder = tmp_path / "r"
    done = snscc("run", "digits", *sets(*TINY), "--out", folder)
    refused(done, f"stopped; continue with: snscc run --resume --out {folder}", status=130)
    assert signal.getsignal(number) == former


def test_what_a_kill_in_mid_write_left_is_removed(snscc: Snscc, finished: Path) -> None:
    left = finished / "boost" / ".latest.pt.ab_12xyz"
    left.write_bytes(b"half of it")
    (finished / ".mine").write_text("kept")
    assert snscc("run", "--resume", "--out", finished).status == 0
    assert not left.exists()
    assert (finished / ".mine").read_text() == "kept"


# --------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cifar"], ["unknown recipe 'cifar'", "did you mean cifar20?"]),
        (["xyzzy"], ["unknown recipe 'xyzzy'", "digits, cifar10"]),
        ([], ["name a recipe", "snscc recipes", "--resume --out"]),
        (["digits", "--set", "train.epoch=3"], ["'train.epoch'", "did you mean train.epochs?"]),
        (["digits", "--set", "train.epochs"], ["write FIELD=VALUE"]),
        (["digits", "--set", "train.num_neighbors=0"], ["train.num_neighbors=0", "equal to 1"]),
        (["digits", "--set", "boost.top_fraction=2"], ["boost.top_fraction=2", "equal to 1"]),
        (["digits", "--set", "train.epochs=many"], ['train.epochs="many"', "integer"]),
        (["digits", "--set", "precision=float8"], ["precision", "'float32' or 'bfloat16'"]),
        (["digits", "--seed", "abc"], ["--seed", "integer"]),
        (["digits", "--seed", "-1"], ["seed=-1", "equal to 0"]),
        (["digits", "--sead", "1"], ["--sead", "--help"]),
        (["digits", "cifar10"], ["cifar10", "--help"]),
        (["digits", "--stages", "nonsense"], ["'nonsense'", "pretrain, train, boost"]),
        (["digits", "--stages", ""], ["--stages", "pretrain, train, boost"]),
        (["digits", "--stages", "boost"], ["boost needs a finished train", "add train"]),
        (["digits", "--stages", "pretrain,boost"], ["boost needs a finished train", "add train"]),
        (["digits", "--stages", "train"], ["train needs a finished pretrain", "add pretrain"]),
        (["digits", "--resume"], ["holds no run", "leave --resume out"]),
        (["digits", "--resume", "--overwrite"], ["--resume", "--overwrite", "one of them"]),
        (["digits", "--set", "data.limit=9"], ["data.num_clusters=10", "the 9 images there are"]),
        (["digits", "--set", "data.limit=40"], ["=256", "40 images", "batch_size=10"]),
        (
            ["digits", *sets("data.limit=300", "train.num_neighbors=300",
                             "pretrain.mined_neighbors=300")],
            ["mined_neighbors=300", "300 images"],
        ),
        (["digits", *sets("data.limit=300", "boost.num_neighbors=300")], ["boost.num_neighbors"]),
        (["images"], ["--data PATH"]),
        (["images", "--data", "absent"], ["absent does not exist", "existing folder"]),
        (["cifar10"], ["--data PATH"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_changes_nothing(
    arguments: list[str],
    says: list[str],
    snscc: Snscc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(snscc("run", *arguments, "--out", tmp_path / "r"), *says)
    assert content(tmp_path) == {}


def test_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    refused(start("run", "digits", "--stages", "boost", "--out", tmp_path / "r"), "add train")
    assert content(tmp_path) == {}


def test_resume_without_a_name_or_a_run(snscc: Snscc, tmp_path: Path) -> None:
    refused(snscc("run", "--resume", "--out", tmp_path / "r"), "there is no folder")
    refused(snscc("run", "--resume"), "name a recipe")
    refused(snscc("recipes", "digit"), "did you mean digits?")
    refused(snscc("frobnicate"), "frobnicate")
    assert content(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(snscc: Snscc, tmp_path: Path) -> None:
    done = snscc("run", "digits", "--set", "runtime.device=cuda", "--out", tmp_path / "r")
    refused(done, "torch sees no GPU here", "use cpu (--device, or runtime.device")
    assert content(tmp_path) == {}


def test_bad_data_is_refused(snscc: Snscc, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()

    def run(*arguments: object) -> Done:
        before = content(tmp_path)
        done = snscc("run", "images", "--data", data, *arguments, "--out", tmp_path / "r")
        assert content(tmp_path) == before
        return done

    refused(run(), str(data), "another folder")
    refused(run(*sets("data.source=folder")), str(data), "no images")
    (data / "readme.txt").write_text("no image")
    refused(run(), str(data))
    pq.write_table(pa.table({"picture": [b"x"]}), data / "a.parquet")
    refused(run(), "a.parquet", "no column `image`", "picture")
    (data / "a.parquet").write_bytes(b"PAR1 and no more")
    refused(run(), "a.parquet", "cannot be read as Parquet")


def test_one_corrupt_image_is_named_or_counted(snscc: Snscc, photos: Path, tmp_path: Path) -> None:
    # A name that looks like markup of the terminal library must be shown as it is.
    bad = photos / "2[red]0.png"
    bad.write_bytes((photos / "20.png").read_bytes()[:60])
    folder = tmp_path / "r"
    run = ["run", "images", "--data", photos, *sets(*PHOTOS), "--out", folder]
    run += ["--stages", "pretrain"]
    refused(snscc(*run), repr(bad.name), "corrupt", "data.skip_corrupt=true")
    assert not folder.exists()
    done = snscc(*run, "--set", "data.skip_corrupt=true")
    assert done.status == 0, done.err
    assert f"left out {bad.name}: " in done.out
    assert "Left out: 1 unreadable image." in done.out
    figures = json.loads((folder / "metrics.json").read_text())
    assert (figures["rows"], figures["skipped"]) == (40, 1)


def unchanged(snscc: Snscc, folder: Path, *arguments: object) -> Done:
    before = content(folder)
    done = snscc("run", *arguments, "--out", folder)
    assert content(folder) == before
    return done


def test_an_occupied_folder_is_refused(snscc: Snscc, finished: Path, tmp_path: Path) -> None:
    tiny = ["digits", *sets(*TINY)]
    says = "--resume to continue it, --overwrite to replace it"
    refused(unchanged(snscc, finished, *tiny), "a finished run", says)
    (finished / "metrics.json").unlink()
    refused(unchanged(snscc, finished, *tiny), "an unfinished run", says)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "note.txt").write_text("mine")
    refused(unchanged(snscc, foreign, *tiny), "holds other files, but no run", "another --out")
    refused(unchanged(snscc, foreign, *tiny, "--resume"), "holds no run")
    for out in (foreign / "note.txt", foreign / "note.txt" / "below"):
        for more in ([], ["--overwrite"], ["--resume"]):
            done = snscc("run", *tiny, *more, "--out", out)
            refused(done, f"{foreign / 'note.txt'} is a file", "another")
    assert (foreign / "note.txt").read_text() == "mine"


def test_overwrite_replaces_the_run_and_nothing_else(snscc: Snscc, finished: Path) -> None:
    mine = ["note.txt", "train/cat.png", "tensorboard/other/note.txt", ".hidden"]
    for name in mine:
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).write_text(name)
    before = content(finished)
    tiny = ["digits", *sets(*TINY), "--overwrite"]
    # Without pretrain in --stages there would be nothing left to train from: refused first.
    refused(unchanged(snscc, finished, *tiny, "--stages", "train"), "add pretrain to --stages")
    refused(unchanged(snscc, finished, *tiny, "--set", "data.limit=9"), "the 9 images there are")
    done = snscc("run", *tiny, "--seed", 5, "--stages", "pretrain", "--out", finished)
    assert done.status == 0, done.err
    after = content(finished)
    assert [after[name] for name in mine] == [before[name] for name in mine]
    assert read_recipe(finished).seed == 5
    gone = {"train/final.pt", "train/stage.json", "boost", "assignments.parquet"}
    assert gone <= before.keys() and not gone & after.keys()
    events = {n for n in before if "tfevents" in n} & after.keys()
    assert not events
    assert list(json.loads((finished / "metrics.json").read_text())["stages"]) == ["pretrain"]


def test_resume_refuses_another_recipe(snscc: Snscc, finished: Path) -> None:
    done = unchanged(snscc, finished, "digits", *sets(*TINY), "--resume", "--seed", 3)
    refused(done, "made with another recipe", "seed is 0 there and 3 here", "--overwrite")
    done = unchanged(snscc, finished, "cifar10", "--resume")
    refused(done, "made with another recipe")
    done = unchanged(snscc, finished, "--resume", *sets("train.epochs=7"))
    refused(done, "train.epochs is 3 there and 7 here")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"x"',
        '{"recipe": 3}',
        '{"recipe": {}}',
        '{"recipe": {"name": "digits"}}',
        "é",
    ],
)
def test_an_unreadable_recipe_is_named(text: str, snscc: Snscc, finished: Path) -> None:
    (finished / "recipe.json").write_text(text, encoding="latin-1")
    refused(unchanged(snscc, finished, "--resume"), "recipe.json", "--overwrite")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_a_truncated_checkpoint_is_named_and_the_advice_works(
    share: float, snscc: Snscc, finished: Path
) -> None:
    shutil.rmtree(finished / "boost")
    path = finished / "train" / "final.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
    done = unchanged(snscc, finished, "--resume", "--stages", "boost")
    refused(done, str(path), "damaged or not a checkpoint", "remove it and repeat")
    if share == 0.5:
        path.unlink()
        refused(unchanged(snscc, finished, "--resume", "--stages", "boost"), "add train")
        assert snscc("run", "--resume", "--out", finished).status == 0
        assert path.exists() and (finished / "boost" / "final.pt").exists()


def test_damaged_neighbours_are_named_and_the_advice_works(snscc: Snscc, finished: Path) -> None:
    shutil.rmtree(finished / "boost")
    path = finished / "pretrain" / "neighbors.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    done = unchanged(snscc, finished, "--resume")
    refused(done, str(path), "damaged or not a Parquet file", "remove it")
    path.unlink()
    assert snscc("run", "--resume", "--out", finished).status == 0
    assert path.read_bytes() == whole


def test_a_checkpoint_of_another_architecture_is_named(snscc: Snscc, finished: Path) -> None:
    shutil.rmtree(finished / "boost")
    path = finished / "train" / "final.pt"
    saved: dict[str, Any] = checkpoints.load(path)
    network = {
        name: torch.cat([weight, weight]) if weight.dim() else weight
        for name, weight in saved["network"].items()
    }
    checkpoints.save(path, {**saved, "network": network})
    done = unchanged(snscc, finished, "--resume", "--stages", "boost")
    refused(done, str(path), "another architecture", "there and", "another folder")


def test_settings_of_another_run_do_not_serve_as_parents(
    snscc: Snscc, finished: Path, tmp_path: Path
) -> None:
    """Stages of other settings, copied into a folder, are not taken for finished ones."""
    folder = tmp_path / "r"
    tiny = ["digits", *sets(*TINY), "--seed", 1]
    assert snscc("run", *tiny, "--stages", "pretrain", "--out", folder).status == 0
    shutil.copytree(finished / "train", folder / "train")
    done = unchanged(snscc, folder, "--resume", "--stages", "boost")
    refused(done, "boost needs a finished train stage with these settings")


def test_resume_refuses_other_images(snscc: Snscc, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(42):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    out = tmp_path / "run"
    assert snscc("run", "images", "--data", photos, "--out", out, *sets(*PHOTOS)).status == 0
    (photos / "3.png").unlink()
    before = content(out)
    refused(snscc("run", "--resume", "--out", out), "0 came and 1 went")
    assert content(out) == before
