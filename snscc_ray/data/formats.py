"""What kind of image a file holds, by its bytes, and the kinds that need another package."""

from __future__ import annotations

import importlib.util
import io
import re
import struct
from typing import Any

from PIL import Image, ImageFile

# Only these of Pillow's: others (such as EPS) would pass untrusted bytes to an external program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
PILLOW, HEIC, RAW = "Pillow", "HEIC", "camera RAW"
PACKAGES = {HEIC: "pillow-heif", RAW: "rawpy"}  # as pip knows them
BEGINNING = 64  # bytes that `kind_at_beginning` needs
# The first bytes of such files, whatever their names.
_TIFF = (b"II*\0", b"MM\0*")
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", *_TIFF, b"II+\0",
               b"MM\0+", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")  # fmt: skip
_RAWS = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM")
_HEICS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_AVIFS = (b"avif", b"avis")
# RAW files that begin like a TIFF file. What follows the beginning tells them apart, too.
_RAW_TIFFS = (".dng", ".nef", ".nrw", ".cr2", ".arw", ".sr2", ".srf", ".pef", ".srw", ".3fr",
              ".fff", ".iiq", ".erf", ".kdc", ".dcr", ".mef", ".mos", ".rwl")  # fmt: skip
# Tags of TIFF and DNG, and the values of PhotometricInterpretation that mean a sensor's values.
_PHOTOMETRIC, _SUB_IFDS, _DNG_VERSION = 262, 330, 50706
_SENSOR = (32803, 34892)
_MOST_IFDS = 32


def installed(kind: str) -> bool:
    """Whether files of this kind can be read here."""
    package = PACKAGES.get(kind)
    return package is None or importlib.util.find_spec(package.replace("-", "_")) is not None


def kind_at_beginning(content: bytes, ending: str) -> str | None:
    """Return the kind of a file from its first bytes; None: it is no image.

    ending: of its name, in lower case with the dot. It tells RAW from TIFF.
    """
    if content.startswith(_TIFF) and ending in _RAW_TIFFS:
        return RAW
    if _is_raw(content):
        return RAW
    brands = _brands(content)
    if brands & {*_AVIFS}:
        return PILLOW
    if brands & {*_HEICS}:
        return HEIC
    known = (
        content.startswith(_BEGINNINGS)
        or (content.startswith(b"RIFF") and content[8:12] == b"WEBP")
        or (content.startswith(b"BM") and content[6:10] == b"\0\0\0\0")
        or re.match(rb"P[1-6]\s+[\d#]", content) is not None
    )
    return PILLOW if known else None


def kind_of(content: bytes) -> str:
    """Return the kind of an encoded image; PILLOW may mean that it is none."""
    if content.startswith(_TIFF):
        return RAW if _is_raw_tiff(content) else PILLOW
    return kind_at_beginning(content[:BEGINNING], "") or PILLOW


def open_kind(kind: str, encoded: bytes) -> Image.Image:
    """Open an image and read its header. Raises any error that its library raises."""
    file = io.BytesIO(encoded)
    if kind == HEIC:
        from pillow_heif import HeifImageFile

        # The container says how the image is turned, and libheif turns it.
        heif: Image.Image = HeifImageFile(file)
        return heif
    return _RawImage(file) if kind == RAW else Image.open(file, formats=FORMATS)


class _RawImage(ImageFile.ImageFile):
    """A RAW file for Pillow. It is developed when its pixels are needed, as its camera says.

    White balance and orientation are those of the camera; `draft` may halve the size, which saves
    most of the time. As in "Writing your own image plugin" of Pillow's handbook.
    """

    format = RAW
    _raw: Any

    def _open(self) -> None:
        import rawpy

        self._raw, self._half = rawpy.imread(self.fp), False
        sizes = self._raw.sizes
        turned = sizes.flip in (5, 6)
        self._mode = "RGB"
        self._size = (sizes.height, sizes.width) if turned else (sizes.width, sizes.height)

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> None:
        self._half = size is not None and min(self.size) >= 2 * min(size)

    def load(self) -> Any:
        if self._raw is not None:
            pixels = self._raw.postprocess(half_size=self._half, use_camera_wb=True)
            self._raw.close()
            self._raw = None
            developed = Image.fromarray(pixels.squeeze())
            self._mode, self._size, self.im = developed.mode, developed.size, developed.im
        return super().load()


def _brands(content: bytes) -> set[bytes]:
    """Return the brand of an ISO media file, and those that it is compatible with.

    Only a general brand leaves it to the others what the file holds.
    """
    if content[4:8] != b"ftyp":
        return set()
    brand = content[8:12]
    if brand not in (b"mif1", b"msf1"):
        return {brand}
    end = min(int.from_bytes(content[:4]), BEGINNING)
    return {brand} | {content[place : place + 4] for place in range(16, end, 4)}


def _is_raw(content: bytes) -> bool:
    return (
        content.startswith(_RAWS)
        or content[4:12] == b"ftypcrx "
        or (content.startswith((b"II", b"MM")) and content[6:14] == b"HEAPCCDR")
    )


def _is_raw_tiff(content: bytes) -> bool:
    """Whether a TIFF file holds the values of a sensor. Pillow would read its small preview."""
    if content[8:10] == b"CR":  # Canon's CR2
        return True
    order = "<" if content.startswith(b"II") else ">"
    left, seen = [4], set[int]()  # places where the place of a directory is written
    while left and len(seen) < _MOST_IFDS:
        try:
            (place,) = struct.unpack_from(f"{order}I", content, left.pop())
            if place in seen or place == 0:
                continue
            seen.add(place)
            (entries,) = struct.unpack_from(f"{order}H", content, place)
            left.append(place + 2 + 12 * entries)
            for entry in range(place + 2, place + 2 + 12 * entries, 12):
                tag, _, count, value = struct.unpack_from(f"{order}HHII", content, entry)
                if tag == _DNG_VERSION:
                    return True
                if tag == _PHOTOMETRIC:
                    (meaning,) = struct.unpack_from(f"{order}H", content, entry + 8)
                    if meaning in _SENSOR:
                        return True
                if tag == _SUB_IFDS:
                    first = entry + 8 if count == 1 else value
                    left += [first + 4 * number for number in range(min(count, _MOST_IFDS))]
        except struct.error:  # truncated
            continue
    return False
