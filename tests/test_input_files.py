"""What is read of a folder or of shards, what is ignored, and that it is said."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path
from snscc_ray.data.look import inspect_images
from snscc_ray.data.rows import Rows
from snscc_ray.data.sources import list_rows, load_images
from tests.test_sources import encoded, picture, settings, write_images, write_shard

KINDS = (("x.jfif", "JPEG"), ("x.jpe", "JPEG"), ("y.avif", "AVIF"), ("z.heic", "AVIF"),
         ("bare", "JPEG"), ("p.dat", "PNG"), ("t.scan", "TIFF"), ("w.bin", "WEBP"),
         ("j.x", "JPEG2000"), ("g.y", "GIF"), ("b.z", "BMP"), ("n.v", "PPM"))  # fmt: skip


def rows_of(path: Path, source: str = "auto") -> Rows:
    return list_rows(settings(source, path))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_an_image_is_known_by_what_it_holds(tmp_path: Path, name: str, kind: str) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / name).write_bytes(encoded(picture(), kind))
    (tmp_path / "notes.txt").write_text("P5 is a format, BM another\n")
    rows = rows_of(tmp_path)
    assert sorted(rows.ids) == sorted(["a.png", name])
    assert rows.notes == ("ignored, because they are not readable images: .txt (1)",)
    found = load_images(settings("auto", tmp_path)).catalog
    assert len(found) == 2 and found.notes == rows.notes


def test_what_other_programs_leave_is_no_image(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "__MACOSX/a.png", "@eaDir/thumb.jpg", ".cache/b.png", ".c.png")
    for name in (".DS_Store", "Thumbs.db", "movie.MP4"):
        (tmp_path / name).write_bytes(b"\0" * 40)
    os.mkfifo(tmp_path / "pipe.png")
    held = socket.socket(socket.AF_UNIX)
    held.bind(os.path.relpath(tmp_path / "s.png"))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "again").symlink_to(tmp_path)
    rows = rows_of(tmp_path)
    held.close()
    assert rows.ids == ["a.png", "gone.png"]  # reading names the link
    for said in ("hidden folders (1)", "hidden files (2)", "folders __MACOSX (1)", ".mp4 (1)",
                 "folders @eaDir (1)", "pipes, sockets or devices (2)", ".db (1)",
                 "folders seen already (1)"):  # fmt: skip
        assert said in rows.notes[0]


def test_an_object_store_is_looked_through_likewise(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name in ("a.png", "b.heic", "bare", ".c.png", "@eaDir/d.png"):
        store.pipe(f"/likewise/{name}", encoded(picture()))
    store.pipe("/likewise/e.txt", b"text")
    rows = list_rows(settings("auto", "memory://likewise"))
    assert rows.ids == ["a.png", "b.heic", "bare"]
    assert rows.notes[0].count("(1)") == 3


def test_nothing_known_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0" * 40)
    for source in ("auto", "folder"):
        with pytest.raises(UserError, match=r"\.heic \(1\)"):
            rows_of(tmp_path, source)


def test_a_pipe_among_given_paths_is_not_waited_for(tmp_path: Path) -> None:
    from snscc_ray.data import decode

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(decode.UnreadableImage, match="not a regular file"):
        decode.decode_into(tmp_path / "pipe.png", np.empty((1, 8, 8), np.uint8))


# ----------------------------------------------------------------- shards or files, or others


def test_a_table_without_images_hides_none(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    write_shard(tmp_path / "predictions.parquet", id=["a.png"], cluster=[0])
    for source in ("auto", "cifar10"):
        rows = rows_of(tmp_path, source) if source == "auto" else None
        if rows is not None:
            assert rows.ids == ["a.png", "b.png"]
            assert ".parquet (1)" in rows.notes[0]
    with pytest.raises(UserError, match="no column `image`"):
        rows_of(tmp_path / "predictions.parquet")


def test_of_files_and_shards_the_more_count(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "c.png")
    two = [encoded(picture(seed)) for seed in range(2)]
    write_shard(tmp_path / "s.parquet", image=two)
    files = rows_of(tmp_path)
    assert files.ids == ["a.png", "b.png", "c.png"] and ".parquet (1)" in files.notes[0]
    write_shard(tmp_path / "t.parquet", image=two)
    write_shard(tmp_path / "metadata.parquet", file_name=["a.png"])
    shards = rows_of(tmp_path)
    assert len(shards.ids) == 4
    said = "; ".join(shards.notes)
    assert "metadata.parquet" in said and "3 image files" in said


def test_the_figures_of_a_sweep_are_no_images_of_the_set(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "runs/digits-sigma/figure.png", "recipes/soup.png")
    (tmp_path / "runs" / "digits-sigma" / "sweep.json").write_text('{"recipe": {"name": "x"}}')
    (tmp_path / "recipes" / "recipe.json").write_text('{"soup": "hot"}')
    rows = rows_of(tmp_path)
    assert rows.ids == ["a.png", "recipes/soup.png"]
    assert "folders of snscc's own (1)" in rows.notes[0]


# --------------------------------------------------------------------------- labels of shards

PICTURES = [encoded(picture(seed)) for seed in range(3)]


@pytest.mark.parametrize("labels", [[-1] * 3, [None] * 3, [float("nan")] * 3, pa.nulls(3)], ids=str)
def test_images_without_a_label_need_none(tmp_path: Path, labels: object) -> None:
    rows = rows_of(write_shard(tmp_path / "x.parquet", image=PICTURES, label=labels))
    assert rows.labels is None and rows.notes == () and len(rows.ids) == 3


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["owl", "ant", "owl"], [1, 0, 1], ("ant", "owl")),
        ([0.0, 2.0, 1.0], [0, 2, 1], None),
        ([True, False, True], [1, 0, 1], None),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ("a", "b")),
    ],
    ids=["texts", "floats", "bools", "categories"],
)
def test_labels_of_all_kinds_become_classes(
    tmp_path: Path, labels: object, numbers: list[int], names: tuple[str, ...] | None
) -> None:
    rows = rows_of(write_shard(tmp_path / "x.parquet", image=PICTURES, label=labels))
    assert rows.labels is not None
    assert rows.labels.tolist() == numbers and rows.class_names == names


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, None, 1], "1 of 3 rows have no label"),
        ([0, -1, -1], "2 of 3 rows have no label"),
        ([0, -5, 1], "-5 in x.parquet is not a class"),
        ([0, 1_000_000, 1], "1000000 in x.parquet is not a class"),
        ([0.5, 1.0, float("inf")], "0.5 in x.parquet"),
        ([[0], [1], [2]], "[0] in x.parquet"),
    ],
    ids=["null", "minus", "negative", "large", "fraction", "list"],
)
def test_labels_that_cannot_measure_are_left_aside(
    tmp_path: Path, labels: object, said: str
) -> None:
    rows = rows_of(write_shard(tmp_path / "x.parquet", image=PICTURES, label=labels))
    assert rows.labels is None and said in rows.notes[0]


def test_labels_in_some_shards_only(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image=PICTURES[:1], label=[0])
    write_shard(tmp_path / "b.parquet", image=PICTURES[1:])
    rows = rows_of(tmp_path)
    assert rows.labels is None and "2 of 3 rows have no label" in rows.notes[0]


def test_a_label_of_two_names(tmp_path: Path) -> None:
    names = ["owl", "ant", "ant"]
    file = write_shard(tmp_path / "x.parquet", image=PICTURES, label=[0] * 3, class_name=names)
    assert "has two names" in rows_of(file).notes[0]


# --------------------------------------------------------------- the sample is over all of it


def test_a_look_is_the_same_at_files_and_shards(tmp_path: Path) -> None:
    """Small grey images come before three times as many larger ones in colour."""
    names = []
    for row in range(440):
        small = row < 110
        image = picture(row % 7, (8, 8) if small else (20, 20), "L" if small else "RGB")
        file = tmp_path / "files" / f"{row:04}.png"
        file.parent.mkdir(exist_ok=True)
        image.save(file)
        names.append(file)
    (tmp_path / "shards").mkdir()
    for part, first in enumerate(range(0, 440, 100)):
        table = pa.table({"image": [name.read_bytes() for name in names[first : first + 100]]})
        pq.write_table(table, tmp_path / "shards" / f"{part}.parquet", row_group_size=37)
    files, shards = (inspect_images(rows_of(tmp_path / name)) for name in ("files", "shards"))
    assert files == shards
    assert files.side == 20 and not files.grey


def test_our_own_folders_are_no_images_in_a_store_either(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "sub/b.png")
    png = (tmp_path / "a.png").read_bytes()
    store = as_path("memory://owned/set")
    for name in ("a.png", "sub/b.png", "run/x.png", "sub/run/y.png", "sub/run/stage/z.png"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(png)
    for run in ("run", "sub/run"):
        (store / run / "recipe.json").write_text('{"recipe": {"name": "x"}}')
    (store / "sub" / "sweep.json").write_text('{"not": "ours"}')
    rows = list_rows(settings("auto", "memory://owned/set"))
    assert rows.ids == ["a.png", "sub/b.png"]
    assert "folders of snscc's own (2)" in rows.notes[0]


def test_a_path_without_bytes_says_so(tmp_path: Path) -> None:
    held = [{"bytes": None, "path": f"/there/{row}.png"} for row in range(30)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(held, kind)}), tmp_path / "p.parquet")
    assert "a path in it is not followed" in inspect_images(rows_of(tmp_path)).unreadable


def test_looking_at_the_images_is_told(tmp_path: Path) -> None:
    """200 photographs of a camera take many seconds."""
    write_images(tmp_path, *(f"{number}.png" for number in range(5)))
    told: list[tuple[int, int]] = []
    inspect_images(rows_of(tmp_path), lambda done, total: told.append((done, total)))
    assert told == [(number, 5) for number in range(5)]
