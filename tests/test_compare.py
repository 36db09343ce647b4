"""`snscc compare`: the table it leaves, what it does not do twice, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from snscc_ray.cli import options
from snscc_ray.compare import comparison as compare
from snscc_ray.compare import here, paper
from snscc_ray.compare.methods import METHODS, chosen, dec, load, scan, stages_of
from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES
from snscc_ray.core import checkpoints, storage
from snscc_ray.core.clustering import metrics
from tests.conftest import TINY, equal_states
from tests.test_cli import Snscc, refused, sets

FAST = (
    *TINY,
    "data.limit=120",
    "pretrain.epochs=1",
    "train.epochs=2",
    "boost.epochs=1",
    "train.num_heads=2",
)


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


def stub(cluster: int) -> Any:
    """A method that puts every row into one cluster."""
    return lambda study: MethodResult(torch.full((len(study.catalog),), cluster), note="a stub")


def broken(study: Study) -> MethodResult:
    raise ValueError("no\nmemory left")


def arguments(folder: Path, *more: str) -> list[str]:
    return ["compare", "digits", "--out", str(folder), *sets(*FAST), *more]


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "compare.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_every_method_runs_and_its_figures_are_those_of_its_assignment(
    tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "all"
    done = snscc(*arguments(folder))
    assert done.status == 0, done
    rows = table(folder)
    assert list(rows) == list(METHODS)
    assert "trains for 2 epochs, SNSCC for 4 in all" in (folder / "compare.md").read_text()
    markdown = (folder / "compare.md").read_text()
    for method, row in rows.items():
        assert f"{method}: ACC {float(row['acc']):.3f}" in done.out
        assert f"| {METHODS[method].title} | {float(row['acc']):.3f} |" in markdown
        found = pq.read_table(folder / "methods" / method / "assignments.parquet")
        clusters = torch.tensor(found["cluster"].to_pylist())
        truth = pq.read_table(folder / "snscc" / "assignments.parquet")
        assert found["id"].equals(truth["id"])
        expected = metrics.oracle(torch.tensor(truth["label"].to_pylist()), clusters)
        assert [float(row[name]) for name in ("acc", "nmi", "ari")] == list(expected.values())
        assert 1 <= int(row["clusters"]) <= 10 and float(row["seconds"]) >= 0
        assert row["paper_acc"] == ""  # the paper has no digits
    # SCAN holds the time of the pretext that it starts from.
    assert float(rows["scan"]["seconds"]) > float(rows["pretext"]["seconds"])
    assert not list(folder.rglob("latest.pt"))
    for method in ("ae", "dae", "vae", "iic", "pica", "cc"):
        lines = (folder / "methods" / method / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(text)["loss/total"] for text in lines]
        assert losses[-1] < losses[0], method

    monkeypatch.setattr(compare, "load", dict.fromkeys(METHODS, broken).__getitem__)
    again = snscc(*arguments(folder))
    assert again.status == 0 and again.out.count("already done") == len(METHODS)
    assert table(folder) == rows


def test_a_method_that_fails_is_a_row_and_the_same_command_tries_it_again(
    tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"kmeans": stub(0), "pretext": broken, "snscc": stub(1)}
    monkeypatch.setattr(compare, "load", chosen.__getitem__)
    call = arguments(tmp_path / "c", "--methods", "snscc,pretext,kmeans")
    done = snscc(*call)
    assert done.status == 1 and done.err.startswith("snscc: failed: pretext;"), done
    rows = table(tmp_path / "c")
    assert list(rows) == ["kmeans", "pretext", "snscc"]
    assert rows["pretext"]["note"] == "failed: ValueError: no memory left"
    assert rows["pretext"]["acc"] == "" and rows["snscc"]["clusters"] == "1"

    monkeypatch.setattr(
        compare, "load", {**chosen, "kmeans": broken, "pretext": stub(2)}.__getitem__
    )
    done = snscc(*call)
    assert done.status == 0, done
    assert [row["note"] for row in table(tmp_path / "c").values()] == ["a stub"] * 3


@pytest.mark.parametrize(
    ("method", "module", "loss", "parts"),
    [
        ("scan", scan, "consistency", ("scan", "scan-self-label")),
        ("dec", dec, "divergence", ("dae", "dec")),  # its stage has state of its own
    ],
)
def test_a_comparison_that_was_stopped_goes_on_to_the_same_end(
    method: str,
    module: Any,
    loss: str,
    parts: tuple[str, ...],
    tmp_path: Path,
    snscc: Snscc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert snscc(*arguments(whole, "--methods", method)).status == 0
    original, calls = getattr(module, loss), []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(module, loss, stop)
    refused(snscc(*arguments(cut, "--methods", method)), "the same command", status=130)
    assert not (cut / "compare.csv").exists()
    left = checkpoints.load(cut / "methods" / method / "train" / "latest.pt")
    assert left["epoch"] == 0 and 0 < left["step"] < 4
    monkeypatch.setattr(module, loss, original)
    assert snscc(*arguments(cut, "--methods", method)).status == 0
    for part in parts:
        one, other = (checkpoints.load(f / "methods" / part / "final.pt") for f in (whole, cut))
        assert equal_states(one["network"], other["network"])
    assert table(cut)[method]["acc"] == table(whole)[method]["acc"]
    assert "seconds of the last attempt only" in table(cut)[method]["note"]


def test_without_labels_the_table_holds_label_free_figures(
    tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = here.assemble

    def unlabelled(*args: Any) -> Any:
        images = load(*args)
        return replace(images, catalog=replace(images.catalog, labels=None))

    monkeypatch.setattr(here, "assemble", unlabelled)
    folder = tmp_path / "c"
    done = snscc(*arguments(folder, "--methods", "kmeans"))
    assert done.status == 0, done
    alone = table(folder)["kmeans"]
    assert alone["score"] == alone["agreement"] == "" and 0 < float(alone["balance"]) <= 1
    assert snscc(*arguments(folder, "--methods", "kmeans,pretext")).status == 0
    for row in table(folder).values():
        product = float(row["agreement"]) * float(row["balance"])
        assert float(row["score"]) == pytest.approx(product) and product > 0
        assert "acc" not in row


def test_help_teaches(snscc: Snscc) -> None:
    done = snscc("compare", "--help")
    assert done.status == 0 and "snscc compare digits" in done.out and "pica" in done.out


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    refused(snscc("compare", "digits", "--methods", "kmean"), "'kmean'", "mean kmeans", "snscc")
    refused(snscc("compare", "digit"), "did you mean digits?")
    refused(snscc("compare", "cifar10", "--out", str(folder)), "--data PATH")
    missing = tmp_path / "none"
    call = ("compare", "cifar10", "--data", str(missing), "--out", str(folder))
    refused(snscc(*call), str(missing), "does not exist")
    large = sets("train.batch_size=5000")
    refused(snscc("compare", "digits", "--out", str(folder), *large), "train.batch_size=5000")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(snscc("compare", "digits", "--out", str(folder)), "one process")
    assert not folder.exists()


def test_only_what_the_methods_use_is_checked(tmp_path: Path, snscc: Snscc) -> None:
    """k-means on pixels trains no network, so batch sizes do not concern it."""
    large = sets("train.batch_size=5000", "pretrain.mined_neighbors=500")
    call = [*arguments(tmp_path / "c"), *large]
    assert snscc(*call, "--methods", "kmeans").status == 0
    assert list(table(tmp_path / "c")) == ["kmeans"]
    call = [*arguments(tmp_path / "d"), *large]
    refused(snscc(*call, "--methods", "kmeans,ae"), "train.batch_size=5000")
    refused(snscc(*call, "--methods", "kmeans,pretext"), "pretrain.mined_neighbors=500")


def test_stages_that_methods_train_by() -> None:
    assert stages_of(["kmeans", "sc", "ac", "nmf"]) == ()
    assert stages_of(["cc", "pretext"]) == ("pretrain", "train")
    assert stages_of(["scan"]) == stages_of(["snscc"]) == STAGES


def test_a_folder_with_something_else_in_it_is_refused(
    tmp_path: Path, snscc: Snscc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load", {"kmeans": stub(3)}.__getitem__)
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.json").write_text("{}")
    for more in ((), ("--overwrite",)):
        refused(snscc(*arguments(other, "--methods", "kmeans", *more)), "no comparison")
    assert [path.name for path in other.iterdir()] == ["recipe.json"]

    folder = tmp_path / "c"
    call = arguments(folder, "--methods", "kmeans")
    assert snscc(*call).status == 0
    refused(snscc(*call, "--seed", "1"), "seed is 0 there and 1 here", "--overwrite")
    (folder / "mine.txt").touch()
    assert snscc(*call, "--seed", "1", "--overwrite").status == 0
    assert storage.read_json(folder / "compare.json")["recipe"]["seed"] == 1
    assert (folder / "mine.txt").exists()


def test_the_names_methods_means() -> None:
    assert chosen("all") == tuple(METHODS)
    assert all(callable(load(name)) for name in METHODS)
    assert chosen("snscc, kmeans,kmeans") == ("kmeans", "snscc")
    with pytest.raises(UserError, match="no method ''"):
        chosen("")


def test_the_papers_figures_stand_beside_ours() -> None:
    assert all(len(cells) == 15 for cells in paper.TABLE_IV.values())
    assert paper.printed("a method that is not in it", "cifar10") is None
    # By hand, from the printed table.
    assert paper.printed("snscc", "cifar10") == (0.886, 0.795, 0.777)
    assert paper.printed("kmeans", "imagenet_dogs") == (0.105, 0.055, 0.020)
    assert paper.printed("iic", "stl10") == (0.610, None, None)
    assert paper.printed("scan", "imagenet10") == (None, None, None)
    assert paper.printed("snscc", "cifar10_best") == paper.printed("snscc", "cifar10")
    assert paper.printed("kmeans", "digits") is None


def test_what_is_looked_up_of_the_images_is_kept(tmp_path: Path, snscc: Snscc) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(30):
        values = np.random.default_rng(number).integers(0, 1000, (8, 8)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "deep" / f"{number}.tif")
    own = ["data.image_size=8", *(f"{s}.batch_size=8" for s in STAGES)]
    call = ("compare", "images", "--data", tmp_path / "deep", "--clusters", 2, *sets(*own))
    call = (*call, "--methods", "kmeans", "--out", tmp_path / "out")
    assert snscc(*call).status == 0
    held = json.loads((tmp_path / "out" / "compare.json").read_text())
    low, high = held["recipe"]["data"]["value_range"]
    assert 0 <= low < 10 and 990 < high < 1000
    again = snscc(*call)  # the same command goes on
    assert again.status == 0 and "already done" in again.out


def test_the_number_of_clusters(tmp_path: Path, snscc: Snscc) -> None:
    """--clusters is data.num_clusters, and not estimated."""
    folder = tmp_path / "c"
    call = arguments(folder, "--methods", "kmeans")
    assert snscc(*call, "--clusters", 3).status == 0
    assert storage.read_json(folder / "compare.json")["recipe"]["data"]["num_clusters"] == 3
    again = snscc(*call, *sets("data.num_clusters=3"))
    assert again.status == 0 and "already done" in again.out
    for wrong in ("auto", "1", "three"):
        refused(snscc(*call, "--clusters", wrong), f"--clusters {wrong}", "`snscc fit`")
