"""Thumbnails packed into a few sheets, so that a page with thousands of images stays small."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snscc_ray.data.imageset import digests
from snscc_ray.data.loading.resident import Images

LARGEST = 96  # side of a thumbnail, in pixels
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
    size: int  # of a thumbnail's side
    sheets: list[Sheet]
    places: dict[int, Place]  # by row


def row_digests(data: Images) -> list[bytes]:
    """Return 16 bytes per image, equal exactly when the pixels that the run saw are equal."""
    whole = b"".join(digests(part.cpu().numpy()) for part in data.slices(0, len(data), _ROWS))
    return [whole[start : start + _DIGEST] for start in range(0, len(whole), _DIGEST)]


def take(data: Images, rows: Sequence[int]) -> Tensor:
    """Return the images of ascending rows: uint8 (R, C, S, S) on the CPU, S at most 96."""
    wanted, first, found = torch.tensor(rows), 0, []
    for part in data.slices(0, len(data), _ROWS):
        own = wanted[(wanted >= first) & (wanted < first + len(part))] - first
        found.append(_small(part[own.to(part.device)].cpu()))
        first += len(part)
    return torch.cat(found)


def _small(images_BCHW: Tensor) -> Tensor:
    if images_BCHW.shape[-1] <= LARGEST or not len(images_BCHW):
        return images_BCHW[..., :LARGEST, :LARGEST]
    small = F.interpolate(images_BCHW.float(), (LARGEST, LARGEST), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def pack(rows: Sequence[int], images_BCHW: Tensor) -> Sprites:
    """Pack the images of the rows, in order, into WebP sheets."""
    size = images_BCHW.shape[-1]
    columns = max(_SHEET // size, 1)
    places: dict[int, Place] = {}
    sheets: list[Sheet] = []
    for start, part in _parts(images_BCHW, columns * columns):
        lines = -(-len(part) // columns)
        for number in range(len(part)):
            places[rows[start + number]] = Place(len(sheets), number % columns, number // columns)
        sheets.append(Sheet(_webp(part, columns, lines), columns, lines))
    return Sprites(size, sheets, places)


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
