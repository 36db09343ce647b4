"""Encoded images to uint8 pixels of one size: one image at a time, and many in parallel threads.

Every image takes the same steps: turned as its EXIF orientation says, transparency laid over
white, 16-bit grey divided by 256, CMYK and palettes converted, the shorter side resized to the
wanted size (bilinear, antialiased) and the centre cropped. An image that already has the wanted
size is not resampled.

Pillow does that for all formats. A JPEG that already has the wanted size and needs only decoding
goes to torchvision's decoder, which gives the same pixels several times faster and, unlike Pillow
on small images, gains from a second thread. What it refuses, Pillow decides. (torchvision's PNG
decoder is not used: a corrupt file can crash the process.)
"""

from __future__ import annotations

import io
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from snscc_ray.errors import UserError

# A file's content, where it lies, an (H, W) or (H, W, 3) uint8 array, or None where a row is empty.
Source = bytes | Path | np.ndarray | None

# Only these: others (EPS, say) would hand untrusted bytes to an outside program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
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


class UnreadableImage(Exception):
    """This image cannot be decoded; the message is the reason, in one line."""


def decode_into(source: Source, out: np.ndarray) -> None:
    """Write one image into `out` (C, S, S), uint8, C being 1 or 3.

    Raises:
        UnreadableImage: corrupt, truncated, empty, of an unknown format or far too large.
        UserError: it lies in an object store that does not hand it over.
    """
    channels, size, _ = out.shape
    try:
        if source is None:
            raise UnreadableImage("there are no image bytes")
        if isinstance(source, Path):
            source = source.read_bytes()
        elif not isinstance(source, bytes | np.ndarray):  # a URL, see paths.py
            source = _fetch(source)
        if isinstance(source, bytes):
            if _decode_directly(source, out):
                return
            image = _open(source, size)
        elif source.shape == (size, size, channels):
            out[...] = source.transpose(2, 0, 1)
            return
        else:
            image = Image.fromarray(source)
        turn = _TURNS.get(_orientation(image))
        image = _to_mode(image, "L" if channels == 1 else "RGB")
        if turn is not None:
            image = image.transpose(turn)
        pixels = np.asarray(_square(image, size))
        out[...] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    except (UnreadableImage, UserError):
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image in a known format") from None
    except Exception as error:  # what Pillow raises on broken files is open-ended
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(reason[:200]) from error


def _fetch(url: Path) -> bytes:
    """A file of an object store. That it cannot be had now does not make an image corrupt."""
    try:
        return url.read_bytes()
    except FileNotFoundError:
        raise UnreadableImage("No such file") from None
    except Exception as error:  # what an object store's client raises is open-ended
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{url} cannot be read ({reason}): check the network and the credentials, then run "
            "again"
        ) from error


def decode_all(
    batches: Iterable[Sequence[Source]], pixels: np.ndarray, workers: int
) -> Generator[tuple[int, list[tuple[int, str]]]]:
    """Decode batches into consecutive rows of `pixels` (N, C, S, S), in `workers` threads.

    Yields, batch by batch in order, how many rows are done and the (row, reason) of those that
    could not be read. Batches are drawn only a little ahead of the threads, so that not all
    encoded bytes are held at once. 0 workers means one per available core.
    """
    workers = workers or available_cores()
    Image.init()  # not left to the threads, which would race for it
    pending: deque[Future[tuple[int, list[tuple[int, str]]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        start = 0
        for batch in batches:
            pending.append(pool.submit(_decode_batch, batch, pixels, start))
            start += len(batch)
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """The cores this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _decode_batch(
    batch: Sequence[Source], pixels: np.ndarray, start: int
) -> tuple[int, list[tuple[int, str]]]:
    failed = []
    for row, source in enumerate(batch, start):
        try:
            decode_into(source, pixels[row])
        except UnreadableImage as error:
            failed.append((row, str(error)))
    return start + len(batch), failed


# ---------------------------------------------------------------- Pillow: every image


def _open(encoded: bytes, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    # A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8: several times faster. Twice
    # the wanted size is left, so that the resize that follows still does the antialiasing.
    image.draft(None, (2 * size, 2 * size))
    image.load()
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata on an image whose pixels are good
        return 1


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip some of these
        values = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to `size`, then the centre cropped, in one resampling.

    The same pixels as torchvision's Resize and CenterCrop, without making those cropped away.
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
    """torchvision's JPEG decoder; None if it was built without, and Pillow does it all.

    The operator itself, not `torchvision.io.decode_jpeg`: that wrapper warns on every call, since
    torchvision means to move decoding elsewhere.
    """
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None


def _decode_directly(encoded: bytes, out: np.ndarray) -> bool:
    """Whether `out` (C, S, S) could be filled without Pillow."""
    channels, size, _ = out.shape
    # Colour is not taken to grey here: libjpeg's grey is not exactly Pillow's.
    fitting = [(size, size, 1), (size, size, channels)]
    if _plain_jpeg_shape(encoded) not in fitting or (decoder := _jpeg_decoder()) is None:
        return False
    writable = bytearray(encoded)  # torch warns about memory it may not write to
    try:
        # The decoder's modes for grey and RGB are 1 and 3, as are the channels.
        pixels = decoder(torch.frombuffer(writable, dtype=torch.uint8), channels)
    except RuntimeError:
        return False
    out[...] = pixels.numpy()
    return True


def _plain_jpeg_shape(encoded: bytes) -> tuple[int, int, int] | None:
    """(H, W, C) of an 8-bit JPEG without EXIF data (which may rotate it), else None."""
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
    except struct.error:  # it ends too early
        return None
