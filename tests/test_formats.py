"""AVIF, HEIC and camera RAW: real files, with and without the packages that read them."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from snscc_ray.cli import options
from snscc_ray.config.errors import UserError
from snscc_ray.data.decode import UnreadableImage, decode_into
from snscc_ray.data.formats import HEIC, PILLOW, RAW, kind_at_beginning, kind_of
from snscc_ray.data.look import inspect_images
from snscc_ray.data.sources import list_rows, load_images
from tests.test_cli import Snscc
from tests.test_sources import encoded, settings, write_images

ORIENTATION = 0x0112


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the extra `photos`."""
    for module in ("pillow_heif", "rawpy"):
        monkeypatch.setitem(sys.modules, module, None)


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Red above and blue below on the left, and green above and white below on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 200
    pixels[height // 2 :, : width // 2, 2] = 200
    pixels[: height // 2, width // 2 :, 1] = 200
    pixels[height // 2 :, width // 2 :] = 200
    return Image.fromarray(pixels)


def heic(image: Image.Image, turned: int | None = None) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    if turned is not None:
        exif[ORIENTATION] = turned
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=95, exif=exif.tobytes())
    return file.getvalue()


def dng(image: Image.Image, turned: int = 1, preview: Image.Image | None = None) -> bytes:
    """A digital negative: each pixel holds one of the colours of `image`, linear, 16 bits.

    preview: a small RGB picture in the first directory, with the negative in a sub-directory, as
    cameras do it.
    """
    linear = (np.asarray(image, np.float64) / 255) ** 2.2 * 60_000
    rows, columns = np.indices(linear.shape[:2])
    sensor = np.take_along_axis(linear, (rows % 2 + columns % 2)[..., None], 2)[..., 0]
    about: list[tuple[int, int, list[int] | bytes]] = [
        (50706, 1, bytes((1, 4, 0, 0))),  # DNGVersion
        (50708, 2, b"Made by hand\0"),
        (50721, 10, [10, 10, 0, 10, 0, 10, 0, 10, 10, 10, 0, 10, 0, 10, 0, 10, 10, 10]),  # matrix
        (50728, 5, [1, 1, 1, 1, 1, 1]),  # AsShotNeutral
        (271, 2, b"Hand\0"),
        (272, 2, b"Made\0"),
        (ORIENTATION, 3, [turned]),
    ]
    negative = picture_tags(sensor.astype("<u2").tobytes(), image.size, 32803, [16])
    negative += [(33421, 3, [2, 2]), (33422, 1, bytes((0, 1, 1, 2))), (50717, 4, [60_000])]
    if preview is None:
        return tiff([[*about, *negative]])
    first = picture_tags(preview.tobytes(), preview.size, 2, [8, 8, 8])
    return tiff([[*about, *first, (254, 4, [1])], [*negative, (254, 4, [0])]])


def picture_tags(
    pixels: bytes, size: tuple[int, int], photometric: int, bits: list[int]
) -> list[tuple[int, int, list[int] | bytes]]:
    return [
        (256, 4, [size[0]]), (257, 4, [size[1]]), (258, 3, bits), (259, 3, [1]),
        (262, 3, [photometric]), (273, 7, pixels), (277, 3, [len(bits)]), (278, 4, [size[1]]),
        (279, 4, [len(pixels)]), (284, 3, [1]),
    ]  # fmt: skip


def tiff(directories: list[list[tuple[int, int, list[int] | bytes]]]) -> bytes:
    """Write directories of (tag, type, values); all but the first are sub-directories of it.

    Tag 273 gets the pixels, and points to them.
    """
    codes = {3: "H", 4: "I", 5: "I", 10: "i"}
    content, places = bytearray(b"II*\0" + bytes(4)), []
    for directory in reversed(directories):
        tags = [*directory, *([(330, 4, places[:])] if places else [])]
        entries = b""
        for tag, kind, values in sorted(tags, key=lambda entry: entry[0]):
            if tag == 273:
                assert isinstance(values, bytes)
                entries += struct.pack("<HHII", tag, 4, 1, len(content))
                content += values
                continue
            if isinstance(values, bytes):
                packed, count = values, len(values)
            else:
                packed = struct.pack(f"<{len(values)}{codes[kind]}", *values)
                count = len(values) // 2 if kind in (5, 10) else len(values)
            if len(packed) > 4:
                content += bytes(len(content) % 2)
                packed, content = struct.pack("<I", len(content)), content + packed
            entries += struct.pack("<HHI", tag, kind, count) + packed.ljust(4, b"\0")
        content += bytes(len(content) % 2)
        places.append(len(content))
        content += struct.pack("<H", len(tags)) + entries + bytes(4)
    content[4:8] = struct.pack("<I", places[-1])
    return bytes(content)


def decoded(content: bytes, size: int = 16) -> np.ndarray:
    pixels = np.empty((3, size, size), np.uint8)
    decode_into(content, pixels)
    return pixels


def corners(content: bytes) -> list[str]:
    """The colours at the four corners of an upright picture, from the top left in reading order."""
    pixels = decoded(content).astype(int)
    names = []
    for row, column in ((2, 2), (2, 13), (13, 2), (13, 13)):
        red, green, blue = (pixels[channel, row, column] > 110 for channel in range(3))
        colours = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
        names.append(colours.get((int(red), int(green), int(blue)), "?"))
    return names


UPRIGHT, CLOCKWISE = ["red", "green", "blue", "white"], ["blue", "red", "white", "green"]


def test_avif_and_heic_hold_the_picture_and_heic_is_turned() -> None:
    assert corners(encoded(scene(), "AVIF")) == UPRIGHT
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    assert corners(encoded(scene(), "AVIF", exif=turned)) == CLOCKWISE
    assert corners(heic(scene())) == UPRIGHT
    assert corners(heic(scene(), turned=6)) == CLOCKWISE
    assert corners(heic(scene(), turned=3)) == UPRIGHT[::-1]
    exact, close = (decoded(content).astype(int) for content in (encoded(scene()), heic(scene())))
    assert np.abs(exact - close).mean() < 4


def test_a_raw_file_is_developed_and_turned() -> None:
    pytest.importorskip("rawpy")
    assert corners(dng(scene())) == UPRIGHT
    assert corners(dng(scene(), turned=6)) == CLOCKWISE
    large = dng(scene(480, 320))  # half the size is enough for 16 pixels
    assert corners(large) == UPRIGHT
    with pytest.raises(UnreadableImage):
        decoded(large[:600])


def test_the_preview_in_a_raw_file_is_not_taken_for_the_picture() -> None:
    """Pillow alone reads the first directory, which is grey here."""
    content = dng(scene(), preview=Image.new("RGB", (24, 16), (90, 90, 90)))
    assert Image.open(io.BytesIO(content)).size == (24, 16)
    assert kind_of(content) == RAW
    pytest.importorskip("rawpy")
    assert corners(content) == UPRIGHT


def test_a_kind_is_known_by_the_bytes() -> None:
    assert kind_of(dng(scene())) == RAW
    for mode in ("RGB", "L", "I;16"):
        assert kind_of(encoded(Image.new(mode, (8, 8)), "TIFF")) == PILLOW
    pages = io.BytesIO()
    scene().save(pages, "TIFF", save_all=True, append_images=[scene()] * 40)
    assert kind_of(pages.getvalue()) == kind_of(pages.getvalue()[:50]) == PILLOW
    box = b"\0\0\0\x1cftyp"
    assert kind_of(box + b"heic\0\0\0\0mif1heic") == HEIC
    assert kind_of(box + b"mif1\0\0\0\0mif1heicmiaf") == HEIC
    assert kind_of(box + b"mif1\0\0\0\0mif1avifmiaf") == PILLOW
    assert kind_of(box + b"crx \0\0\0\1crx isom") == RAW
    for begin in (
        b"FUJIFILMCCD-RAW 0201",
        b"IIRO\x08\0\0\0",
        b"IIU\0\x18\0\0\0",
        b"II*\0\x10\0\0\0CR\2\0",
    ):
        assert kind_of(begin + bytes(40)) == RAW
    assert kind_at_beginning(box + b"isom\0\0\2\0isomiso2", ".mp4") is None
    assert kind_at_beginning(b"II*\0\x08\0\0\0", ".nef") == RAW
    assert kind_at_beginning(b"II*\0\x08\0\0\0", ".tif") == PILLOW


def album(folder: Path) -> Path:
    """A PNG and another called JPEG, two HEIC files and another called JPEG, and two RAW files."""
    write_images(folder, "a.png")
    (folder / "png.jpg").write_bytes(encoded(scene()))
    for name in ("p.HEIC", "trip/q.heic", "heic.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(heic(scene()))
    for name in ("r.dng", "trip/s.NEF"):
        (folder / name).write_bytes(dng(scene()))
    return folder


def test_an_album_is_read_whole(tmp_path: Path) -> None:
    pytest.importorskip("rawpy")
    rows = list_rows(settings("auto", album(tmp_path / "album")))
    assert rows.notes == () and len(rows.ids) == 7
    found = load_images(settings("auto", tmp_path / "album", image_size=32, channels=3))
    assert len(found) == 7 and found.catalog.skipped == ()
    seen = inspect_images(rows)
    assert (seen.sampled, seen.unreadable, seen.grey, seen.side) == (7, "", False, 64)


def test_without_the_packages_each_kind_is_counted_and_named(tmp_path: Path, without: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "pillow_heif")
        place = album(tmp_path / "album")
    rows = list_rows(settings("auto", place))
    assert rows.ids == ["a.png", "heic.jpg", "png.jpg"]
    assert rows.notes == (
        "left out: 2 HEIC files, the first of them 'p.HEIC'; to read them, pip install pillow-heif",
        "left out: 2 camera RAW files, the first of them 'r.dng'; to read them, pip install rawpy",
    )
    # Files with the name of an image are not opened before they are read.
    data = settings("auto", place, image_size=32, channels=3, skip_corrupt=True)
    [(name, reason)] = load_images(data).catalog.skipped
    assert name == "heic.jpg" and reason == "it is HEIC; to read it, pip install pillow-heif"
    with pytest.raises(UnreadableImage, match="camera RAW; to read it, pip install rawpy"):
        decoded((place / "r.dng").read_bytes())
    for file in ("a.png", "png.jpg", "heic.jpg"):
        (place / file).unlink()
    with pytest.raises(UserError, match=r"no images in .*2 HEIC files.*pip install rawpy"):
        list_rows(settings("auto", place))


def test_pack_keeps_such_files_or_makes_jpegs_of_them(snscc: Snscc, tmp_path: Path) -> None:
    pytest.importorskip("rawpy")
    place = album(tmp_path / "album")
    assert snscc("pack", place, tmp_path / "whole", "--jobs", 1).status == 0
    table = pq.read_table(tmp_path / "whole" / "part-00000.parquet")
    for name, image in zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True):
        assert image == (place / name).read_bytes()
    done = snscc("pack", place, tmp_path / "small", "--jobs", 1, "--image-size", 32)
    assert done.status == 0, done
    table = pq.read_table(tmp_path / "small" / "part-00000.parquet")
    stored = dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
    for name in ("p.HEIC", "trip/q.heic", "heic.jpg", "r.dng", "trip/s.NEF"):
        assert Image.open(io.BytesIO(stored[name])).format == "JPEG"
        assert corners(stored[name]) == UPRIGHT
    shards = load_images(settings("auto", tmp_path / "whole", image_size=32, channels=3))
    folder = load_images(settings("auto", place, image_size=32, channels=3))
    assert shards.catalog.fingerprint == folder.catalog.fingerprint


def test_pack_says_what_it_leaves_out(snscc: Snscc, tmp_path: Path, without: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "pillow_heif")
        place = album(tmp_path / "album")
    done = snscc("pack", place, tmp_path / "out", "--jobs", 1, "--skip-corrupt")
    assert done.status == 0 and "pip install pillow-heif" in done.out and "2 camera RAW" in done.out


def test_doctor_says_which_kinds_can_be_read(snscc: Snscc, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rawpy")
    assert "read with rawpy" in snscc("doctor").out
    monkeypatch.setitem(sys.modules, "rawpy", None)
    assert "not read; pip install rawpy" in snscc("doctor").out
