"""Decode images to uint8 pixels of one size: one image, or many in parallel threads.

Every image takes the same steps. Values of more than 8 bits are scaled to 8 bits and transparency
is laid over one grey (`Reading` says how, the same for the whole dataset). CMYK and palettes are
converted. The image is rotated by its EXIF orientation, its shorter side is resized to the target
size (bilinear, antialiased) and its centre is cropped. An image of the target size is not
resampled. Only the first of several frames or pages is used.

Pillow does this for all formats, with pillow-heif for HEIC and rawpy for camera RAW. A JPEG of
the target size that needs only decoding goes to torchvision's decoder. It gives the same pixels
several times faster and, unlike Pillow on small images, gains from a second thread. If it fails,
Pillow decodes the image. (torchvision's PNG decoder is not used: a corrupt file can crash the
process.)
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.formats import PACKAGES, installed, kind_of, open_kind

# The bytes of a file, its path, an (H, W) or (H, W, 3) uint8 array, or None for an empty row.
Source = bytes | Path | np.ndarray | None

# Pillow reads the upper 8 of 16 bits per channel. Below this maximum the image is almost empty.
_DARKEST = 16
# Pillow warns about metadata that is not used here. Unreadable images raise an error.
warnings.filterwarnings("ignore", module=r"PIL\.")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Limits:
    """Switch off Pillow's process-wide limits while any thread decodes here.

    `Reading.max_pixels` replaces Pillow's pixel limit, because a user can set it. Pillow's limit on
    text chunks does not concern the pixels. A program that imports this keeps its own limits.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._theirs: tuple[int | None, int] = (None, 0)

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._theirs = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
                Image.MAX_IMAGE_PIXELS = None
                PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = self._theirs


without_limits = _Limits().off


class UnreadableImage(Exception):
    """This image cannot be decoded. The message gives the reason in one line."""


@dataclass(frozen=True)
class Reading:
    """How all images of a dataset are converted to 8 bits."""

    value_range: tuple[float, float] | None = None  # black and white of images of more than 8 bits
    own_range: bool = True  # if value_range is None: use each image's range, or call it unreadable
    background: int = 255  # grey behind transparent pixels
    max_pixels: int = DataSettings.model_fields["max_pixels"].default

    @staticmethod
    def of(data: DataSettings) -> Reading:
        background = 255 if data.background is None else data.background
        return Reading(data.value_range, False, background, data.max_pixels)


OWN_RANGE = Reading()  # for a single image


def decode_into(source: Source, out: np.ndarray, reading: Reading = OWN_RANGE) -> None:
    """Decode one image into `out`, uint8 (C, S, S), where C is 1 or 3.

    Raises:
        UnreadableImage: corrupt, truncated, empty, of an unknown format or far too large.
        UserError: an object store does not return the file.
    """
    try:
        with without_limits():
            _decode(source, out, reading)
    except (UnreadableImage, UserError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors on broken files
        raise UnreadableImage(why_unreadable(error)) from error


def _decode(source: Source, out: np.ndarray, reading: Reading) -> None:
    channels, size, _ = out.shape
    source = content_of(source)
    if isinstance(source, bytes):
        if _decode_directly(source, out):
            return
        image = _open(source, size, reading)
    elif source.shape == (size, size, channels):
        out[...] = source.transpose(2, 0, 1)
        return
    else:
        image = Image.fromarray(source)
    image = _upright(image, "L" if channels == 1 else "RGB", reading)
    pixels = np.asarray(_square(image, size))
    out[...] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _upright(image: Image.Image, mode: str, reading: Reading) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    image = to_mode(image, mode, reading)
    return image if turn is None else image.transpose(turn)


def whole_image(
    content: bytes | np.ndarray, reading: Reading, side: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Return a whole image, RGB and upright, and the width and height that it is stored with.

    side: a JPEG may be decoded smaller, but no side becomes less than twice this; None: in full.
    Raises UnreadableImage.
    """
    try:
        with without_limits():
            if isinstance(content, np.ndarray):
                image = Image.fromarray(content)
                return _upright(image, "RGB", reading), image.size
            size = open_image(content, reading).size
            image = _open(content, side or max(size), reading)
            return _upright(image, "RGB", reading), size
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow raises many kinds of errors on broken files
        raise UnreadableImage(why_unreadable(error)) from error


def why_unreadable(error: Exception) -> str:
    """Return the reason in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def content_of(source: Source) -> bytes | np.ndarray:
    """Return the bytes of a file, or an array. Raises UnreadableImage, OSError or UserError."""
    if source is None:
        raise UnreadableImage("the row has no image bytes (a path in it is not followed)")
    if isinstance(source, Path):
        if not stat.S_ISREG(source.stat().st_mode):  # reading a pipe would block
            raise UnreadableImage("not a regular file")
        with open(source, "rb", buffering=0) as file:
            return file.read()
    if not isinstance(source, bytes | np.ndarray):  # a URL, see paths.py
        return _fetch(source)
    return source


def _fetch(url: Path) -> bytes:
    """Read a file from an object store. A failed download does not make the image corrupt."""
    try:
        return url.read_bytes()
    except FileNotFoundError:
        raise UnreadableImage("No such file") from None
    except Exception as error:  # clients of object stores raise many kinds of errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{url} cannot be read ({reason}): check the network and the credentials, then run "
            "again"
        ) from error


def decode_all(
    batches: Iterable[Sequence[Source]],
    pixels: np.ndarray,
    workers: int,
    reading: Reading = OWN_RANGE,
) -> Generator[tuple[int, list[tuple[int, str]]]]:
    """Decode batches into consecutive rows of `pixels` (N, C, S, S), in `workers` threads.

    For each batch, in order, yields the number of rows done and the (row, reason) of each
    unreadable row. Batches are drawn only slightly ahead of the threads, to limit the encoded
    bytes in memory. 0 workers means one per available core.
    """
    workers = workers or available_cores()
    Image.init()  # here, because the threads would race for it
    pending: deque[Future[tuple[int, list[tuple[int, str]]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        start = 0
        for batch in batches:
            pending.append(pool.submit(_decode_batch, batch, pixels, start, reading))
            start += len(batch)
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Return how many cores this process may use. A container may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _decode_batch(
    batch: Sequence[Source], pixels: np.ndarray, start: int, reading: Reading
) -> tuple[int, list[tuple[int, str]]]:
    failed = []
    for row, source in enumerate(batch, start):
        try:
            decode_into(source, pixels[row], reading)
        except UnreadableImage as error:
            failed.append((row, str(error)))
    return start + len(batch), failed


# ---------------------------------------------------------------- Pillow: every image


def _open(encoded: bytes, size: int, reading: Reading) -> Image.Image:
    image = open_image(encoded, reading)
    # Decode a much larger JPEG at 1/2, 1/4 or 1/8, or a RAW file at 1/2: several times faster. Keep
    # at least twice the target size, so that the resize below still antialiases.
    image.draft(None, (2 * size, 2 * size))
    halved = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(getattr(image, "tile", ""))
    image.load()
    if halved and max(high for _, high in _extrema(image.convert("RGB"))) < _DARKEST:
        raise UnreadableImage(
            "only the upper 8 of its 16 bits per channel are read, and they are (almost) empty: "
            "save it with 8 bits per channel"
        )
    return image


def open_image(encoded: bytes, reading: Reading) -> Image.Image:
    """Open an image and read its header.

    Raises UnreadableImage if it is far too large, or of a kind that needs another package.
    """
    kind = kind_of(encoded)
    if not installed(kind):
        raise UnreadableImage(f"it is {kind}; to read it, pip install {PACKAGES[kind]}")
    image = open_kind(kind, encoded)
    if image.width * image.height > reading.max_pixels:
        raise UnreadableImage(
            f"{image.width:,} × {image.height:,} pixels are more than "
            f"data.max_pixels={reading.max_pixels}"
        )
    return image


def _extrema(image: Image.Image) -> tuple[tuple[float, float], ...]:
    return image.getextrema()  # type: ignore[return-value]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata, but the pixels may be fine
        return 1


def is_deep(image: Image.Image) -> bool:
    """Whether its values have more than 8 bits. Their range is then unknown."""
    return image.mode == "F" or image.mode.startswith("I")


def deep_range(image: Image.Image) -> tuple[float, float]:
    """Return the lowest and highest value of a deep image. Raises UnreadableImage for NaN, inf."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnreadableImage("it holds NaN or infinite values")
    return low, high


def to_mode(image: Image.Image, mode: str, reading: Reading) -> Image.Image:
    """Convert to `L` or `RGB`, of 8 bits and without transparency."""
    if is_deep(image):
        image = _to_8_bits(image, reading)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (reading.background,) * 3 + (255,))
        image = Image.alpha_composite(behind, image)
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image, reading: Reading) -> Image.Image:
    own = deep_range(image)
    if reading.value_range is None and not reading.own_range:
        raise UnreadableImage(
            f"its values, {own[0]:g} to {own[1]:g}, have more than 8 bits and an unknown range: "
            "set data.value_range=[LOW,HIGH], where LOW is black and HIGH is white"
        )
    low, high = reading.value_range or own
    # Each integer gets an equal step, so that 0 to 255 stay unchanged.
    steps = high - low + (image.mode != "F")
    values = (np.asarray(image).astype(np.float64) - low) * (256 / steps if steps else 0)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and crop the centre, in one resampling.

    Gives the pixels of torchvision's Resize and CenterCrop without computing the cropped ones.
    """
    if image.size == (size, size):
        return image
    wide, high = image.size
    width, height = (size * side // min(wide, high) for side in (wide, high))
    left, top = round((width - size) / 2), round((height - size) / 2)
    box = (
        left * wide / width,
        top * high / height,
        (left + size) * wide / width,
        (top + size) * high / height,
    )
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


# ------------------------------------------------ torchvision: JPEG that needs only decoding


@cache
def _jpeg_decoder() -> Callable[..., torch.Tensor] | None:
    """Return torchvision's JPEG decoder, or None if torchvision was built without it.

    This is the operator, not `torchvision.io.decode_jpeg`: that wrapper warns on every call,
    because torchvision plans to move decoding elsewhere.
    """
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None


def _decode_directly(encoded: bytes, out: np.ndarray) -> bool:
    """Decode into `out` (C, S, S) without Pillow. Returns whether that was possible."""
    channels, size, _ = out.shape
    # Colour images that should be grey go to Pillow: libjpeg's grey differs slightly.
    fitting = [(size, size, 1), (size, size, channels)]
    if _plain_jpeg_shape(encoded) not in fitting or (decoder := _jpeg_decoder()) is None:
        return False
    writable = bytearray(encoded)  # torch warns about read-only memory
    try:
        # The decoder's modes for grey and RGB are 1 and 3, the same as the number of channels.
        pixels = decoder(torch.frombuffer(writable, dtype=torch.uint8), channels)
    except RuntimeError:
        return False
    out[...] = pixels.numpy()
    return True


def _plain_jpeg_shape(encoded: bytes) -> tuple[int, int, int] | None:
    """Return (H, W, C) of an 8-bit JPEG without EXIF data (which may rotate it), else None."""
    if not encoded.startswith(b"\xff\xd8"):
        return None
    position = 2
    try:
        while True:
            mark, kind, length = struct.unpack_from(">BBH", encoded, position)
            if mark != 0xFF or (kind == 0xE1 and encoded.startswith(b"Exif", position + 4)):
                return None
            if kind in (0xC0, 0xC1, 0xC2):  # start of frame: baseline, extended, progressive
                bits, height, width, channels = struct.unpack_from(">BHHB", encoded, position + 4)
                return (height, width, channels) if bits == 8 else None
            position += 2 + length
    except struct.error:  # truncated file
        return None
