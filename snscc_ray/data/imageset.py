"""A data set in memory: all images as one uint8 array, with their ids and, where known, labels."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snscc_ray.config import DataSettings
from snscc_ray.data.decode import Source, decode_all
from snscc_ray.errors import UserError

# Rows decoded by one thread at a time: enough to make the hand-over cheap, few enough that the
# encoded bytes under way stay small.
BATCH = 128


@dataclass(frozen=True, eq=False)
class ImageSet:
    images: Tensor  # uint8 (N, C, H, W), C-contiguous, on the CPU
    ids: list[str]  # unique
    labels: Tensor | None  # int64 (N,)
    class_names: tuple[str, ...] | None
    skipped: tuple[tuple[str, str], ...]  # (id, reason) of corrupt images left out
    fingerprint: str  # of pixels, ids and order; labels do not enter

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Rows:
    """What a source offers before anything is decoded; batches follow the order of the ids."""

    place: str  # what to call the source in a message
    ids: list[str]
    batches: Iterable[Sequence[Source]]
    labels: np.ndarray | None = None  # int64 (N,)
    class_names: tuple[str, ...] | None = None


def in_batches(items: Sequence[Source] | np.ndarray) -> Iterator[list[Source]]:
    for start in range(0, len(items), BATCH):
        yield list(items[start : start + BATCH])


def assemble(
    rows: Rows, data: DataSettings, workers: int, progress: Callable[[int, int], None] | None
) -> ImageSet:
    """Decode all rows into one array, allocated once.

    Raises:
        UserError: no rows, an id that occurs twice, a set larger than memory, or a corrupt
            image (with `skip_corrupt`: only if no other is left).
    """
    total = len(rows.ids)
    _check_ids(rows)
    pixels = _allocate(total, data)
    failed: list[tuple[int, str]] = []
    done = 0
    with closing(decode_all(rows.batches, pixels, workers)) as batches:
        for done, unreadable in batches:
            if unreadable and not data.skip_corrupt:
                row, reason = unreadable[0]
                raise UserError(
                    f"image {rows.ids[row]!r} in {rows.place} is corrupt ({reason}): repair or "
                    "remove it, or leave out such images with --set data.skip_corrupt=true"
                )
            failed += unreadable
            if progress is not None:
                progress(done, total)
    if done != total:
        raise UserError(f"{rows.place} changed while it was read: run again when it is at rest")
    if len(failed) == total:
        row, reason = failed[0]
        raise UserError(
            f"all {total} images in {rows.place} are corrupt, the first ({rows.ids[row]!r}) by: "
            f"{reason}; give a folder with readable images"
        )
    kept = np.setdiff1d(np.arange(total), [row for row, _ in failed])
    if failed:
        for new, old in enumerate(kept):  # row by row: a copy of all would double the memory
            pixels[new] = pixels[old]
    images = pixels[: len(kept)]
    ids = [rows.ids[row] for row in kept]
    return ImageSet(
        images=torch.from_numpy(images),
        ids=ids,
        labels=None if rows.labels is None else torch.from_numpy(rows.labels[kept]),
        class_names=rows.class_names,
        skipped=tuple((rows.ids[row], reason) for row, reason in failed),
        fingerprint=_fingerprint(images, ids),
    )


def _check_ids(rows: Rows) -> None:
    if not rows.ids:
        raise UserError(f"no images in {rows.place}: give a folder or file that holds some")
    # Refused rather than renamed: a row could not be joined back to its image by a made-up id.
    repeated, times = Counter(rows.ids).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"id {repeated!r} occurs {times} times in {rows.place}: make the ids unique, or leave "
            "them out to have the rows numbered"
        )


def _allocate(total: int, data: DataSettings) -> np.ndarray:
    shape = (total, data.channels, data.image_size, data.image_size)
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        gigabytes = np.prod(shape, dtype=np.float64) / 1e9
        raise UserError(
            f"{total} images of {data.image_size}×{data.image_size} take {gigabytes:.0f} GB, more "
            "than this machine has: lower data.image_size or data.limit"
        ) from None


def _fingerprint(images: np.ndarray, ids: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([images.shape, ids]).encode())
    digest.update(images.data)
    return digest.hexdigest()
