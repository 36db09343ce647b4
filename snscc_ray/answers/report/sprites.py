"""Thumbnails in a few sheets, so that a page of thousands of images is one small file."""

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
_SHEET = 1024  # side of a sheet, about: what is decoded at a time stays small on a phone
_EXACT = 16  # a thumbnail this small is kept without loss: an artefact would be a part of it
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
    """16 bytes for each image: equal where the pixels, as the run saw them, are."""
    whole = b"".join(digests(part.cpu().numpy()) for part in data.slices(0, len(data), _ROWS))
    return [whole[start : start + _DIGEST] for start in range(0, len(whole), _DIGEST)]


def take(data: Images, rows: Sequence[int]) -> Tensor:
    """Images of the rows, which ascend: uint8 (R, C, S, S) on the CPU, at most 96 px a side."""
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
    """Put the images of the rows, in their order, into sheets of WebP."""
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
