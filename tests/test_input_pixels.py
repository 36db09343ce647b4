"""How images of all kinds become 8 bits of grey or colour: alike for a whole set, and said."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from snscc_ray.config.overrides import override
from snscc_ray.config.settings import DataSettings, Recipe
from snscc_ray.data.decode import OWN_RANGE, Reading, UnreadableImage, decode_into
from snscc_ray.data.imageset import assemble
from snscc_ray.data.loading.survey import survey
from snscc_ray.data.look import inspect_images, resolve_reading
from snscc_ray.data.sources import list_rows
from snscc_ray.runs.folder import first_difference
from tests.conftest import digits_table
from tests.test_predict import images
from tests.test_sources import encoded, picture, pixels, settings

STEPS = np.linspace(0, 1, 16 * 16).reshape(16, 16)


def deep(low: float, high: float, kind: str) -> Image.Image:
    return Image.fromarray((low + STEPS * (high - low)).astype(kind))


def write(folder: Path, *made: Image.Image) -> Path:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(made, len(list(folder.iterdir()))):
        image.save(folder / f"{number:03}.tif")
    return folder


# --------------------------------------------------------------------------- more than 8 bits


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0, 255, "u2"), (0, 1023, "u2"), (0, 4095, "u2"), (0, 65535, "u2"), (0, 255, "i4"),
     (-1000, 3000, "i4"), (0, 1, "f4"), (-2.5, 7.5, "f4"), (0, 3e5, "i4")],
)  # fmt: skip
def test_a_sets_own_range_is_black_to_white(
    tmp_path: Path, low: float, high: float, kind: str
) -> None:
    dark = deep(low, low + (high - low) / 4, kind)
    folder = write(tmp_path / "set", deep(low, high, kind), dark)
    data, rows = resolve_reading(
        settings("auto", folder, channels=1), list_rows(settings("auto", folder))
    )
    assert data.value_range == (low, high)
    assert f"{low:g} is black and {high:g} white" in rows.notes[0]
    found = assemble(rows, data, 1, None)
    whole, quarter = found.images[:, 0].numpy()
    assert whole.min() == 0 and whole.max() == 255 and len(np.unique(whole)) > 200
    assert quarter.min() == 0 and 60 <= quarter.max() <= 65  # the same for all: it stays dark
    assert found.catalog.notes == rows.notes
    streamed = survey(rows, data, workers=1).catalog
    assert streamed.fingerprint == found.catalog.fingerprint and streamed.notes == rows.notes
    assert inspect_images(list_rows(data)).value_range == (low, high)


def test_8_bits_in_16_are_as_they_are() -> None:
    plain = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = pixels(encoded(Image.fromarray(plain.astype(np.uint16)), "TIFF"), channels=1)
    np.testing.assert_array_equal(found[..., 0], plain)


def test_a_range_that_nobody_knows_is_not_guessed(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", deep(0, 1023, "u2"))
    rows = list_rows(settings("auto", folder))
    with pytest.raises(UnreadableImage, match=r"values, 0 to 1023.*data.value_range=\[LOW,HIGH\]"):
        decode_into(folder / "000.tif", np.empty((1, 16, 16), np.uint8), rows.reading)
    given = settings("auto", folder, value_range=(0, 2047))
    data, rows = resolve_reading(given, list_rows(given))
    assert data.value_range == (0, 2047) and "the sampled ones go from 0 to 1023" in rows.notes[0]
    assert assemble(rows, data, 1, None).images.max() <= 128


def test_what_are_no_numbers_is_unreadable() -> None:
    for bad in (np.nan, np.inf):
        values = STEPS.astype(np.float32)
        values[3, 3] = bad
        with pytest.raises(UnreadableImage, match="NaN or infinite"):
            pixels(encoded(Image.fromarray(values), "TIFF"))


def test_a_constant_deep_image_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", deep(7, 7, "u2"), deep(7, 7, "f4"))
    data, rows = resolve_reading(settings("auto", folder), list_rows(settings("auto", folder)))
    assert not assemble(rows, data, 1, None).images.any()


def test_colour_of_16_bits_that_holds_less_is_not_read_as_black() -> None:
    def png(values: np.ndarray) -> bytes:
        import struct
        import zlib

        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in parts
        )

    colour = np.repeat((STEPS[..., None] * 65535).astype(np.uint16), 3, 2)
    assert len(np.unique(pixels(png(colour)))) > 200
    with pytest.raises(UnreadableImage, match="16 bits per channel"):
        pixels(png(colour // 64))


def test_a_recipe_says_what_was_found_and_goes_on_with_it(tmp_path: Path, tiny: Recipe) -> None:
    folder = write(tmp_path / "set", deep(0, 1023, "u2"))
    wish = override(tiny, ["data.source=auto", f"data.path={folder}"])
    data, _ = resolve_reading(wish.data, list_rows(wish.data))
    recipe = wish.model_copy(update={"data": data})
    assert recipe.data.value_range == (0, 1023)
    there, here = recipe.model_dump(mode="json"), wish.model_dump(mode="json")
    assert first_difference(there, here) is None  # --resume with the command that began it
    other = override(wish, ["data.value_range=[0,5]"]).model_dump(mode="json")
    assert "value_range" in str(first_difference(there, other))


# ------------------------------------------------------------------------------- transparency


def icon(grey: int, mode: str) -> Image.Image:
    """A bar of one grey on nothing."""
    bar = np.zeros((16, 16, 4), np.uint8)
    bar[..., :3] = grey
    bar[6:10, 2:14, 3] = 255
    image = Image.fromarray(bar)
    if mode == "P":
        plain = Image.new("P", (16, 16), 0)
        plain.putpalette([1, 2, 3, grey, grey, grey])
        plain.paste(1, (2, 6, 14, 10))
        plain.info["transparency"] = 0
        return plain
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(
    ("greys", "background"), [((0, 90), None), ((255, 250), 0), ((255, 0), 128), ((128,), None)]
)
def test_transparent_images_can_be_seen(
    tmp_path: Path, mode: str, greys: tuple[int, ...], background: int | None
) -> None:
    for number, grey in enumerate(greys):
        image = icon(grey, mode)
        image.save(tmp_path / f"{number}.png", **({"transparency": 0} if mode == "P" else {}))
    data, rows = resolve_reading(settings("auto", tmp_path), list_rows(settings("auto", tmp_path)))
    assert data.background == background
    assert bool(rows.notes) == (background is not None)
    for image in assemble(rows, data, 1, None).images:
        assert int(image.max()) - int(image.min()) > 100
        behind = 255 if background is None else background
        assert int(image[0, 0, 0]) == behind
    told = settings("auto", tmp_path, background=200)
    assert resolve_reading(told, list_rows(told))[0].background == 200


def test_wholly_transparent_and_wholly_opaque_images_decide_nothing(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (255, 255, 255, 0)).save(tmp_path / "none.png")
    Image.new("RGBA", (16, 16), (255, 255, 255, 255)).save(tmp_path / "all.png")
    assert inspect_images(list_rows(settings("auto", tmp_path))).background is None


# ------------------------------------------------------------ frames, sizes, what else there is


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_counts_and_it_is_said(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    file = tmp_path / f"a.{kind.lower()}"
    first.save(file, kind, save_all=True, append_images=[second])
    picture().save(tmp_path / "b.png")
    _, rows = resolve_reading(settings("auto", tmp_path), list_rows(settings("auto", tmp_path)))
    assert rows.notes == (
        "images with several frames or pages (1 of 2 sampled): only the first is read",
    )
    found = pixels(file.read_bytes()).reshape(-1, 3).mean(0)
    assert found[0] > 200 and found[2] < 50


def test_much_text_beside_the_pixels_does_no_harm() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    np.testing.assert_array_equal(pixels(encoded(picture(), pnginfo=info)), np.asarray(picture()))


def test_large_images_are_read_without_a_word(tmp_path: Path) -> None:
    Image.new("L", (12000, 9000), 128).save(tmp_path / "large.jpg", quality=30)
    program = (
        "import sys, numpy, pathlib; from snscc_ray.data.decode import decode_into\n"
        "out = numpy.empty((1, 16, 16), numpy.uint8)\n"
        "decode_into(pathlib.Path(sys.argv[1]), out); print(out.min(), out.max())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "large.jpg"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("128 128\n", "")
    assert Reading().max_pixels == DataSettings.model_fields["max_pixels"].default > 200_000_000


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_the_smallest_images_are_read(mode: str, size: tuple[int, int]) -> None:
    values = np.full(size[::-1], 200)
    image = (
        Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
        if mode in ("I;16", "F")
        else Image.fromarray(values.astype(np.uint8)).convert(mode)
    )
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "F") else "PNG"
    for channels in (1, 3):
        assert pixels(encoded(image, kind), channels=channels).shape == (16, 16, channels)


def test_a_format_that_starts_programs_stays_unknown() -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "EPS")
    with pytest.raises(UnreadableImage):
        decode_into(buffer.getvalue(), np.empty((3, 16, 16), np.uint8), OWN_RANGE)


# ------------------------------------------------------------------- what commands make of it


def snscc(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snscc_ray", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


QUICK = [
    "--set=encoder.width=4",
    *(f"--set={stage}.epochs=1" for stage in ("pretrain", "train", "boost")),
]


def test_all_that_is_assumed_is_on_the_console_and_in_the_report(tmp_path: Path) -> None:
    folder = images(tmp_path / "scans", digits_table(40))
    for file in sorted(folder.glob("*.png")):
        grey = np.asarray(Image.open(file)).astype(np.uint16) * 4
        Image.fromarray(grey).save(file)
    (folder / "notes.txt").write_text("no image")
    run = tmp_path / "run"
    done = snscc("fit", folder, "--clusters", 2, "--out", run, "--device", "cpu", *QUICK)
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    notes = json.loads((run / "metrics.json").read_text())["notes"]
    assert len(notes) == 2
    for said, where in ((".txt (1)", notes[0]), ("is black and 1020 white", notes[1])):
        assert said in where and said in done.stdout and said in page
    recipe = json.loads((run / "recipe.json").read_text())["recipe"]
    assert recipe["data"]["value_range"] == [0, 1020]
    done = snscc("predict", run, folder, "-o", tmp_path / "y.parquet")
    assert done.returncode == 0 and ".txt (1)" in done.stdout and "1020 white" in done.stdout
    done = snscc("pack", folder, tmp_path / "shards", "--image-size", 4)
    assert done.returncode == 0 and ".txt (1)" in done.stdout, done.stderr
    packed = list_rows(settings("auto", tmp_path / "shards"))
    assert inspect_images(packed).value_range == (
        0,
        1020,
    )  # no image was brought to 8 bits by itself


@pytest.mark.slow
def test_a_few_images_are_enough_and_as_many_clusters_as_are_asked_for(tmp_path: Path) -> None:
    few = images(tmp_path / "few", digits_table(20))
    done = snscc("fit", few, "--out", tmp_path / "a", "--device", "cpu", *QUICK)
    assert done.returncode == 0, done.stderr
    more = images(tmp_path / "more", digits_table(40))  # a batch is 16
    words = ("--clusters", 17, "--out", tmp_path / "b", "--device", "cpu")
    done = snscc("fit", more, *words, *QUICK)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_images_that_are_all_the_same_are_not_counted(tmp_path: Path) -> None:
    for number in range(24):
        picture().save(tmp_path / f"{number}.png")
    run = tmp_path / "run"
    done = snscc("fit", tmp_path, "--out", run, "--device", "cpu", *QUICK)
    assert done.returncode == 2 and not run.exists()
    assert "all 24 images are identical, so there is nothing to cluster" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = snscc("fit", tmp_path, "--clusters", 2, "--out", run, "--device", "cpu", *QUICK)
    assert done.returncode == 0 and "ConvergenceWarning" not in done.stdout + done.stderr
    assert "only 1 of the 24 images are different" in done.stdout
    assert "only 1 of the 24 images are different" in (run / "report.html").read_text()


def test_the_limits_of_pillow_stay_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 7)
    out = np.zeros((3, 8, 8), np.uint8)
    decode_into(encoded(Image.new("RGB", (40, 40)), "PNG"), out)  # 16 times what they allow
    with pytest.raises(UnreadableImage):
        decode_into(b"none", out)
    assert (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK) == (100, 7)


def test_importing_leaves_the_limits_of_pillow_alone() -> None:
    program = (
        "from PIL import Image, PngImagePlugin as png;"
        "before = Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK;"
        "import snscc_ray.data.decode;"
        "assert (Image.MAX_IMAGE_PIXELS, png.MAX_TEXT_CHUNK) == before and before[0]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
