"""Thumbnails packed into a few sheets, so that a page with thousands of images stays small."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snscc_ray.data.imageset import digests
from snscc_ray.data.loading.resident import Images

LARGEST = 96  # side of a thumbnail, in pixels
_ON_MAP = 48  # side of one that only a map shows
_SHEET = 1024  # approximate side of a sheet, in pixels: small enough for a phone to decode
_EXACT = 16  # thumbnails up to this side are lossless: artefacts would be visible
_QUALITY = 82
_DIGEST, _ROWS = 16, 1024


@dataclass(frozen=True)
class Place:
    sheet: int
    column: int
    line: int


@dataclass(frozen=True)
class Sheet:
    webp: bytes
    columns: int
    lines: int


@dataclass(frozen=True)
class Sprites:
    size: int  # side of the largest thumbnails
    sheets: list[Sheet]
    places: dict[int, Place]  # by row


def row_digests(data: Images, progress: Callable[[int, int], None]) -> np.ndarray:
    """Return bytes (N, 16), equal exactly when the pixels that the run saw are equal.

    progress: called with the number of rows done, and of all rows.
    """
    found, done = np.empty((len(data), _DIGEST), np.uint8), 0
    for part in data.slices(0, len(data), _ROWS):
        whole = digests(part.cpu().numpy())
        found[done : done + len(part)] = np.frombuffer(whole, np.uint8).reshape(-1, _DIGEST)
        done += len(part)
        progress(done, len(data))
    return found


def take(data: Images, rows: Sequence[int], progress: Callable[[int, int], None]) -> Tensor:
    """Return the images of ascending rows: uint8 (R, C, S, S) on the CPU, S at most 96.

    progress: called with the number of rows read, and of all rows.
    """
    wanted, first, found = torch.tensor(rows), 0, []
    for part in data.slices(0, len(data), _ROWS):
        own = wanted[(wanted >= first) & (wanted < first + len(part))] - first
        found.append(_small(part[own.to(part.device)].cpu()))
        first += len(part)
        progress(first, len(data))
    return torch.cat(found)


def _small(images_BCHW: Tensor, side: int = LARGEST) -> Tensor:
    if images_BCHW.shape[-1] <= side or not len(images_BCHW):
        return images_BCHW[..., :side, :side]
    small = F.interpolate(images_BCHW.float(), (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def pack(rows: Sequence[int], images_BCHW: Tensor, large: Collection[int]) -> Sprites:
    """Pack the images of the rows into WebP sheets; those outside `large` at 48 pixels at most."""
    places: dict[int, Place] = {}
    sheets: list[Sheet] = []
    for is_large in (True, False):
        chosen = [place for place, row in enumerate(rows) if (row in large) == is_large]
        images = _small(images_BCHW[chosen], LARGEST if is_large else _ON_MAP)
        columns = max(_SHEET // images.shape[-1], 1)
        for start, part in _parts(images, columns * columns):
            lines = -(-len(part) // columns)
            for number in range(len(part)):
                place = Place(len(sheets), number % columns, number // columns)
                places[rows[chosen[start + number]]] = place
            sheets.append(Sheet(_webp(part, columns, lines), columns, lines))
    return Sprites(images_BCHW.shape[-1], sheets, places)


def _parts(images: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(images), count):
        yield start, images[start : start + count]


def _webp(images_BCHW: Tensor, columns: int, lines: int) -> bytes:
    B, C, S, _ = images_BCHW.shape
    whole = torch.zeros(columns * lines, C, S, S, dtype=torch.uint8)
    whole[:B] = images_BCHW
    sheet = whole.view(lines, columns, C, S, S).permute(0, 3, 1, 4, 2).reshape(lines * S, -1, C)
    picture = Image.fromarray(sheet.expand(-1, -1, 3).contiguous().numpy())
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=S <= _EXACT, quality=_QUALITY, method=4)
    return file.getvalue()
