"""Images that show the same picture, in groups, with the one to keep."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from snscc_ray import cli
from snscc_ray.answers.alike import same_colours, similarity, small_copies
from snscc_ray.answers.duplicates import ALIKE
from snscc_ray.cli import options
from tests.conftest import shards
from tests.test_cli import PHOTOS, Snscc, refused, sets

PHOTOGRAPHS = 60


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


def photographs(count: int) -> list[Image.Image]:
    file = shards("imagenette-96") / "part-00.parquet"
    table = next(pq.ParquetFile(file).iter_batches(count, columns=["image"]))
    encoded = table["image"].to_pylist()
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in encoded]


def plant(folder: Path) -> dict[str, tuple[str, str]]:
    """Write photographs and what was made of some: by the copy's name, the one to keep and why."""
    folder.mkdir()
    images = photographs(PHOTOGRAPHS)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")
    made = {}

    def save(number: int, kind: str, image: Image.Image, why: str, **options: object) -> None:
        name = f"{number:02}-{kind}.{options.pop('ending', 'png')}"
        image.save(folder / name, **options)  # type: ignore[arg-type]
        made[name] = (f"{number:02}.png", why)

    save(0, "half", images[0].resize((48, 48)), "smaller")
    save(1, "weak", images[1], "less sharp", quality=50, ending="jpg")
    save(2, "cut", images[2].crop((5, 0, 96, 91)), "smaller")
    save(3, "same", images[3], "the same pixels, newer", ending="bmp")
    shutil.copyfile(folder / "04.png", folder / "04-copy.png")
    made["04-copy.png"] = ("04.png", "the same file, newer")
    images[8].convert("L").save(folder / "08-grey.png")  # another picture
    images[6].transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "06-mirrored.png")
    for number, path in enumerate(sorted(folder.iterdir(), key=lambda path: "-" in path.name)):
        os.utime(path, (1e9 + number, 1e9 + number))
    return made


def run(place: Path, data: Path) -> Path:
    words = ["snscc", "run", "images", "--data", str(data), *sets(*PHOTOS)]
    words += [*sets("data.image_size=16", "pretrain.epochs=2"), "--out", str(place / "run")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", words)
        cli.main()
    assert exit.value.code == 0
    return place / "run"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    place = tmp_path_factory.mktemp("duplicates")
    made = plant(place / "photos")
    run(place, place / "photos")
    return place, made


def lines_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_every_kind_is_found_with_the_one_to_keep(
    planted: tuple[Path, dict[str, tuple[str, str]]], snscc: Snscc, tmp_path: Path
) -> None:
    place, made = planted
    out = tmp_path / "d.csv"
    done = snscc("duplicates", place / "run", "-o", out)
    assert (
        done.status == 0 and f"{len(made)} groups, with {len(made)} images not to keep" in done.out
    )
    lines = lines_of(out)
    kept = {line["group"]: line["id"] for line in lines if line["keep"] == "yes"}
    found = {
        line["id"]: (kept[line["group"]], line["why"]) for line in lines if line["keep"] == "no"
    }
    assert found == made
    for line in lines:
        path = place / "photos" / line["id"]
        assert int(line["bytes"]) == path.stat().st_size
        assert (int(line["width"]), int(line["height"])) == Image.open(path).size
        equal = line["keep"] == "yes" or line["why"].startswith("the same")
        assert (float(line["similarity"]) == 1) == equal
        assert float(line["similarity"]) >= ALIKE
    whys = {line["id"]: line["why"] for line in lines if line["keep"] == "yes"}
    assert whys["00.png"] == "the largest" and whys["01.png"] == "the sharpest of the largest"
    assert whys["04.png"] == "the oldest of equal ones"
    refused(snscc("duplicates", place / "run", "-o", out), "exists", "--overwrite")
    # They go aside.
    into = tmp_path / "sorted"
    assert snscc("sort", place / "run", "--into", into, "--duplicates", out, "--yes").status == 0
    aside = {path.name for path in (into / "duplicates").rglob("*") if path.is_file()}
    assert aside == set(made)


def test_what_is_gone_or_unreadable_is_left_out(
    planted: tuple[Path, dict[str, tuple[str, str]]], snscc: Snscc, tmp_path: Path
) -> None:
    shutil.copytree(planted[0], tmp_path / "p")
    recipe = tmp_path / "p" / "run" / "recipe.json"
    recipe.write_text(recipe.read_text().replace(str(planted[0]), str(tmp_path / "p")))
    (tmp_path / "p" / "photos" / "20.png").unlink()
    (tmp_path / "p" / "photos" / "21.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = snscc("duplicates", tmp_path / "p" / "run", "-o", tmp_path / "d.csv")
    assert done.status == 1 and "2 images left out" in done.out
    assert "left out 20.png: it is gone" in done.out and "left out 21.png:" in done.out
    assert sum(line["keep"] == "no" for line in lines_of(tmp_path / "d.csv")) == len(planted[1])


def test_shards(
    planted: tuple[Path, dict[str, tuple[str, str]]], snscc: Snscc, tmp_path: Path
) -> None:
    place, made = planted
    files = sorted((place / "photos").iterdir())
    names = [file.name for file in files]
    table = pa.table({"id": names, "image": [file.read_bytes() for file in files]})
    (tmp_path / "shards").mkdir()
    pq.write_table(table, tmp_path / "shards" / "a.parquet", row_group_size=10)
    own = run(tmp_path, tmp_path / "shards")
    assert snscc("duplicates", own, "-o", tmp_path / "d.csv").status == 0
    lines = lines_of(tmp_path / "d.csv")
    assert {line["id"] for line in lines} == {*made} | {kept for kept, _ in made.values()}
    refused(snscc("sort", own, "--into", tmp_path / "s"), "Parquet shards")


def test_different_photographs_are_not_alike() -> None:
    copies = [small_copies(image) for image in photographs(200)]
    grey = torch.from_numpy(np.stack([grey for grey, _ in copies]))
    a, b = torch.triu_indices(len(grey), len(grey), 1)
    some = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))[:2000]
    assert similarity(grey[a[some]], grey[b[some]]).max() < ALIKE - 0.1
    assert similarity(grey, grey).min() > 0.999
    tints = np.stack([tints for _, tints in copies])
    assert same_colours(tints, tints).all()
