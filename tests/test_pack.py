"""Packing a folder of images: what a reader gets, what a kill leaves, what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from snscc_ray import cli
from snscc_ray.cli.options import out as console
from snscc_ray.config.paths import as_path
from snscc_ray.config.settings import DataSettings
from snscc_ray.data import pack
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.pack import folder as pack_folder
from snscc_ray.data.pack import shard as pack_shard
from snscc_ray.data.sources import load_images
from tests.test_cli import Snscc, command, content, environment, refused, start


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(console, "width", 160)
    return Snscc(capsys)


def load(path: Path, **more: Any) -> ImageSet:
    values = {"source": "auto", "num_clusters": 2, "image_size": 16, "channels": 3, **more}
    return load_images(DataSettings(path=str(path), **values), workers=1)


def noise(seed: int, side: int = 16) -> Image.Image:
    """An image that does not compress: `side`² × 3 bytes as PNG."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_photos(root: Path, count: int = 12, side: int = 16) -> Path:
    """`count` PNG files in two sub-folders."""
    for number in range(count):
        file = root / ("cat", "dog")[number % 2] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(number, side).save(file, compress_level=1)
    return root


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of half a megabyte."""
    return write_photos(tmp_path_factory.mktemp("large") / "photos", 60, 410)


@pytest.fixture(scope="module")
def packed_once(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`large` in shards of 1 MB, written by one process."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        words = ["snscc", "pack", str(large), str(out), "--shard-mb", "1", "--jobs", "1"]
        patch.setattr("sys.argv", words)
        cli.main()
    assert exit.value.code == 0
    return out


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """Shards of `large` that a test may spoil."""
    return Path(shutil.copytree(packed_once, tmp_path / "packed"))


def manifest(out: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((out / pack.MANIFEST).read_text())
    return held


def finished(out: Path) -> list[str]:
    """The shards that are recorded as finished."""
    if not (out / pack.MANIFEST).exists():
        return []
    return [entry["file"] for entry in manifest(out)["shards"] if "sha256" in entry]


def times(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}


# ------------------------------------------------------------------------- what a reader gets


@pytest.mark.parametrize("labelled", [False, True])
def test_shards_are_read_as_the_folder_is(labelled: bool, snscc: Snscc, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    (photos / "dog" / "deep").mkdir()
    (photos / "dog" / "003.png").rename(photos / "dog" / "deep" / "3.png")
    noise(50).save(photos / "cat" / "a.JPG", "JPEG")
    noise(51).convert("L").save(photos / "cat" / "b.tif")
    os.rename(os.fsencode(photos / "cat" / "000.png"), os.fsencode(photos / "cat") + b"/\xff.png")
    more = ["--folders-are-labels"] * labelled
    done = snscc("pack", photos, tmp_path / "out", "--jobs", 1, *more)
    assert done.status == 0, done.err
    assert "1 shard, 14 rows" in done.out and "0 skipped" in done.out
    assert f"Next: snscc fit {tmp_path / 'out'}" in done.out
    folder = load(photos, folders_are_labels=labelled)
    shards = load(tmp_path / "out")
    assert shards.catalog.ids == folder.catalog.ids and len(shards) == 14
    assert shards.images.equal(folder.images)
    assert shards.catalog.fingerprint == folder.catalog.fingerprint
    if labelled:
        assert shards.catalog.labels is not None and folder.catalog.labels is not None
        assert shards.catalog.labels.equal(folder.catalog.labels)
        assert shards.catalog.class_names == folder.catalog.class_names == ("cat", "dog")
    else:
        assert shards.catalog.labels is None and shards.catalog.class_names is None
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    stored = dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
    assert stored["cat/a.JPG"] == (photos / "cat" / "a.JPG").read_bytes()


def test_sizes_of_shards_and_row_groups(large: Path, packed_once: Path, tmp_path: Path) -> None:
    total = sum(file.stat().st_size for file in large.rglob("*.png"))
    sizes = [file.stat().st_size for file in sorted(packed_once.glob("*.parquet"))]
    assert len(sizes) == -(-total // 1_000_000) and min(sizes) > 400_000
    assert max(sizes) < 1_000_000 + 510_000  # an image is not divided
    assert abs(sum(sizes) - total) < 4_000 * len(sizes)
    table = pq.read_table(sorted(packed_once.glob("*.parquet")))
    assert table["id"].to_pylist() == load(large).catalog.ids
    out = tmp_path / "large"
    pack_here(large, out, pack.Options(shard_mb=64))
    assert len(list(out.glob("*.parquet"))) == 1
    held = pq.ParquetFile(out / "part-00000.parquet").metadata
    assert held.num_row_groups > 5
    for number in range(held.num_row_groups):
        column = held.row_group(number).column(1)
        assert column.path_in_schema == "image" and column.compression == "UNCOMPRESSED"
        assert column.total_compressed_size < 4_600_000 and not column.is_stats_set
        assert not any("DICT" in encoding for encoding in column.encodings)


def pack_here(folder: Path, out: Path, options: pack.Options, **more: Any) -> pack.Summary:
    return pack.pack(pack.Request(folder, out, options, **{"jobs": 1, **more}), console)


def test_memory_is_that_of_a_row_group(large: Path, tmp_path: Path) -> None:
    before = pa.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    try:
        found = pack_here(large, tmp_path / "out", pack.Options(shard_mb=64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.bytes > 30_000_000
    assert peak < 16_000_000
    assert pa.default_memory_pool().bytes_allocated() - before < 16_000_000


def test_larger_images_become_the_squares_a_run_sees(snscc: Snscc, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 4, 30)
    noise(7).resize((90, 40), Image.Resampling.BICUBIC).save(photos / "wide.png")
    noise(8).resize((40, 90), Image.Resampling.BICUBIC).convert("L").save(photos / "high.png")
    noise(9, 8).save(photos / "small.bmp")
    exact = load(photos)
    done = snscc("pack", photos, tmp_path / "out", "--image-size", 16, "--jobs", 1)
    assert done.status == 0, done.err
    found = load(tmp_path / "out")
    assert found.catalog.fingerprint == exact.catalog.fingerprint
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    stored = dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
    assert stored["small.bmp"] == (photos / "small.bmp").read_bytes()
    opened = {name: Image.open(io.BytesIO(image)) for name, image in stored.items()}
    assert opened["wide.png"].size == opened["high.png"].size == (16, 16)
    assert opened["high.png"].mode == "L" and opened["wide.png"].mode == "RGB"


def test_a_larger_jpeg_stays_a_jpeg_turned_upright(snscc: Snscc, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth = noise(1, 3).resize((80, 120), Image.Resampling.BICUBIC)
    smooth.save(photos / "a.jpg", quality=95, exif=turned)
    assert snscc("pack", photos, tmp_path / "out", "--image-size", 32).status == 0
    image = pq.read_table(tmp_path / "out" / "part-00000.parquet")["image"][0].as_py()
    opened = Image.open(io.BytesIO(image))
    assert opened.format == "JPEG" and opened.size == (32, 32)
    size = {"image_size": 32}
    folder, shards = (load(place, **size).images.short() for place in (photos, tmp_path / "out"))
    assert (folder - shards).abs().float().mean() < 2


def test_shards_in_an_object_store(snscc: Snscc, large: Path, packed_once: Path) -> None:
    out = as_path("memory://packed/shards")
    words = ("pack", large, out, "--shard-mb", 1, "--jobs", 1)
    assert snscc(*words).status == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content(packed_once)
    (out / "part-00003.parquet").unlink()
    refused(snscc(*words, "--verify"), "part-00003.parquet is missing")
    done = snscc(*words)
    assert done.status == 0 and "60 rows" in done.out and "images/s" in done.out
    assert "images/s" not in snscc(*words).out
    done = snscc(*words, "--verify")
    assert done.status == 0 and done.out.startswith("OK: ")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content(packed_once)


# ---------------------------------------------------------------------------- kills and stops


def test_killed_and_continued_gives_the_same_bytes(
    snscc: Snscc, large: Path, packed_once: Path, tmp_path: Path
) -> None:
    """SIGKILL in mid-pack; two processes and then one against one."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("pack", large, out, "--shard-mb", 1, "--jobs", 2), env=environment()
    )
    while not finished(out) and process.poll() is None:
        time.sleep(0.002)
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    # Its processes end too: none writes on beside the next command.
    assert psutil.wait_procs(below, timeout=20)[1] == [] and len(below) >= 3
    written = times(out)
    kept = {name: written[name] for name in finished(out)}
    assert 0 < len(kept) < len(times(packed_once))
    (out / ".part-00007.parquet.abcdefgh").write_bytes(b"cut short")
    (out / ".pack.json.abcdefgh").write_bytes(b"{")
    (out / ".mine").write_text("mine")
    done = snscc("pack", large, out, "--shard-mb", 1, "--jobs", 1)
    assert done.status == 0, done.err
    assert kept.items() <= times(out).items()
    assert content(out) == {".mine": b"mine", **content(packed_once)}


def test_ctrl_c_leaves_nothing_half_written(
    snscc: Snscc,
    large: Path,
    packed_once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A terminal sends it to all processes."""
    record = pack_folder.write_json

    def interrupt(path: Path, value: Any) -> None:
        record(path, value)
        if finished(out):
            for process in psutil.Process().children(recursive=True):
                process.send_signal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "out"
    words = ("pack", large, out, "--shard-mb", 1)
    monkeypatch.setattr(pack_folder, "write_json", interrupt)
    refused(snscc(*words, "--jobs", 2), "stopped; run the same command again", status=130)
    monkeypatch.undo()
    assert finished(out) and len(times(out)) < len(times(packed_once))
    assert not [name for name in content(out) if name.startswith(".")]
    assert snscc(*words, "--jobs", 2).status == 0
    assert content(out) == content(packed_once)


def test_a_finished_pack_is_left_alone_and_a_missing_shard_is_written_again(
    snscc: Snscc, large: Path, packed: Path, packed_once: Path
) -> None:
    before = times(packed)
    words = ("pack", large, packed, "--shard-mb", 1, "--jobs", 1)
    done = snscc(*words)
    assert done.status == 0 and "60 rows" in done.out and "images/s" not in done.out
    assert times(packed) == before
    (packed / "part-00003.parquet").unlink()
    (packed / "part-00005.parquet").write_bytes(b"cut")
    assert snscc(*words).status == 0
    assert content(packed) == content(packed_once)
    changed = {name for name, time in times(packed).items() if before[name] != time}
    assert changed == {"part-00003.parquet", "part-00005.parquet"}


def test_a_full_disk_is_one_line_and_finished_shards_are_kept(
    snscc: Snscc, large: Path, packed: Path, packed_once: Path
) -> None:
    (packed / "part-00003.parquet").unlink()
    limit = 500_000
    done = start("pack", large, packed, "--shard-mb", 1, "--jobs", 1, file_limit=limit)
    refused(done, "no space left", "part-00003.parquet", "the same command", "finished shards")
    assert not [name for name in content(packed) if name.startswith(".")]
    assert snscc("pack", large, packed, "--shard-mb", 1, "--jobs", 1).status == 0
    assert content(packed) == content(packed_once)


# ------------------------------------------------------------------------------- corrupt images


@pytest.mark.parametrize("jobs", [1, 2])
def test_corrupt_images(jobs: int, snscc: Snscc, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 12, 410)
    whole = (photos / "cat" / "008.png").read_bytes()
    (photos / "cat" / "008.png").write_bytes(whole[:-1000])
    (photos / "dog" / "005.png").write_bytes(b"a,\n'b'")
    (photos / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    out = tmp_path / "out"
    words = ("pack", photos, out, "--shard-mb", 1, "--jobs", jobs)
    refused(snscc(*words), "image 'cat/008.png'", "is corrupt", "--skip-corrupt")
    before = times(out)
    assert finished(out) and "part-00000.parquet" in before
    done = snscc(*words, "--skip-corrupt")
    assert done.status == 0, done.err
    assert before.items() <= times(out).items()  # the advice costs no finished shard
    assert "10 rows" in done.out and "3 skipped" in done.out
    assert str(out / "skipped.csv") in done.out
    with (out / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    folder = load(photos, skip_corrupt=True)
    assert rows[0] == ["id", "reason"]
    assert [row[0] for row in rows[1:]] == [name for name, _ in folder.catalog.skipped]
    assert all(reason for _, reason in rows)
    assert load(out).catalog.fingerprint == folder.catalog.fingerprint
    assert snscc(*words, "--verify").status == 0
    # What was left out is not passed over by a command that does not allow it.
    refused(snscc(*words), "image 'cat/008.png'", "is corrupt", "--skip-corrupt")


def test_nothing_but_corrupt_images(snscc: Snscc, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).write_bytes(b"junk")
    done = snscc("pack", tmp_path / "photos", tmp_path / "out", "--skip-corrupt")
    refused(done, "no image in", "the first of 2, 'a.png'", "not an image")


# -------------------------------------------------------------------------- changes and damage


def test_changed_images_and_options_are_refused(snscc: Snscc, tmp_path: Path) -> None:
    photos, out = write_photos(tmp_path / "photos", 12, 410), tmp_path / "out"
    words = ("pack", photos, out, "--shard-mb", 1, "--jobs", 1)
    assert snscc(*words).status == 0
    before = content(out)
    refused(snscc(*words[:3]), "begun with shard_mb 1, not 64", "--overwrite")
    refused(snscc(*words, "--folders-are-labels"), "folders_are_labels False, not True")
    refused(snscc(*words, "--image-size", 64), "image_size None, not 64")
    file = photos / "dog" / "003.png"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    refused(snscc(*words), "images have changed", "--overwrite", "'dog/0")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert snscc(*words).status == 0
    noise(99, 410).save(photos / "zebra.png")
    refused(snscc(*words), "images have", "since", "--overwrite")
    assert content(out) == before
    assert snscc(*words, "--overwrite").status == 0
    assert load(out).catalog.fingerprint == load(photos).catalog.fingerprint
    assert snscc(*words[:3], "--jobs", 1, "--overwrite").status == 0
    assert sorted(file.name for file in out.iterdir()) == ["pack.json", "part-00000.parquet"]


def test_an_image_that_changes_meanwhile_is_refused(
    snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos")
    prepare = pack_folder.prepare

    def late(*arguments: Any) -> Any:
        noise(99, 17).save(photos / "dog" / "003.png")
        return prepare(*arguments)

    monkeypatch.setattr(pack_folder, "prepare", late)
    done = snscc("pack", photos, tmp_path / "out", "--jobs", 1, "--skip-corrupt")
    refused(done, "dog/003.png has changed", "--overwrite")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_verify_finds_a_flipped_byte_and_the_advice_works(
    snscc: Snscc, large: Path, packed: Path, packed_once: Path
) -> None:
    words = ("pack", large, packed, "--shard-mb", 1, "--jobs", 1)
    done = snscc(*words, "--verify")
    assert done.status == 0 and done.out.startswith("OK: ")
    file = packed / "part-00002.parquet"
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    file.write_bytes(spoilt)
    done = snscc(*words, "--verify")
    refused(done, f"{file} is broken", "remove it", "without --verify")
    assert file.read_bytes() == spoilt
    file.unlink()
    refused(snscc(*words, "--verify"), f"{file} is missing", "without --verify")
    assert snscc(*words).status == 0
    assert content(packed) == content(packed_once)
    held = manifest(packed)
    del held["shards"][4]["sha256"]
    (packed / pack.MANIFEST).write_text(json.dumps(held))
    refused(snscc(*words, "--verify"), "not finished", "without --verify")


def test_a_shard_that_does_not_read_back_is_not_kept(
    snscc: Snscc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole = pack_shard.write_whole

    def spoil(path: Path, write: Any) -> None:
        def spoilt(file: IO[bytes]) -> None:
            kept = io.BytesIO()
            write(kept)
            flipped = bytearray(kept.getvalue())
            flipped[len(flipped) // 2] ^= 1
            file.write(flipped)

        write_whole(path, spoilt)

    photos = write_photos(tmp_path / "photos")
    monkeypatch.setattr(pack_shard, "write_whole", spoil)
    done = snscc("pack", photos, tmp_path / "out", "--jobs", 1)
    refused(done, "part-00000.parquet cannot be read back", "same command again")
    assert not list((tmp_path / "out").glob("*.parquet")) and not finished(tmp_path / "out")
    monkeypatch.undo()
    assert snscc("pack", photos, tmp_path / "out", "--jobs", 1).status == 0


# ----------------------------------------------------------------------------------- refusals


def test_bad_folders_are_refused(snscc: Snscc, tmp_path: Path) -> None:
    photos, empty = write_photos(tmp_path / "photos"), tmp_path / "empty"
    empty.mkdir()
    out, note = tmp_path / "out", tmp_path / "note.txt"
    note.write_text("mine")
    refused(snscc("pack", tmp_path / "nowhere", out), "nowhere does not exist")
    refused(snscc("pack", note, out), "note.txt is a file")
    refused(snscc("pack", empty, out), "no images found below", ".png")
    for place in (note, note / "below"):
        refused(snscc("pack", photos, place), "note.txt is a file", "another folder")
    refused(snscc("pack", photos, photos), "lies in", "outside")
    refused(snscc("pack", photos, photos / "cat" / "out"), "lies in", "outside")
    refused(snscc("pack", photos, "/proc/self/out"), "cannot write to /proc/self/out")
    noise(1).save(photos / "loose.png")
    refused(snscc("pack", photos, out, "--folders-are-labels"), "loose.png is not in a sub-folder")
    refused(snscc("pack", photos, empty, "--verify"), "holds no pack.json")
    refused(snscc("pack", photos, out, "--verify", "--overwrite"), "give one of them")
    assert not out.exists() and not list(empty.iterdir()) and note.read_text() == "mine"


def test_labels_below_the_parts_of_a_dataset(snscc: Snscc, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for part in ("train", "val"):
        write_photos(photos / part)
    words = ("pack", photos, out, "--jobs", 1, "--folders-are-labels")
    done = snscc(*words)
    assert done.status == 0 and "labels: the names of the folders in train, val" in done.out, done
    folder, shards = load(photos, folders_are_labels=True), load(out)
    assert shards.catalog.class_names == folder.catalog.class_names == ("cat", "dog")
    assert shards.catalog.labels is not None and folder.catalog.labels is not None
    assert shards.catalog.labels.equal(folder.catalog.labels)
    # As an older version left it, with the parts as labels: not to be continued with others.
    held = json.loads((out / "pack.json").read_text())
    assert held["options"].pop("label_level") == 1
    (out / "pack.json").write_text(json.dumps(held))
    refused(snscc(*words), "label_level", "--overwrite")


def test_files_of_others_are_refused_and_left_alone(snscc: Snscc, tmp_path: Path) -> None:
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    out.mkdir()
    for name in ("part-00000.parquet", "z.parquet"):
        (out / name).write_text("mine")
        for more in ([], ["--overwrite"]):
            refused(snscc("pack", photos, out, *more), f"holds {name}", "another folder")
        assert content(out) == {name: b"mine"}
        (out / name).unlink()
    assert snscc("pack", photos, out, "--jobs", 1).status == 0
    for name in ("part-00001.parquet", "z.parquet"):
        (out / name).write_text("mine")
        for more in ([], ["--verify"]):
            refused(snscc("pack", photos, out, *more), f"holds {name}", "another folder")
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    for text in ("", "[]", '{"format": 1}', '{"format": 1, "options": {}, "shards": [3]}'):
        (out / pack.MANIFEST).write_text(text)
        refused(snscc("pack", photos, out), "pack.json", "--overwrite")
    assert snscc("pack", photos, out, "--jobs", 1, "--overwrite").status == 0


@pytest.mark.parametrize(
    "option", ["--shard-mb=0", "--shard-mb=-3", "--image-size=-1", "--jobs=-1", "--jobs=x"]
)
def test_bad_options_are_refused(option: str, snscc: Snscc, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    refused(snscc("pack", photos, tmp_path / "out", option), option.split("=")[0])
    assert not (tmp_path / "out").exists()


def test_bad_inputs_as_a_user_gives_them(tmp_path: Path) -> None:
    refused(start("pack", tmp_path / "nowhere", tmp_path / "out"), "nowhere does not exist")
    refused(start("pack", tmp_path), "OUT")


def test_frames_that_are_not_kept_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    frames = [Image.new("RGB", (40, 40), (60 * n, 0, 0)) for n in range(3)]
    frames[0].save(tmp_path / "photos" / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "photos" / "b.png")
    said = "Only the first frame or page is kept of 1 image"
    for place, more, expected in (("small", ["--image-size", "16"], True), ("whole", [], False)):
        words = ["snscc", "pack", str(tmp_path / "photos"), str(tmp_path / place), *more]
        monkeypatch.setattr(sys, "argv", [*words, "--jobs", "1"])
        for _ in range(2):  # also when all is packed already
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 0
            assert (said in capsys.readouterr().out) == expected
