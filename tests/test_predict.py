"""New images through a finished run, as a person asks for it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snscc_ray import checkpoints, cli
from snscc_ray.cli import options
from tests.conftest import TINY, digits_table
from tests.ray_tools import sets
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


def test_a_run_without_boost_predicts_by_train(trained: Path, snscc: Snscc, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    shutil.rmtree(run / "boost")
    done = snscc("predict", run, trained / "shards", "-o", tmp_path / "out.parquet")
    assert done.status == 0 and pq.read_table(tmp_path / "out.parquet").num_rows == ROWS


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: shutil.rmtree(run), ["holds no run"]),
        (lambda run: (run / "metrics.json").unlink(), ["not finished", "--resume"]),
        (lambda run: [shutil.rmtree(run / s) for s in ("train", "boost")], ["no Train stage"]),
        (lambda run: (run / "boost" / "final.pt").write_bytes(b"x"), ["final.pt is truncated"]),
        (
            lambda run: checkpoints.save(run / "boost" / "final.pt", {"network": {}}),
            ["older version"],
        ),
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


def test_what_is_there_is_not_replaced(trained: Path, snscc: Snscc, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_bytes(b"somebody's")
    before = content(tmp_path)
    words = ["predict", trained / "run", trained / "shards", "-o"]
    refused(snscc(*words, tmp_path / "out.parquet"), "exists", "--overwrite")
    refused(snscc(*words, tmp_path), "is a folder")
    (tmp_path / "empty").mkdir()
    refused(snscc("predict", trained / "run", tmp_path / "empty", "-o", tmp_path / "o"), "nothing")
    (tmp_path / "empty").rmdir()
    assert content(tmp_path) == before
    assert snscc(*words, tmp_path / "out.parquet", "--overwrite").status == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == ROWS
