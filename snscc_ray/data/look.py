"""Sample the images of a dataset to learn their size, colour, values and transparency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from PIL import Image

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.decode import (
    Reading,
    Source,
    content_of,
    deep_range,
    is_deep,
    open_image,
    to_mode,
    why_unreadable,
    without_limits,
)
from snscc_ray.data.formats import RAW
from snscc_ray.data.rows import Rows
from snscc_ray.data.shards import sample_images

Progress = Callable[[int, int], None]

_SAMPLE = 200
# The channels of a grey image saved as JPEG differ slightly.
_GREY_WITHIN = 8
# An image that differs less than this, on average, from the grey behind it is hardly visible.
_VANISHES = 24
# Pixels that are enough to see whether an image is grey.
_ENOUGH = 64
_WHITE, _BLACK, _BETWEEN = 255, 0, 128


@dataclass(frozen=True)
class ImageStats:
    """Statistics of a sample of a dataset."""

    rows: int  # of the whole dataset
    side: int  # median of the shorter sides, in pixels
    grey: bool  # whether (nearly) all images are grey
    value_range: tuple[float, float] | None = None  # of images with more than 8 bits
    background: int | None = None  # a grey other than white, if transparent images vanish on white
    sampled: int = 0  # readable images
    deep: int = 0  # of these, with more than 8 bits
    frames: int = 0  # of these, with several frames or pages
    unreadable: str = ""  # reason of the first unreadable image


@dataclass(frozen=True)
class _Seen:
    """Statistics of one image."""

    side: int
    grey: bool
    value_range: tuple[float, float] | None
    vanishes: frozenset[int]  # the backgrounds, of white and black, on which it is not visible
    frames: int


def inspect_images(rows: Rows, tell: Progress | None = None) -> ImageStats:
    """Open up to 200 images, spread evenly over the dataset.

    tell: called with the number of images opened, and of all that will be.
    """
    seen, unreadable = [], ""
    step = max(1, -(-len(rows.ids) // _SAMPLE))
    for number, source in enumerate(_sample(rows, step)):
        if tell is not None:
            tell(number, -(-len(rows.ids) // step))
        try:
            with without_limits():
                seen.append(_one(source, rows.reading))
        except UserError:
            raise
        except Exception as error:  # Pillow raises many kinds of errors on broken files
            unreadable = unreadable or why_unreadable(error)
    return ImageStats(
        rows=len(rows.ids),
        side=int(np.median([one.side for one in seen])) if seen else 0,
        # A few coloured stamps among scans do not make a colour dataset; a tenth of them does.
        grey=bool(seen and np.mean([one.grey for one in seen]) > 0.9),
        value_range=_range(seen),
        background=_background(seen),
        sampled=len(seen),
        deep=sum(one.value_range is not None for one in seen),
        frames=sum(one.frames > 1 for one in seen),
        unreadable=unreadable,
    )


def resolve_reading(
    data: DataSettings, rows: Rows, seen: ImageStats | None = None, tell: Progress | None = None
) -> tuple[DataSettings, Rows]:
    """Decide how images are converted to 8 bits, where the settings leave it open.

    seen: the result of `inspect_images`; None: inspect the images now, and call its `tell`.
    """
    if rows.files is None and rows.shards is None:
        return data, rows  # arrays have 8 bits and no transparency
    seen = seen or inspect_images(rows, tell)
    found = {
        "value_range": data.value_range or seen.value_range,
        "background": seen.background if data.background is None else data.background,
    }
    data = data.model_copy(update=found)
    notes = (*rows.notes, *_notes(seen, data.value_range, data.background))
    return data, replace(rows, reading=Reading.of(data), notes=notes)


def _sample(rows: Rows, step: int) -> Iterable[Source]:
    """Return every so many of the images."""
    if rows.files is not None:
        return [rows.files[i] for i in range(0, len(rows.files), step)]
    if rows.shards is not None:
        return sample_images(rows.shards, step)
    return islice(_each(rows), 0, None, step)


def _each(rows: Rows) -> Iterator[Source]:
    return chain.from_iterable(rows.batches)


def _one(source: Source, reading: Reading) -> _Seen:
    content = content_of(source)
    if isinstance(content, np.ndarray):
        image = Image.fromarray(content)
    else:
        image = open_image(content, reading)
    side, mode = min(image.size), image.mode
    frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "TIFF", "WEBP") else 1
    if image.format == RAW:  # developing it takes long, and says no more
        return _Seen(side, False, None, frozenset(), 1)
    if is_deep(image):
        return _Seen(side, True, deep_range(image), frozenset(), frames)
    image.draft(None, (_ENOUGH, _ENOUGH))  # of a JPEG a part, of HEIC the thumbnail in it
    see_through = image.has_transparency_data
    grey = mode in ("L", "LA", "1")
    if not grey:
        small = np.asarray(to_mode(image, "RGB", reading).resize((16, 16)), np.int16)
        grey = bool(np.ptp(small, axis=2).max() <= _GREY_WITHIN)
    vanishes = _vanishing(image) if see_through else frozenset[int]()
    return _Seen(side, grey, None, vanishes, frames)


def _vanishing(image: Image.Image) -> frozenset[int]:
    """Return on which of white and black a partly transparent image is not visible."""
    pixels = np.asarray(image.convert("RGBA"), np.float64)
    alpha = pixels[..., 3] / 255
    if alpha.min() == 1 or not alpha.any():
        return frozenset()
    found = []
    for behind in (_WHITE, _BLACK):
        away = np.abs(pixels[..., :3] - behind).max(axis=2)
        if (away * alpha).sum() / alpha.sum() < _VANISHES:
            found.append(behind)
    return frozenset(found)


def _range(seen: list[_Seen]) -> tuple[float, float] | None:
    ranges = [one.value_range for one in seen if one.value_range is not None]
    if not ranges:
        return None
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return (low, high) if low < high else (low, low + 1)


def _background(seen: list[_Seen]) -> int | None:
    vanish = {behind for one in seen for behind in one.vanishes}
    if _WHITE not in vanish:
        return None
    return _BETWEEN if _BLACK in vanish else _BLACK


def _notes(
    seen: ImageStats, value_range: tuple[float, float] | None, background: int | None
) -> tuple[str, ...]:
    notes = []
    sample = f"of {seen.sampled:,} sampled"
    if seen.value_range is not None and value_range is not None:
        low, high = value_range
        own = seen.value_range
        other = "" if own == value_range else f"; the sampled ones go from {own[0]:g} to {own[1]:g}"
        notes.append(
            f"values of more than 8 bits ({seen.deep:,} {sample}): {low:g} is black and {high:g} "
            f"white{other}"
        )
    if background is not None:
        notes.append(f"transparent pixels become grey level {background} (white is 255)")
    if seen.frames:
        notes.append(
            f"images with several frames or pages ({seen.frames:,} {sample}): only the first is "
            "read"
        )
    return tuple(notes)
