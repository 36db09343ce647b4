"""The same command again on images that have come or gone since: refused before anything is
replaced, saying how many."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snscc_ray.cli import options
from tests.ray_tools import own_ray
from tests.ray_tools import refused as refused_there
from tests.test_cli import PHOTOS, Snscc, content, refused, sets


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(42):
        photo(folder, number)
    return folder


def photo(folder: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number:03}.png")


def change(photos: Path) -> None:
    """One comes and two go."""
    photo(photos, 99)
    for gone in ("003.png", "017.png"):
        (photos / gone).unlink()


COMMANDS = {
    "compare": ["compare", "images", "--methods", "kmeans", "--data", "PHOTOS", "--out", "OUT",
                *sets(*PHOTOS)],
    "pack": ["pack", "PHOTOS", "OUT", "--jobs", "1"],
}  # fmt: skip


def told(words: list[str], photos: Path, out: Path) -> list[str]:
    return [word.replace("PHOTOS", str(photos)).replace("OUT", str(out)) for word in words]


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_comparison_and_a_pack(
    words: list[str], photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = told(words, photos, out)
    assert snscc(*asked).status == 0
    before = content(out)
    change(photos)
    refused(snscc(*asked), "1 came and 2 went", "42", "41 now", "--overwrite", "another")
    assert content(out) == before
    assert snscc(*told(words, photos, tmp_path / "other")).status == 0
    assert snscc(*asked, "--overwrite").status == 0
    photo(photos, 3)
    photo(photos, 17)
    refused(snscc(*asked), "2 came and 0 went")


def test_a_pack_whose_images_have_other_contents(
    photos: Path, snscc: Snscc, tmp_path: Path
) -> None:
    asked = ("pack", photos, tmp_path / "out", "--jobs", 1)
    assert snscc(*asked).status == 0
    shutil.copyfile(photos / "001.png", photos / "002.png")
    refused(snscc(*asked), "of the same names", "42 files then, 42 now", "--overwrite")
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"broken")
    refused(snscc(*asked), "42 files then, 42 now", "--overwrite")


@pytest.mark.slow
def test_a_sweep(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweeps" / "out"
    asked = ["sweep", "gamma", "--recipe", "images", "--data", photos, "--seeds", 1]
    asked += ["--samples", 1, "--out", out, *sets(*PHOTOS)]
    with own_ray() as ray:
        ray.snscc(*asked).wait()
        before = content(tmp_path / "sweeps")
        change(photos)
        refused_there(ray.snscc(*asked).wait(2), "1 came and 2 went", "--overwrite", "--out")
        assert content(tmp_path / "sweeps") == before
