"""What a set of images looks like, from a sample of it: size and colour."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from PIL import Image

from snscc_ray.data.decode import FORMATS, Source
from snscc_ray.data.imageset import Rows
from snscc_ray.errors import UserError

_SAMPLE = 200
# Grey images saved as JPEG differ by a little between their channels.
_GREY_WITHIN = 8


@dataclass(frozen=True)
class Look:
    """Of a set of images."""

    rows: int
    side: int  # median of the shorter sides, in pixels
    grey: bool  # (nearly) all of them
    streamable: bool


def look(rows: Rows) -> Look:
    """Open up to 200 of the images, spread over the set where it lies in files.

    Raises UserError where none of them can be read.
    """
    seen = [found for source in _sample(rows) if (found := _one(source)) is not None]
    if not seen:
        raise UserError(
            f"none of the first images in {rows.place} can be read; give a folder with images"
        )
    sides, greys = zip(*seen, strict=True)
    return Look(
        rows=len(rows.ids),
        side=int(np.median(sides)),
        # A few coloured stamps among scans do not make a colour set; a tenth does.
        grey=bool(np.mean(greys) > 0.9),
        streamable=rows.streamable,
    )


def _sample(rows: Rows) -> Iterable[Source]:
    if rows.files is not None:
        return [rows.files[i] for i in range(0, len(rows.files), -(-len(rows.files) // _SAMPLE))]
    return islice(chain.from_iterable(rows.batches), _SAMPLE)


def _one(source: Source) -> tuple[int, bool] | None:
    """(shorter side, whether it is grey); None where it cannot be read."""
    try:
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source)
        else:
            assert source is not None
            encoded = source if isinstance(source, bytes) else source.read_bytes()
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        side = min(image.size)
        if image.mode in ("L", "LA", "1") or image.mode.startswith("I"):
            return side, True
        small = np.asarray(image.convert("RGB").resize((16, 16)), np.int16)
        return side, bool(np.ptp(small, axis=2).max() <= _GREY_WITHIN)
    except Exception:  # what Pillow raises on broken files is open-ended; reading names them
        return None
