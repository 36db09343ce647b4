"""The images of a run that are most like another, as a person asks for them."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from snscc_ray import cli
from snscc_ray.answers.names import Naming, save
from snscc_ray.answers.similar import SimilarRequest, similar
from snscc_ray.cli import options
from snscc_ray.core import checkpoints
from tests.conftest import TINY, digits_table
from tests.ray_tools import sets
from tests.test_cli import Snscc, refused
from tests.test_embeddings import QUICK, blobs, table
from tests.test_predict import images

ROWS = 120


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


def do(*words: object) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["snscc", *map(str, words)])
        cli.main()
    assert exit.value.code == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a folder of digits; one is there twice, and one file is no image."""
    place = tmp_path_factory.mktemp("similar")
    scans = images(place / "scans", digits_table(ROWS))
    shutil.copy(scans / "007.png", scans / "again.png")
    (scans / "000 broken.png").write_bytes(b"no image")
    own = sets(*TINY, "data.limit=null", "data.source=folder", f"data.path={scans}")
    own += sets("data.skip_corrupt=true", "data.mean=null", "data.std=null")
    do("run", "digits", *own, "--out", place / "run")
    return place


def cosines(run: Path) -> torch.Tensor:
    features_ND = checkpoints.load(run / "boost" / "features.pt")["features"].double()
    unit_ND = torch.nn.functional.normalize(features_ND, dim=1)
    return unit_ND @ unit_ND.T


def listed(out: str) -> list[tuple[float, str, str]]:
    """Similarity, cluster and id of each line of the tables."""
    lines = re.findall(r"^ (\d\.\d{3})  +(\S.*?)  +(\S.*?) *$", out, re.MULTILINE)
    return [(float(cosine), cluster, name) for cosine, cluster, name in lines]


def test_the_nearest_images_of_a_file_and_of_an_id(
    place: Path, snscc: Snscc, tmp_path: Path
) -> None:
    run, file = place / "run", place / "scans" / "012.png"
    of_file = snscc("similar", run, file, "-n", 6)
    of_id = snscc("similar", run, "012.png", "-n", 6)
    assert of_file.status == of_id.status == 0, (of_file, of_id)
    assigned = pq.read_table(run / "assignments.parquet")
    ids, clusters = assigned["id"].to_pylist(), assigned["cluster"].to_pylist()
    row = ids.index("012.png")
    assert row == 12 and "000 broken.png" not in ids
    expected = cosines(run)[row]
    order = [near for near in expected.argsort(descending=True).tolist() if near != row]
    found = listed(of_id.out)
    assert [name for _, _, name in found] == [ids[near] for near in order[:6]]
    for (cosine, cluster, _), near in zip(found, order, strict=False):
        assert cosine == pytest.approx(float(expected[near]), abs=2e-3)
        assert cluster == f"cluster {clusters[near]}"
    assert f"012.png: cluster {clusters[row]}, one of the run" in of_id.out
    # As a file it may be any image, so the run's own copy of it is listed, too.
    first, *others = listed(of_file.out)
    assert first[0] == 1 and first[2] == "012.png" and others == found[:5]


def test_an_identical_image_is_listed_and_the_image_itself_is_not(
    place: Path, snscc: Snscc
) -> None:
    for query, twin in (("again.png", "007.png"), ("007.png", "again.png")):
        found = listed(snscc("similar", place / "run", query, "-n", 3).out)
        assert found[0][0] == 1 and found[0][2] == twin
        assert query not in [name for _, _, name in found] and len(found) == 3


def test_clusters_have_their_names_and_all_images_can_be_listed(
    place: Path, snscc: Snscc, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    save(Naming(tuple(f"kind {cluster}" for cluster in range(10))), run)
    done = snscc("similar", run, "003.png", place / "scans" / "004.png", "-n", 1000)
    assert done.status == 0, done
    found = listed(done.out)
    assert len(found) == 2 * (ROWS + 1) - 1
    assert {cluster.split()[0] for _, cluster, _ in found} == {"kind"}
    assert re.search(r"^003\.png: kind \d, one of the run$", done.out, re.MULTILINE)


def test_the_page_shows_each_picture_without_a_network(
    place: Path, snscc: Snscc, tmp_path: Path
) -> None:
    query = tmp_path / "<b>&new.png"
    shutil.copy(place / "scans" / "030.png", query)
    page = tmp_path / "page.html"
    words = ("similar", place / "run", query, "011.png", "-n", 4, "-o", page)
    done = snscc(*words)
    assert done.status == 0 and f"Pictures: {page}" in done.out, done
    html = page.read_text()
    shown = [name for _, _, name in listed(done.out)]
    assert len(shown) == 8
    assert all(f'aria-label="{name}"' in html for name in (*shown, "011.png"))
    assert html.count('<span class="pic s0"') == 10  # with the two queries
    assert "data:image/webp;base64," in html and "default-src 'none'" in html
    assert not re.search(r"""(src|href)=(?!["']?data:)|url\((?!"data:)|@import""", html)
    assert "<b>" not in html and "&lt;b&gt;&amp;new.png" in html
    refused(snscc(*words), "exists", "--overwrite")
    page.write_text("somebody's")
    assert snscc(*words, "--overwrite").status == 0 and page.read_text() == html


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_pictures_that_cannot_be_shown_are_told(
    what: str, place: Path, snscc: Snscc, tmp_path: Path
) -> None:
    """The table comes from the run folder; only the page needs the images."""
    snscc("similar", place / "run", "005.png")  # computes the features
    before = listed(snscc("similar", place / "run", "005.png", "-n", 5).out)
    page, scans, away = tmp_path / "page.html", place / "scans", place / "away"
    name = before[0][2]
    try:
        if what == "gone":
            scans.rename(away)
        else:
            shutil.copytree(scans, away)
            Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(scans / name)
        done = snscc("similar", place / "run", "005.png", "-n", 5, "-o", page)
    finally:
        shutil.rmtree(scans, ignore_errors=True)
        away.rename(scans)
    assert done.status == 0 and listed(done.out) == before
    if what == "gone":
        note = "No pictures, because the images of the run cannot be read"
        assert 'class="pic' not in page.read_text()
    else:
        note = "1 of 6 pictures are not shown: the images are gone or changed."
        assert page.read_text().count('<span class="pic') == 5
    assert note in done.out and note in page.read_text()


def test_without_features_or_images_there_is_no_answer(
    place: Path, snscc: Snscc, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    (run / "boost" / "features.pt").unlink(missing_ok=True)
    (place / "scans").rename(place / "away")
    try:
        refused(snscc("similar", run, "005.png"), "images of the run cannot be read", "no longer")
    finally:
        (place / "away").rename(place / "scans")


def test_what_is_no_query_is_refused(place: Path, snscc: Snscc, tmp_path: Path) -> None:
    run, page = place / "run", tmp_path / "page.html"
    (tmp_path / "text.jpg").write_text("no image")
    np.save(tmp_path / "row.npy", np.ones(8, np.float32))
    os.mkfifo(tmp_path / "pipe.png")
    for query, *says in (
        ("nothing.png", "no such file", "no image of the run has this id", "assignments.parquet"),
        ("x" * 5000, "no such file"),
        (tmp_path, "is a folder", "snscc predict RUN FOLDER"),
        (tmp_path / "text.jpg", "cannot be read as an image", "not an image"),
        (tmp_path / "pipe.png", "not a regular file"),
        (tmp_path / "row.npy", "the run is on images", "an image file"),
    ):
        refused(snscc("similar", run, query, "-o", page), *says)
    many = [f"{row:03}.png" for row in range(51)]
    refused(snscc("similar", run, *many, "-o", page), "51 queries are more than 50", "predict")
    refused(snscc("similar", run, "001.png", "-o", tmp_path / "page.txt"), ".html")
    refused(snscc("similar", tmp_path / "no", "001.png", "-o", page), "there is no folder")
    assert not page.exists()


@pytest.mark.slow
def test_a_run_on_embeddings(snscc: Snscc, tmp_path: Path) -> None:
    vectors, kinds = blobs()
    png = [digits_table(1)["image"][0].as_py()] * len(vectors)
    pq.write_table(table(image=png), tmp_path / "with.parquet")
    np.save(tmp_path / "all.npy", vectors)
    for name, begin in (("with.parquet", "r"), ("all.npy", "all.npy:")):
        run, page = tmp_path / f"run-{name}", tmp_path / f"{name}.html"
        do("fit", tmp_path / name, "--out", run, "--clusters", 4, *QUICK)
        np.save(tmp_path / "one.npy", vectors[17] * 3)
        done = snscc("similar", run, tmp_path / "one.npy", "-n", 8, "-o", page)
        assert done.status == 0, done
        found = listed(done.out)
        assert found[0][2] == f"{begin}17" and found[0][0] == 1
        assert {kinds[int(id_.removeprefix(begin))] for _, _, id_ in found} == {kinds[17]}
        own = listed(snscc("similar", run, f"{begin}17", "-n", 7).out)
        assert own == found[1:]
        pictures = page.read_text().count('<span class="pic')
        assert pictures == (8 if name == "with.parquet" else 0)
        told = "No pictures: the run is on embeddings, without images."
        assert (told in page.read_text()) == (name == "all.npy")
    np.save(tmp_path / "two.npy", vectors[[3, 4]])
    done = snscc("similar", run, tmp_path / "two.npy", "-n", 1)
    assert [name for _, _, name in listed(done.out)] == ["all.npy:3", "all.npy:4"]
    assert "two.npy:0: cluster" in done.out and "two.npy:1: cluster" in done.out
    np.save(tmp_path / "narrow.npy", vectors[0, :5])
    refused(snscc("similar", run, tmp_path / "narrow.npy"), "have 5 numbers", "give embeddings")
    (tmp_path / "a.png").write_bytes(png[0])
    refused(snscc("similar", run, tmp_path / "a.png"), "the run is on embeddings", ".npy")


def test_a_photograph_of_any_form_finds_its_small_copy(place: Path, tmp_path: Path) -> None:
    """Read as for the run: turned by its orientation, cropped, in grey."""
    digit = Image.open(place / "scans" / "021.png")
    large = digit.resize((80, 80), Image.Resampling.NEAREST).convert("RGBA")
    turned = large.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    request = SimilarRequest(place / "run", (str(tmp_path / "turned.jpg"),), 1)
    [answer] = similar(request, Console(quiet=True), "cpu")
    assert answer.row is None and answer.found[0].id == "021.png"
    assert answer.found[0].similarity > 0.99
