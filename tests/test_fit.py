"""`snscc fit`, as a person uses it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.kinds import make
from snscc_ray.cli import options
from snscc_ray.config.errors import UserError
from snscc_ray.fit.count import estimate, expected_seconds
from tests.conftest import digits_table
from tests.test_cli import Snscc, content, refused
from tests.test_predict import images

QUICK = ["--set", "pretrain.epochs=2", "--set", "train.epochs=2", "--set", "boost.epochs=1"]
ROWS = 150


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, one of them broken."""
    folder = images(tmp_path_factory.mktemp("fit") / "scans", digits_table(ROWS))
    (folder / "torn.png").write_bytes(b"\x89PNG torn")
    return folder


def held(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_a_folder_becomes_clusters_and_a_report(scans: Path, snscc: Snscc, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = snscc("fit", scans, "--clusters", 4, "--out", out, *QUICK)
    assert done.status == 0, done.err
    for said in ("image size: 8 px", "encoder: convnet", "left out torn.png", "report"):
        assert said in done.out, said
    assert re.search(r"with the report about \d+\.\d minutes from now", done.out)
    assert re.search(r"It took \d+\.\d minutes \(predicted: \d+\.\d\)\.\s+Which images", done.out)
    found = pq.read_table(out / "assignments.parquet")
    assert found.num_rows == ROWS and set(found["cluster"].to_pylist()) <= set(range(4))
    assert "label" not in found.column_names
    assert {pick["what"] for pick in held(out, "fit.json")["picked"]} > {"encoder", "epochs"}
    page = (out / "report.html").read_text()
    assert "torn.png" in page and "width 24" in page
    again = snscc("fit", scans, "--clusters", 4, "--out", out, *QUICK)
    assert again.status == 0 and "is finished" in again.out
    assert pq.read_table(out / "assignments.parquet").equals(found)
    # As after `snscc sort --move`, until it is undone.
    undo = tmp_path / "undo"
    undo.touch()
    (out / "moved.json").write_text(json.dumps({"into": "/sorted", "undo": str(undo)}))
    refused(snscc("fit", scans, "--clusters", 4, "--out", out, *QUICK), "snscc sort --undo /sorted")
    undo.unlink()
    assert snscc("fit", scans, "--clusters", 4, "--out", out, *QUICK).status == 0


def test_a_script_gets_one_object_or_only_the_end(
    scans: Path, snscc: Snscc, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ("fit", scans, "--clusters", 4, "--out", out, *QUICK)
    done = snscc(*words, "--json")
    assert done.status == 0, done
    found = json.loads(done.out)
    page = held(out, "report.json")
    assert found == {
        "run": str(out), "images": ROWS, "left_out": 1, "notes": page["summary"]["notes"],
        "clusters": 4, "names": [f"cluster {number}" for number in range(4)], "measured": None,
        "verdict": page["trust"]["verdict"],
        "assignments": str(out / "assignments.parquet"), "report": str(out / "report.html"),
    }  # fmt: skip
    assert "image size: 8 px" in done.err and "left out torn.png" in done.err
    silent = snscc(*words, "--json", "--quiet")
    assert json.loads(silent.out) == found and silent.err == ""
    # As a person reads it: the end, of the same run.
    end = snscc(*words, "--quiet")
    assert end.status == 0 and end.err == ""
    groups, sure, first, *_ = end.out.strip().splitlines()
    sizes = [line["size"] for line in page["clusters"] if line["size"]]
    assert groups == (
        f"Groups: {len(sizes)}, of {min(sizes)} to {max(sizes)} each; {ROWS} in all (1 left out)."
    )
    assert sure.startswith(f"How sure: {found['verdict']}. ") and first.startswith("Look first at:")
    assert "image size" not in end.out and f"Report: {out / 'report.html'}" in end.out
    # What goes wrong is told as ever, and the next command is not silent.
    refused(snscc(*words, "--quiet", "--json", "--set", "train.epoch=3"), "train.epoch")
    assert "torch" in snscc("doctor").out


def test_the_number_of_clusters_is_estimated(scans: Path, snscc: Snscc, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = snscc("fit", scans, "--out", out, *QUICK)
    assert done.status == 0, done.err
    counted = held(out, "clusters.json")
    assert counted["chosen"] == held(out, "recipe.json")["recipe"]["data"]["num_clusters"]
    assert counted["why"] in done.out.replace("\n", " ")
    pretrain = held(out, "metrics.json")["stages"]["pretrain"]
    assert pretrain["health/clusters_in_use"] <= counted["chosen"]
    assert len(held(out, "pretrain/stage.json")["figures"]) == len(pretrain)
    if counted["chosen"] != 10:  # the figures are of the number found, not of the provisional one
        before = snscc("fit", scans, "--clusters", 10, "--out", tmp_path / "ten", *QUICK)
        assert before.status == 0
        ten = held(tmp_path / "ten", "metrics.json")["stages"]["pretrain"]
        assert ten["health/score"] != pretrain["health/score"]


@pytest.mark.parametrize(
    "stop", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_stopped_fit_goes_on(scans: Path, snscc: Snscc, tmp_path: Path, stop: int) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    settings = ["--set", "pretrain.epochs=30", *QUICK[2:], "--set", "runtime.checkpoint_steps=1"]
    words = ["fit", str(scans), "--out", str(out), *settings]
    command = [sys.executable, "-m", "snscc_ray", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not (out / "pretrain" / "latest.pt").exists() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert not (out / "clusters.json").exists()
    if stop == signal.SIGTERM:
        assert process.returncode == 130 and "run the same command again" in said
    refused(snscc("run", "--resume", "--out", out), "begun by `snscc fit`")
    refused(snscc(*words, "--clusters", 3), "other options (--clusters was", "3 here")
    # As when it is stopped while the clusters are counted: Pretrain has written its figures.
    (out / "metrics.json").write_text("{}")
    again = snscc(*words)
    assert again.status == 0 and f"continuing the run in {out}" in again.out
    assert snscc("fit", scans, "--out", whole, *settings).status == 0
    one, two = (pq.read_table(place / "assignments.parquet") for place in (out, whole))
    assert one.equals(two)


def test_a_new_encoder_of_a_named_kind(scans: Path, snscc: Snscc, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wanted = ["--clusters", 4, "--encoder", "convnet", "--from-scratch"]
    assert snscc("fit", scans, *wanted, "--out", out, *QUICK).status == 0
    encoder = held(out, "recipe.json")["recipe"]["encoder"]
    assert encoder["name"] == "convnet" and not encoder["frozen"] and not encoder["weights"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--clusters", "1"], ["--clusters 1", "2 or more"]),
        (["--clusters", "many"], ["--clusters many", "auto"]),
        (["--clusters", "200"], ["--clusters 200", "of the 151", "at most 75"]),
        (["--clusters", "76"], ["--clusters 76", "at most 75"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--encoder", "resnet19"], ["resnet19", "resnet18"]),
        (["--max-cluster-imbalance", "0.5"], ["imbalance", "1"]),
        (["--budget", "soon"], ["--budget soon", "25m"]),
        (["--set", "train.epoch=3"], ["train.epoch"]),
        (["--labels"], ["is not in a sub-folder"]),
        (["--labels", "--labels-deepest"], ["exclude each other"]),
    ],
)
def test_mistakes_are_one_line(
    scans: Path, snscc: Snscc, tmp_path: Path, words: list[str], says: list[str]
) -> None:
    refused(snscc("fit", scans, "--out", tmp_path / "run", *words), *says)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ how many


@pytest.mark.parametrize("kinds", [2, 3, 7, 15])
def test_groups_that_are_apart_are_counted(kinds: int) -> None:
    drawing = torch.Generator().manual_seed(kinds)
    centres = torch.nn.functional.normalize(torch.randn(kinds, 32, generator=drawing), dim=1)
    rows = centres.repeat_interleave(40, 0) + 0.07 * torch.randn(40 * kinds, 32, generator=drawing)
    found = estimate(torch.nn.functional.normalize(rows, dim=1), seed=0)
    assert found.chosen == kinds
    assert found.runner_up != kinds and found.runner_up in found.tried
    assert all(len(values) == len(found.tried) for values in found.criteria.values())
    again = estimate(torch.nn.functional.normalize(rows, dim=1), seed=0)
    assert again == found


def test_few_rows_and_equal_rows_are_counted_without_a_fall() -> None:
    assert estimate(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), 0).chosen in (
        2,
        3,
    )
    assert expected_seconds(20, 4) > 0
    two = torch.nn.functional.one_hot(torch.arange(60) % 2, 4).float()
    assert estimate(two, 0).chosen == 2
    with pytest.raises(UserError, match="look the same to the network"):
        estimate(torch.ones(60, 4), 0)


@pytest.mark.slow
def test_seven_kinds_of_pictures_are_found(snscc: Snscc, tmp_path: Path) -> None:
    """From files to clusters without an option; a label is only looked at here, at the end."""
    place = make(tmp_path / "kinds", kinds=7, each=90, seed=7)
    done = snscc("fit", place, "--labels", "--out", tmp_path / "run")
    assert done.status == 0, done.err
    assert abs(held(tmp_path / "run", "clusters.json")["chosen"] - 7) <= 1
    assert held(tmp_path / "run", "metrics.json")["stages"]["boost"]["oracle/acc"] > 0.85


# ------------------------------------------------------------------------- what folders hold


def mixed(folder: Path, count: int) -> set[str]:
    """Images of every kind, sizes and depths mixed, and the names of the hundredth that is torn."""
    drawing = np.random.default_rng(0)
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}), ("PNG", "P", {}), ("WEBP", "RGB", {}), ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}), ("JPEG", "RGB", {"turned": 6}), ("TIFF", "L", {}),
    ]  # fmt: skip
    torn = set()
    for number in range(count):
        kind, mode, more = kinds[number % len(kinds)]
        wide, high = drawing.integers(20, 60, 2)
        pixels = drawing.integers(0, 256, (high, wide, 3)).astype(np.uint8)
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        elif mode != "RGB":
            image = image.convert(mode)
        name = f"{'deep/er/' * (number % 3)}{number:04}.{kind.lower()}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if more:
            exif[0x0112] = more["turned"]
        image.save(path, kind, **({"exif": exif} if more else {}))
        if number % 100 == 50:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            torn.add(name)
    return torn


def test_no_image_of_a_mixed_folder_is_lost_in_silence(snscc: Snscc, tmp_path: Path) -> None:
    torn = mixed(tmp_path / "mixed", 220)
    out = tmp_path / "run"
    done = snscc(
        "fit", tmp_path / "mixed", "--clusters", 3, "--image-size", 16, "--out", out, *QUICK
    )
    assert done.status == 0, done.err
    assert "RGB" in done.out and f"Left out: {len(torn)} unreadable images, named" in done.out
    found = set(pq.read_table(out / "assignments.parquet")["id"].to_pylist())
    there = {
        p.relative_to(tmp_path / "mixed").as_posix() for p in (tmp_path / "mixed").rglob("*.*")
    }
    assert found == there - torn and len(torn) == 2
    page = (out / "report.html").read_text()
    assert all(name in page for name in torn)


@pytest.mark.slow
def test_uneven_digits(snscc: Snscc, tmp_path: Path) -> None:
    """Ten classes of 174 down to 17: told of where sizes are taken to be equal, found where not."""
    table = digits_table(1797)
    labels = table["label"].to_numpy()
    sizes = np.round(174 * 0.1 ** (np.arange(10) / 9)).astype(int)
    rows = np.concatenate([np.flatnonzero(labels == c)[:n] for c, n in enumerate(sizes)])
    (tmp_path / "uneven").mkdir()
    pq.write_table(table.take(np.sort(rows)), tmp_path / "uneven" / "a.parquet")
    words = ["fit", tmp_path / "uneven", "--clusters", 10]
    even = snscc(*words, "--out", tmp_path / "even")
    assert even.status == 0 and "forced-balance" in even.out
    free = snscc(*words, "--max-cluster-imbalance", 10, "--out", tmp_path / "free")
    assert free.status == 0 and "forced-balance" not in free.out
    acc = [
        held(tmp_path / run, "metrics.json")["stages"]["boost"]["oracle/acc"]
        for run in ("even", "free")
    ]
    # .66 and .84 here; .84 to .94 with, .60 to .68 without, by seed and order (docs/log.md).
    assert acc[1] >= 0.75 and acc[1] > acc[0] + 0.1


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_go_on_with_other_images(
    finished: bool, scans: Path, snscc: Snscc, tmp_path: Path
) -> None:
    own, out = tmp_path / "scans", tmp_path / "run"
    shutil.copytree(scans, own)
    asked = ("fit", own, "--clusters", 4, "--out", out, *QUICK)
    assert snscc(*asked).status == 0
    if not finished:  # as a kill leaves it
        for name in ("metrics.json", "report.html", "boost/stage.json", "assignments.parquet"):
            (out / name).unlink()
    before = content(out)
    for gone in list(own.glob("00?.png"))[:7]:
        gone.rename(tmp_path / gone.name)
    shutil.copy(own / "100.png", own / "another.png")
    refused(snscc(*asked), "1 came and 7 went", f"{ROWS:,} then", "--overwrite", "--out")
    assert content(out) == before
    (own / "another.png").unlink()
    for back in tmp_path.glob("00?.png"):
        back.rename(own / back.name)
    assert snscc(*asked).status == 0
    (own / "000.png").write_bytes((own / "001.png").read_bytes())
    refused(snscc(*asked), "with the same names")
    assert snscc(*asked, "--overwrite").status == 0
