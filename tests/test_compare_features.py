"""`snscc compare` with a frozen encoder: every method on the same features, computed once."""

from __future__ import annotations

import csv
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from snscc_ray.cli import options
from snscc_ray.compare import comparison as compare
from snscc_ray.compare import rows
from snscc_ray.compare.methods import METHODS, chosen, left_out, load, scan, stages_of
from snscc_ray.compare.methods.features import temi, turtle
from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.config.settings import STAGES
from snscc_ray.core import storage
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.models.encoders import build_encoder
from snscc_ray.models.libraries import DEFAULT, default_is_installed
from snscc_ray.models.pretrained import encoder_settings, start_encoder
from snscc_ray.training.stages import extract
from tests.conftest import TINY
from tests.test_cli import Snscc, refused, sets

ON_FEATURES = ("kmeans", "sc", "ac", "temi", "turtle", "scan", "snscc")
EACH = 50  # images of a kind
FAST = (
    "data.num_clusters=3",
    "data.image_size=32",
    "data.folders_are_labels=true",
    "train.batch_size=50",
    "boost.batch_size=50",  # and Pretrain's stays at 512: a frozen encoder has no use for it
    "train.epochs=30",
    "train.learning_rate=1e-2",
    "encoder.components=8",
    "boost.epochs=2",
    "runtime.device=cpu",
)

pytestmark = pytest.mark.skipif(
    not default_is_installed(), reason=f"{DEFAULT} is not installed, with its weights"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two photographs, and digits in colour."""
    root = tmp_path_factory.mktemp("images") / "photos"
    draw = np.random.default_rng(0)
    kinds = {"temple": load_sample_images().images[0], "flower": load_sample_images().images[1]}
    for kind, photo in kinds.items():
        (root / kind).mkdir(parents=True)
        for number in range(EACH):
            y, x = (int(draw.integers(0, side - 200)) for side in photo.shape[:2])
            crop = Image.fromarray(photo[y : y + 200, x : x + 200])
            crop.resize((40, 40)).save(root / kind / f"{number:02}.png")
    (root / "digit").mkdir()
    for number, digit in enumerate(load_digits().images[:EACH]):
        colour = draw.uniform(5, 15, 3)
        pixels = (digit[..., None] * colour).astype(np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(root / "digit" / f"{number:02}.png")
    return root


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    for module, name, steps in ((temi, "TemiSettings", 100), (turtle, "TurtleSettings", 100)):
        monkeypatch.setattr(module, name, partial(getattr(module, name), steps=steps))
    return Snscc(capsys)


def arguments(photos: Path, folder: Path, *more: str) -> list[str]:
    start = ["compare", "images", "--data", str(photos), "--encoder", DEFAULT]
    return [*start, "--out", str(folder), *sets(*FAST), *more]


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "compare.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def figures(folder: Path) -> dict[str, tuple[str, ...]]:
    """The table without its seconds."""
    return {
        name: tuple(value for key, value in row.items() if key != "seconds")
        for name, row in table(folder).items()
    }


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The features that each method asked for."""
    found = []

    def watched(study: Study) -> Any:
        features = rows.features_of(study)
        found.append(features.rows_ND)
        assert features.spaces_ND[0] is features.rows_ND
        return features

    for module in (temi, turtle):
        monkeypatch.setattr(module, "features_of", watched)
    return found


def test_all_methods_run_on_the_same_features_and_repeat(
    photos: Path,
    tmp_path: Path,
    snscc: Snscc,
    seen: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "one" / "all"
    plain = rows.rows_of

    def watched(study: Study) -> torch.Tensor:
        seen.append(plain(study))
        return seen[-1]

    from snscc_ray.compare import subsample
    from snscc_ray.compare.methods import kmeans

    for module in (kmeans, subsample):
        monkeypatch.setattr(module, "rows_of", watched)
    starts = []

    def watched_start(study: Study) -> Any:
        start = scan_start(study)
        starts.append(rows.pretext_features(start.context, start.network))
        return start

    scan_start = scan.pretext
    monkeypatch.setattr(scan, "pretext", watched_start)
    done = snscc(*arguments(photos, folder))
    assert done.status == 0, done
    assert f"left out, as they do not work on features: {', '.join(left_out())}" in done.out
    found = table(folder)
    assert tuple(found) == ON_FEATURES == tuple(m for m in METHODS if m not in left_out())
    text = (folder / "compare.md").read_text()
    for name, row in found.items():
        title = METHODS[name].on_features
        assert title and title.endswith("on features") and f"| {title} |" in text
        # TURTLE needs more steps; a third would be chance.
        assert title in done.out and float(row["acc"]) > (0.5 if name == "turtle" else 0.8), row
        assert row["clusters"] == "3" and float(row["seconds"]) > 0
        assert row["paper_acc"] == ""
    assert "pixels" not in text and "from scratch" not in text and DEFAULT in text
    assert found["snscc"]["epochs"] == found["scan"]["epochs"] == "30 + 2"

    # One tensor for all, which is also the one that the run itself mined and measured.
    assert len(seen) == 5 and all(tensor is seen[0] for tensor in seen)
    assert len(starts) == 1 and torch.equal(starts[0], seen[0])
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(3 * EACH))
    stages = storage.read_json(folder / "snscc" / "metrics.json")["stages"]
    assert float(found["kmeans"]["acc"]) == stages["pretrain"]["oracle/acc"]
    assert float(found["snscc"]["acc"]) == stages["boost"]["oracle/acc"]

    again = snscc(*arguments(photos, folder))
    assert again.status == 0 and again.out.count("already done") == len(ON_FEATURES)
    assert table(folder) == found

    # Alone, so that it computes the features anew.
    other = tmp_path / "two" / "all"
    assert snscc(*arguments(photos, other)).status == 0
    assert figures(other) == figures(folder)
    banks = [f / "snscc" / "pretrain" / "bank" / "00000.npy" for f in (folder, other)]
    assert banks[0].read_bytes() == banks[1].read_bytes()
    assert not banks[0].samefile(banks[1])


def test_features_are_shared_with_a_run_and_a_comparison_beside_it(
    photos: Path, tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "photos"
    own = ("encoder.frozen=true", "encoder.weights=default", f"encoder.name={DEFAULT}", *FAST)
    done = snscc("run", "images", "--data", str(photos), "--out", str(run), *sets(*own))
    assert done.status == 0, done
    # The folder of a run stands for its recipe.
    done = snscc("compare", str(run), "--methods", "kmeans,snscc")
    assert done.status == 0 and "found in" in done.out, done
    there = tmp_path / "photos-compare"
    one, two = (f / "pretrain" / "bank" / "00000.npy" for f in (run, there / "snscc"))
    assert one.samefile(two)
    held = storage.read_json(run / "metrics.json")["stages"]
    assert float(table(there)["snscc"]["acc"]) == held["boost"]["oracle/acc"]

    call = ("compare", str(run), "--seed", "1", "--methods", "turtle")
    refused(snscc(*call), "seed is 0 there and 1 here")
    third = tmp_path / "seed1"
    assert snscc(*call, "--out", str(third)).status == 0
    assert one.samefile(third / "snscc" / "pretrain" / "bank" / "00000.npy")


@pytest.mark.parametrize("method", ["scan", "snscc"])
def test_a_comparison_that_was_stopped_goes_on_to_the_same_end(
    method: str, photos: Path, tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = f"kmeans,{method},turtle"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert snscc(*arguments(photos, whole, "--methods", names)).status == 0
    original, calls = FeatureBank.take, []

    def stop(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(FeatureBank, "take", stop)
    call = arguments(photos, cut, "--methods", names)
    refused(snscc(*call), "the same command", status=130)
    assert len(calls) >= 40
    monkeypatch.setattr(FeatureBank, "take", original)
    done = snscc(*call)
    assert done.status == 0 and "kmeans: already done" in done.out, done
    here, there = table(cut), table(whole)
    assert [row["acc"] for row in here.values()] == [row["acc"] for row in there.values()]


def test_a_comparison_that_was_stopped_in_the_extraction_goes_on(
    photos: Path, tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = extract.features_of

    def stop(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(extract, "features_of", stop)
    call = arguments(photos, tmp_path / "c", "--methods", "kmeans")
    refused(snscc(*call), "the same command", status=130)
    monkeypatch.setattr(extract, "features_of", original)
    assert snscc(*call).status == 0
    assert float(table(tmp_path / "c")["kmeans"]["acc"]) > 0.8


def test_several_encoders_are_several_spaces(
    photos: Path, tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has the weights of the first, from their file, so that all spaces are one."""
    settings = encoder_settings(DEFAULT)
    start_encoder(settings, encoder := build_encoder(settings, 3))
    torch.save(encoder.state_dict(), weights := tmp_path / "weights.pth")
    spaces: list[Any] = []
    plain = turtle.features_of

    def watched(study: Study) -> Any:
        spaces.append(plain(study))
        return spaces[-1]

    monkeypatch.setattr(turtle, "features_of", watched)
    folder = tmp_path / "c"
    call = arguments(photos, folder, "--encoder", f"{DEFAULT}={weights}", "--methods", "turtle")
    done = snscc(*call)
    assert done.status == 0, done
    assert table(folder)["turtle"]["note"] == "100 steps in 2 feature spaces"
    (found,) = spaces
    first, second = found.spaces_ND
    assert torch.equal(first, second) and first.shape == found.rows_ND.shape
    # A repeated column changes no angle.
    torch.testing.assert_close(first @ first.T, found.rows_ND @ found.rows_ND.T, atol=1e-3, rtol=0)
    assert f"{DEFAULT} + {DEFAULT}" in (folder / "compare.md").read_text()


def test_auto_chooses_as_fit_does(
    photos: Path, tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = []

    def look(study: Study) -> MethodResult:
        studies.append(study)
        return MethodResult(torch.zeros(len(study.catalog), dtype=torch.long))

    monkeypatch.setattr(compare, "load", {"kmeans": look}.__getitem__)
    monkeypatch.chdir(tmp_path)
    call = ("compare", "auto", "--data", str(photos), "--methods", "kmeans")
    done = snscc(*call, *sets("data.num_clusters=3", "runtime.device=cpu"))
    assert done.status == 0, done
    assert (tmp_path / "runs" / "photos-compare" / "compare.md").exists()
    recipe = studies[0].context.recipe
    assert recipe.encoder.frozen and recipe.encoder.name == DEFAULT
    assert recipe.name == "photos" and recipe.data.num_clusters == 3
    assert recipe.train.head_scale == 30  # a setting of frozen encoders
    refused(snscc(*call), "add --clusters N")
    refused(snscc("compare", "auto", *sets("data.num_clusters=3")), "--data")


def test_mistakes_are_one_line_and_leave_nothing(
    photos: Path, tmp_path: Path, snscc: Snscc
) -> None:
    folder = tmp_path / "c"
    wrong = snscc(*arguments(photos, folder, "--methods", "kmeans,iic,pretext"))
    fit = ", ".join(ON_FEATURES)
    refused(wrong, "--methods iic,pretext:", "pretext is kmeans there", fit)
    refused(snscc(*arguments(photos, folder, "--methods", "dec")), "--methods dec:", fit)
    trained = ("encoder.frozen=false", "encoder.weights=default")
    refused(snscc(*arguments(photos, folder, *sets(*trained))), "encoder.frozen=true")
    refused(snscc(*arguments(photos, folder, "--encoder", "none.pt")), "none.pt")
    none = tmp_path / "none"
    none.mkdir()
    refused(snscc("compare", str(none)), "holds no run", f"auto in its place, with --data {none}")
    assert not folder.exists()


def test_what_runs_with_a_frozen_encoder() -> None:
    assert chosen("all", frozen=True) == ON_FEATURES
    assert chosen("dec,kmeans", frozen=True) == ("kmeans", "dec")  # refused later, by name
    assert stages_of(["kmeans"], frozen=True) == ("pretrain",)
    assert stages_of(["scan"], frozen=True) == STAGES
    assert all(callable(load(name)) for name in ("temi", "turtle"))


def test_without_a_frozen_encoder_they_start_from_pretrain(tmp_path: Path, snscc: Snscc) -> None:
    call = ["compare", "digits", *sets(*TINY), "--methods", "pretext,temi,turtle"]
    folders = [tmp_path / "a" / "c", tmp_path / "b" / "c"]
    for folder in folders:
        done = snscc(*call, "--out", str(folder))
        assert done.status == 0, done
    assert figures(folders[0]) == figures(folders[1])
    found = table(folders[0])
    assert list(found) == ["pretext", "temi", "turtle"]
    assert "Pretrain + TEMI" in (folders[0] / "compare.md").read_text()
    assert all(0.2 < float(row["acc"]) <= 1 for row in found.values()), found
