"""Encoded images to uint8 pixels of one size: one image at a time, and many in parallel threads.

Every image takes the same steps: turned as its EXIF orientation says, transparency laid over
white, 16-bit grey divided by 256, CMYK and palettes converted, the shorter side resized to the
wanted size (bilinear, antialiased) and the centre cropped. An image that already has the wanted
size is not resampled.

Pillow does that for all formats. JPEG and PNG files that already have the wanted size and need
only decoding go to torchvision's decoder, which gives the same pixels several times faster and,
unlike Pillow on small images, gains from a second thread. Whatever it refuses is decided by
Pillow.
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
    """
    channels, size, _ = out.shape
    try:
        if source is None:
            raise UnreadableImage("there are no image bytes")
        if isinstance(source, Path):
            source = source.read_bytes()
        if isinstance(source, bytes):
            if _decode_directly(source, out):
                return
            image = _open(source, size)
        elif source.shape == (size, size, channels):
            out[...] = source.transpose(2, 0, 1)
            return
        else:
            image = Image.fromarray(source)
        pixels = np.asarray(_square(_to_mode(image, "L" if channels == 1 else "RGB"), size))
        turn = _TURNS.get(_orientation(image))
        if turn is not None:  # after the crop: a centred square stays centred, and is smaller
            pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
        out[...] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image in a known format") from None
    except Exception as error:  # what Pillow raises on broken files is open-ended
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(reason[:200]) from error


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
    """The shorter side resized to `size` and the centre kept, in one resampling."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


# ------------------------------------------ torchvision: JPEG and PNG that need only decoding


@cache
def _direct_decoders() -> dict[bytes, Callable[..., torch.Tensor]]:
    """torchvision's decoders by the first two bytes of a file; empty where it has none.

    The operators themselves, not `torchvision.io.decode_jpeg`: that wrapper warns on every call,
    since torchvision means to move decoding elsewhere. Without them Pillow does it all.
    """
    try:
        import torchvision.io  # noqa: F401  (registers the operators)

        image = torch.ops.image
        return {b"\xff\xd8": image.decode_jpeg, b"\x89P": image.decode_png}
    except (ImportError, AttributeError, RuntimeError):
        return {}


def _decode_directly(encoded: bytes, out: np.ndarray) -> bool:
    """Whether `out` (C, S, S) could be filled without Pillow."""
    decoder = _direct_decoders().get(encoded[:2])
    if decoder is None or _plain_shape(encoded) not in _direct_shapes(out):
        return False
    try:
        # A copy, as torch warns about memory it may not write to.
        pixels = decoder(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), out.shape[0])
    except RuntimeError:
        return False
    out[...] = pixels.numpy()
    return True


def _direct_shapes(out: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    # Colour is not taken to grey here: libjpeg's grey is not exactly Pillow's.
    channels, size, _ = out.shape
    grey = (size, size, 1)
    return (grey,) if channels == 1 else (grey, (size, size, 3))


def _plain_shape(encoded: bytes) -> tuple[int, int, int] | None:
    """(H, W, C) of an 8-bit JPEG or PNG that is neither rotated nor transparent, else None."""
    try:
        return _jpeg_shape(encoded) if encoded[0] == 0xFF else _png_shape(encoded)
    except (IndexError, struct.error):
        return None


def _jpeg_shape(encoded: bytes) -> tuple[int, int, int] | None:
    position = 2
    while True:
        mark, kind, length = struct.unpack_from(">BBH", encoded, position)
        if mark != 0xFF or (kind == 0xE1 and encoded[position + 4 : position + 8] == b"Exif"):
            return None
        if kind in (0xC0, 0xC1, 0xC2):  # start of frame: baseline, extended, progressive
            bits, height, width, channels = struct.unpack_from(">BHHB", encoded, position + 4)
            return (height, width, channels) if bits == 8 else None
        position += 2 + length


def _png_shape(encoded: bytes) -> tuple[int, int, int] | None:
    width, height, bits, colour = struct.unpack_from(">IIBB", encoded, 16)
    if bits != 8 or colour not in (0, 2) or b"tRNS" in encoded or b"eXIf" in encoded:
        return None
    return height, width, 3 if colour == 2 else 1
