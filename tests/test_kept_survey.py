"""A survey is kept, and found again only for the same files, read in the same way."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading import kept_survey
from snscc_ray.data.loading.survey import StreamedSet, survey
from snscc_ray.data.sources import list_rows
from tests.conftest import digits_table

ROWS = 60


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_survey, "_LEAST_ROWS", ROWS // 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["files", "shards"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same images as files or shards; the tenth and the last cannot be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    images = digits_table(ROWS)["image"].to_pylist()
    images[9] = images[-1] = images[9][:60]
    if request.param == "files":
        for number, image in enumerate(images):
            (folder / f"{number:03}.png").write_bytes(image)
    else:
        for half in (0, 1):
            part = images[half * ROWS // 2 : (half + 1) * ROWS // 2]
            pq.write_table(pa.table({"image": part}), folder / f"{half}.parquet", row_group_size=7)
    return folder


def settings(place: Path, **changed: object) -> DataSettings:
    own = {
        "source": "auto", "path": str(place), "num_clusters": 3, "image_size": 8, "channels": 1,
        "skip_corrupt": True,
    }  # fmt: skip
    return DataSettings.model_validate(own | changed)


def surveyed(place: Path, **changed: object) -> tuple[StreamedSet, bool]:
    """Return the survey, and whether it was found again."""
    data, said = settings(place, **changed), list[str]()
    found = survey(list_rows(data), data, workers=2, say=said.append)
    assert len(said) < 2
    return found, bool(said)


def same(first: Catalog, second: Catalog) -> bool:
    facts = ("fingerprint", "skipped", "distinct", "class_names", "notes")
    alike = all(getattr(first, fact) == getattr(second, fact) for fact in facts)
    return alike and first.ids == second.ids and torch.equal(first.values, second.values)


def test_the_second_survey_reads_nothing_and_finds_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = surveyed(place)
    assert not again and len(first.catalog.skipped) == 2 and len(first) == ROWS - 2

    def refuse(*arguments: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr("snscc_ray.data.loading.survey.examine", refuse)
    second, again = surveyed(place)
    assert again and same(first.catalog, second.catalog) and first.slices == second.slices
    # Other slices: of the same rows.
    third, again = surveyed(place, memory_mb=1)
    assert again and same(first.catalog, third.catalog)


def test_an_unreadable_image_is_still_refused(place: Path) -> None:
    surveyed(place)
    with pytest.raises(UserError, match="is corrupt"):
        surveyed(place, skip_corrupt=False)


@pytest.mark.parametrize("change", ["size", "channels", "background", "limit"])
def test_what_is_read_in_another_way_is_read_again(place: Path, change: str) -> None:
    surveyed(place)
    changed = {"size": {"image_size": 9}, "channels": {"channels": 3},
               "background": {"background": 7}, "limit": {"limit": ROWS - 5}}  # fmt: skip
    assert not surveyed(place, **changed[change])[1]


def test_a_changed_file_is_read_again(place: Path) -> None:
    first, _ = surveyed(place)
    file = sorted(place.iterdir())[0]
    os.utime(file, (1, 1))
    second, again = surveyed(place)
    assert not again and same(first.catalog, second.catalog)
    file.rename(place / f"z{file.name}")
    assert not surveyed(place)[1]
    assert surveyed(place)[1]


def test_a_damaged_or_unwritable_cache_is_no_error(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = surveyed(place)
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    whole = kept.read_bytes()
    for damaged in (b"", whole[:200], whole[:60] + b"\0\1" + whole[62:]):
        kept.write_bytes(damaged)
        second, again = surveyed(place)
        assert not again and same(first.catalog, second.catalog)
    assert surveyed(place)[1]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(surveyed(place)[0].catalog, first.catalog)


def test_a_survey_that_was_stopped_is_not_kept(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is corrupt"):
        surveyed(place, skip_corrupt=False)
    assert not list((tmp_path / "cache").rglob("*.npz"))
