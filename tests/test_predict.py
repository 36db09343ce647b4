"""New images through a finished run, as a person asks for it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch import Tensor

from snscc_ray import cli
from snscc_ray.answers import nearest
from snscc_ray.answers.features import own_images
from snscc_ray.answers.predict import PredictRequest, prepare
from snscc_ray.cli import options
from snscc_ray.core import checkpoints
from snscc_ray.core.clustering import index as index_module
from snscc_ray.core.display import Display
from snscc_ray.models.encoders import ClusterNet
from tests.conftest import TINY, digits_table
from tests.ray_tools import own_ray, sets
from tests.test_cli import Snscc, content, refused

ROWS = 203


def images(folder: Path, table: pa.Table) -> Path:
    """A file for each row, named by its number."""
    folder.mkdir()
    for number, image in enumerate(table["image"].to_pylist()):
        (folder / f"{number:03}.png").write_bytes(image)
    return folder


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `run`, and its images in `shards`; mean and deviation were measured."""
    place = tmp_path_factory.mktemp("predict")
    (place / "shards").mkdir()
    pq.write_table(digits_table(ROWS), place / "shards" / "a.parquet")
    own = sets(*TINY, "data.limit=null", "data.source=shards", f"data.path={place / 'shards'}")
    own += sets("data.mean=null", "data.std=null", "train.epochs=8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        words = ["snscc", "run", "digits", *own, "--out", str(place / "run")]
        patch.setattr(sys, "argv", words)
        cli.main()
    assert exit.value.code == 0
    return place


def test_the_images_of_the_run_get_the_clusters_of_the_run(
    trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    out = tmp_path / "new.parquet"
    done = snscc("predict", trained / "run", trained / "shards", "-o", out)
    assert done.status == 0 and f"{ROWS} images" in done.out
    assigned = pq.read_table(trained / "run" / "assignments.parquet")
    found = pq.read_table(out)
    for column in ("id", "cluster", "confidence"):
        assert found[column].equals(assigned[column]), column
    assert len(set(found["cluster"].to_pylist())) > 2
    for row in found.to_pylist():
        assert len(row["top_clusters"]) == 3 == len(set(row["top_clusters"]))
        assert row["top_clusters"][0] == row["cluster"]
        assert row["top_confidences"] == sorted(row["top_confidences"], reverse=True)
        assert row["top_confidences"][0] == row["confidence"]


def test_an_image_gets_the_same_answer_in_any_company(
    trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    few = images(tmp_path / "few", digits_table(ROWS).take([7, 120, 3]))
    snscc("predict", trained / "run", few, "-o", tmp_path / "few.parquet", "--top", 99)
    assigned = pq.read_table(trained / "run" / "assignments.parquet").to_pylist()
    found = pq.read_table(tmp_path / "few.parquet").to_pylist()
    assert [row["id"] for row in found] == ["000.png", "001.png", "002.png"]
    for row, number in zip(found, (7, 120, 3), strict=True):
        assert row["cluster"] == assigned[number]["cluster"]
        assert row["confidence"] == pytest.approx(assigned[number]["confidence"], abs=1e-5)
        assert sum(row["top_confidences"]) == pytest.approx(1, abs=1e-5)


def test_one_image_and_broken_ones(trained: Path, snscc: Snscc, tmp_path: Path) -> None:
    folder = images(tmp_path / "mixed", digits_table(1))
    (folder / "broken.png").write_bytes(b"no image at all")
    done = snscc("predict", trained / "run", folder, "-o", tmp_path / "out.parquet")
    assert done.status == 0, done
    assert "left out broken.png" in done.out and "1 unreadable" in done.out
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ["000.png"]


def test_a_large_run_keeps_an_index_and_says_how_much_it_finds(
    trained: Path, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    index = run / "boost" / "index.pt"
    exact, found = tmp_path / "exact.parquet", tmp_path / "found.parquet"

    def predicted(data: Path) -> str:
        done = snscc("predict", run, data, "-o", found, "--overwrite")
        assert done.status == 0
        return " ".join(done.out.split())

    snscc("predict", run, trained / "shards", "-o", exact)
    monkeypatch.setattr(nearest, "_EXACT_ROWS", ROWS - 1)
    monkeypatch.setattr(index_module, "_CELL_ROWS", 20)
    assert "index" not in predicted(images(tmp_path / "few", digits_table(3)))
    assert not index.exists()  # for three images it would not pay

    monkeypatch.setattr(nearest, "_MEASURED", 0)
    told = predicted(trained / "shards")
    assert "making an index" in told and "% of the nearest are found there" in told
    pairs = zip(*(pq.read_table(file).to_pylist() for file in (exact, found)), strict=True)
    same = [len(set(a["nearest"]) & set(b["nearest"])) / 3 for a, b in pairs]
    assert sum(same) / ROWS > 0.9
    for row in pq.read_table(found).to_pylist():
        assert row["nearest_similarity"][0] == pytest.approx(1, abs=1e-5)  # itself, or a copy

    first = pq.read_table(found)
    told = predicted(trained / "shards")
    assert "making an index" not in told and "are found there" in told
    assert pq.read_table(found).equals(first)

    index.write_bytes(index.read_bytes()[:-100])
    assert "making an index" in predicted(trained / "shards")
    assert pq.read_table(found).equals(first)
    held = checkpoints.load(index)
    checkpoints.save(index, held | {"identity": "another network's"})
    assert "making an index" in predicted(trained / "shards")


def test_a_run_without_boost_predicts_by_train(trained: Path, snscc: Snscc, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    shutil.rmtree(run / "boost")
    done = snscc("predict", run, trained / "shards", "-o", tmp_path / "out.parquet")
    assert done.status == 0 and pq.read_table(tmp_path / "out.parquet").num_rows == ROWS


def respell(run: Path, **changes: object) -> None:
    """Write the last stage's network anew, with something else in it."""
    path = run / "boost" / "final.pt"
    checkpoints.save(path, checkpoints.load(path) | changes)


def spoil_network(run: Path, value: float) -> None:
    network = checkpoints.load(run / "boost" / "final.pt")["network"]
    next(iter(network.values())).view(-1)[3] = value
    respell(run, network=network)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: shutil.rmtree(run), ["there is no folder"]),
        (lambda run: (run / "metrics.json").unlink(), ["not finished", "--resume"]),
        (lambda run: [shutil.rmtree(run / s) for s in ("train", "boost")], ["no Train stage"]),
        (lambda run: (run / "boost" / "final.pt").write_bytes(b"x"), ["final.pt is damaged"]),
        (
            lambda run: checkpoints.save(run / "boost" / "final.pt", {"network": {}}),
            ["older version"],
        ),
        (lambda run: (run / "boost" / "final.pt").unlink(), ["no checkpoint", "final.pt"]),
        (lambda run: spoil_network(run, float("nan")), ["final.pt", "no usable network"]),
        (lambda run: spoil_network(run, torch.inf), ["final.pt", "no usable network"]),
        (lambda run: respell(run, network=[1]), ["final.pt", "no usable network"]),
        (lambda run: respell(run, normalize={"mean": [0.5], "std": [0.0]}), ["no usable"]),
        (lambda run: respell(run, normalize={"mean": [0.5] * 3, "std": [1.0] * 3}), ["no usable"]),
        (lambda run: (run / "assignments.parquet").unlink(), ["assignments.parquet", "damaged"]),
        (lambda run: (run / "assignments.parquet").write_bytes(b"PAR1"), ["assignments.parquet"]),
    ],
)  # fmt: skip
def test_a_run_that_cannot_predict_is_refused(
    spoil: object, says: list[str], trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    assert callable(spoil)
    spoil(run)
    refused(snscc("predict", run, trained / "shards", "-o", tmp_path / "out.parquet"), *says)
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("held", ["truncated", "nan", "short", "list"])
def test_damaged_features_are_made_again(
    held: str, trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    asked = ("predict", run, trained / "shards", "--overwrite", "-o", tmp_path / "out.parquet")
    assert snscc(*asked).status == 0
    expected, path = pq.read_table(tmp_path / "out.parquet"), run / "boost" / "features.pt"
    kept = checkpoints.load(path)
    if held == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif held == "list":
        torch.save([1], path)
    else:
        features = kept["features"]
        changed = features[:5] if held == "short" else features * torch.nan
        checkpoints.save(path, kept | {"features": changed})
    assert snscc(*asked).status == 0
    assert pq.read_table(tmp_path / "out.parquet").equals(expected)


def test_what_is_there_is_not_replaced(trained: Path, snscc: Snscc, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_bytes(b"somebody's")
    before = content(tmp_path)
    words = ["predict", trained / "run", trained / "shards", "-o"]
    refused(snscc(*words, tmp_path / "out.parquet"), "exists", "--overwrite")
    refused(snscc(*words, tmp_path), "is a folder")
    (tmp_path / "empty").mkdir()
    nothing = ["predict", trained / "run", tmp_path / "empty", "-o", tmp_path / "o.csv"]
    refused(snscc(*nothing), "no images in")
    refused(snscc(*words, tmp_path / "new.txt"), "--out", ".parquet", ".csv")
    (tmp_path / "empty").rmdir()
    assert content(tmp_path) == before
    assert snscc(*words, tmp_path / "out.parquet", "--overwrite").status == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == ROWS


# ---------------------------------------------------------------------- nearest, CSV, batches, Ray


def own_features(run: Path) -> Tensor:
    return torch.nn.functional.normalize(
        checkpoints.load(run / "boost" / "features.pt")["features"].double(), dim=1
    )


def test_the_nearest_are_those_of_the_greatest_cosine(
    trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    words = ["predict", trained / "run", trained / "shards", "-o", out, "--overwrite"]
    snscc(*words, "--nearest", 4)
    z_ND = own_features(trained / "run")
    ids = pq.read_table(trained / "run" / "assignments.parquet")["id"].to_pylist()
    for row, cosines_N in zip(pq.read_table(out).to_pylist(), z_ND @ z_ND.T, strict=True):
        assert len(set(row["nearest"])) == 4
        told = torch.tensor(row["nearest_similarity"], dtype=torch.float64)
        assert torch.equal(told, told.sort(descending=True).values)
        # Kept in half precision, and so close ones may change places.
        atol = 2e-3
        torch.testing.assert_close(told, cosines_N.topk(4).values, rtol=0, atol=atol)
        named = cosines_N[[ids.index(name) for name in row["nearest"]]]
        torch.testing.assert_close(told, named, rtol=0, atol=atol)
        assert told[0] == pytest.approx(1, abs=1e-5)  # the image itself is among them
    more = snscc(*words, "--nearest", 1000)
    assert "run's own images" not in more.out  # their features were kept
    assert {len(row) for row in pq.read_table(out)["nearest"].to_pylist()} == {ROWS}
    snscc(*words, "--nearest", 0)
    assert not {"nearest", "nearest_similarity"} & set(pq.read_table(out).column_names)


def change_recipe(run: Path, **fields: object) -> None:
    held = json.loads((run / "recipe.json").read_text())
    held["recipe"]["data"] |= fields
    (run / "recipe.json").write_text(json.dumps(held))


def test_nearest_images_are_left_out_where_the_own_ones_are_gone(
    trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    (run / "boost" / "features.pt").unlink(missing_ok=True)
    change_recipe(run, path=str(tmp_path / "gone"))
    done = snscc("predict", run, trained / "shards", "-o", tmp_path / "out.parquet")
    assert done.status == 0, done
    (line,) = [line for line in done.out.splitlines() if "nearest" in line and "no " in line]
    assert f"no longer at {tmp_path / 'gone'}" in line
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.num_rows == ROWS and "nearest" not in found.column_names


def test_each_image_passes_once(
    trained: Path, snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["predict", trained / "run", trained / "shards", "--overwrite", "-o"]
    snscc(*words, tmp_path / "out.parquet")
    passed: list[int] = []
    forward = ClusterNet.forward

    def counted(self: ClusterNet, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        passed.append(len(x_BCHW))
        return forward(self, x_BCHW)

    monkeypatch.setattr(ClusterNet, "forward", counted)
    snscc(*words, tmp_path / "out.parquet")
    assert sum(passed) == ROWS


def test_a_streamed_set_gets_the_same_answers(trained: Path, snscc: Snscc, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    for mode in ("resident", "stream"):
        change_recipe(run, mode=mode)
        done = snscc("predict", run, trained / "shards", "-o", tmp_path / f"{mode}.parquet")
        assert ("images streamed" in done.out) == (mode == "stream")
    resident, stream = (pq.read_table(tmp_path / f"{m}.parquet") for m in ("resident", "stream"))
    assert resident.equals(stream)


def test_a_spreadsheet_holds_what_parquet_does(trained: Path, snscc: Snscc, tmp_path: Path) -> None:
    few = images(tmp_path / "few", digits_table(3))
    (few / "000.png").rename(few / 'a, "b".png')
    for name in ("out.parquet", "out.CSV"):
        assert snscc("predict", trained / "run", few, "-o", tmp_path / name).status == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    with (tmp_path / "out.CSV").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert 'a, "b".png' in [line["id"] for line in lines]
    for line, row in zip(lines, rows, strict=True):
        assert int(line["cluster"]) == row["cluster"]
        assert float(line["confidence"]) == pytest.approx(row["confidence"], abs=1e-6)
        assert [int(v) for v in line["top_clusters"].split("|")] == row["top_clusters"]
        assert line["nearest"].split("|") == row["nearest"]
        for name in ("top_confidences", "nearest_similarity"):
            told = [float(value) for value in line[name].split("|")]
            assert told == pytest.approx(row[name], abs=1e-5)


ODD = (
    "a|b\\|c", "new\nline", "\x1b[31mred", "[red]", ":cat:", "=1+1", "@x", "<b>&amp;",
    "rtl\u202egnp", " a,'\"b", "tab\t\r", "%s",
)  # fmt: skip


def test_odd_names_come_back_from_a_spreadsheet(
    trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    odd = images(tmp_path / "odd", digits_table(len(ODD)))
    for number, name in enumerate(ODD):
        (odd / f"{number:03}.png").rename(odd / f"{name}.png")
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    ids = pq.read_table(run / "assignments.parquet")
    named = [f"{ODD[row % len(ODD)]}{row}" for row in range(ids.num_rows)]
    pq.write_table(ids.set_column(0, "id", pa.array(named)), run / "assignments.parquet")
    for name in ("out.parquet", "out.csv"):
        done = snscc("predict", run, odd, "-o", tmp_path / name)
        assert done.status == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {row["id"] for row in rows} == {f"{name}.png" for name in ODD}
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, rows, strict=True):
        assert line["id"] == row["id"]
        # As the README says: a backslash stands before a | or a backslash of a name.
        parts = re.findall(r"((?:\\.|[^|\\])+)", line["nearest"], re.DOTALL)
        assert [re.sub(r"\\(.)", r"\1", part) for part in parts] == row["nearest"]


def test_names_are_said_as_they_are_and_move_no_cursor(
    trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    odd = images(tmp_path / "odd", digits_table(1))
    for name in ODD:
        (odd / f"{name}.png").write_bytes(b"no image")
    done = snscc("predict", trained / "run", odd, "-o", tmp_path / ":cat:[red]\x1b.csv")
    said = [line for line in done.out.splitlines() if line.startswith("left out ")]
    escaped = [name.encode("unicode_escape").decode().replace("\\\\", "\\") for name in ODD]
    assert sorted(said) == sorted(
        f"left out {name}.png: not an image in a known format" for name in escaped
    )
    assert r":cat:[red]\x1b.csv" in done.out and "\x1b" not in done.out
    again = snscc("predict", trained / "run", odd, "-o", tmp_path / ":cat:[red]\x1b.csv")
    refused(again, r":cat:[red]\x1b.csv exists")


@pytest.mark.parametrize("size", [1, 2, 7, 50, 202])
def test_the_same_image_gets_the_same_answer_whatever_the_batch(trained: Path, size: int) -> None:
    """To the last bit on a CPU, the order of the images being another one too."""
    display = Display(Console(quiet=True))
    question = PredictRequest(trained / "run", str(trained / "shards"), Path("unused"), top=10)
    answerer, _, _ = prepare(question, display, "cpu")
    data = own_images(trained / "run", torch.device("cpu"), display).data
    all_NCHW = next(data.slices(0, ROWS, ROWS))
    whole = answerer(all_NCHW)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(size))
    parts = pa.concat_tables([answerer(part) for part in all_NCHW[order].split(size)])
    assert parts.equals(whole.take(pa.array(order.numpy())))


@pytest.mark.slow
def test_workers_give_the_same_answers_in_the_same_order(trained: Path, tmp_path: Path) -> None:
    mixed = images(tmp_path / "mixed", digits_table(ROWS))
    for name in ("000.png", "100.png", "202.png"):
        (mixed / name).write_bytes(b"no image at all")
    workers = min(2, os.cpu_count() or 1)
    with own_ray() as ray:
        words = ["predict", trained / "run", mixed, "-o"]
        here = ray.snscc(*words, tmp_path / "here.parquet")
        there = ray.snscc(*words, tmp_path / "there.parquet", "--workers", workers)
        assert here.wait().err == there.wait().err == "", there.said()
        said = there.out
    assert said.count("left out 100.png: not an image") == 1
    assert "200 images, 3 unreadable left out" in said
    ours, theirs = (pq.read_table(tmp_path / f"{n}.parquet") for n in ("here", "there"))
    assert theirs.schema == ours.schema
    assert theirs["id"].equals(ours["id"])
    for one, two in zip(theirs.to_pylist(), ours.to_pylist(), strict=True):
        assert one["cluster"] == two["cluster"] and one["nearest"] == two["nearest"]
        for name in ("top_confidences", "nearest_similarity"):
            assert one[name] == pytest.approx(two[name], rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu"], ["--gpu", "--workers"]),
        (["--workers", "1", "--device", "cpu"], ["--device"]),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], says: list[str], trained: Path, snscc: Snscc, tmp_path: Path
) -> None:
    words = ["predict", trained / "run", trained / "shards", "-o", tmp_path / "out.csv"]
    refused(snscc(*words, *options), *says)
