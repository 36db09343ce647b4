"""The catalog of a dataset, made from its rows, and a dataset held in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.decode import decode_all
from snscc_ray.data.names import Files, Names
from snscc_ray.data.rows import Rows

DIGEST = 16  # bytes
_PART = 65_536  # ids that are hashed at a time


@dataclass(frozen=True, eq=False)
class Catalog:
    """All facts about a dataset of N images except their pixels."""

    ids: Names  # unique
    labels: Tensor | None  # int64 (N,)
    class_names: tuple[str, ...] | None
    skipped: tuple[tuple[str, str], ...]  # (id, reason) of each corrupt image
    fingerprint: str  # hash of pixels, ids and order, not of labels
    values: Tensor  # int64 (C, 256): count of each pixel value in each channel
    distinct: int  # number of different images
    notes: tuple[str, ...] = ()  # see `Rows`
    digests: bytes = b""  # 16 bytes per image, of its pixels
    stamps: np.ndarray | None = None  # int64 (N, 2): bytes and mtime_ns of each local file

    def __len__(self) -> int:
        return len(self.ids)

    def for_clusters(self, clusters: int) -> Catalog:
        """Add a note if there are fewer different images than clusters."""
        if self.distinct >= clusters:
            return self
        note = (
            f"only {self.distinct:,} of the {len(self):,} images are different, fewer than the "
            f"{clusters:,} clusters: identical images are in the same cluster"
        )
        return replace(self, notes=(*self.notes, note))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A dataset in memory."""

    images: Tensor  # uint8 (N, C, H, W), C-contiguous, on the CPU
    catalog: Catalog

    def __len__(self) -> int:
        return len(self.catalog)


def check_ids(rows: Rows) -> None:
    if not rows.ids:
        raise UserError(f"no images in {rows.place}: give a folder or file that holds some")
    # Refused, not renamed: an invented id could not be joined back to its image.
    if repeated := rows.ids.repeated():
        name, times = repeated
        raise UserError(
            f"id {name!r} occurs {times} times in {rows.place}: make the ids unique, or leave "
            "the column out to number the rows"
        )


def corrupt(rows: Rows, row: int, reason: str) -> UserError:
    return UserError(
        f"image {rows.ids[row]!r} in {rows.place} is corrupt ({reason}): repair or "
        "remove it, or leave out such images with --set data.skip_corrupt=true"
    )


def all_corrupt(rows: Rows, row: int, reason: str) -> UserError:
    return UserError(
        f"no image in {rows.place} is readable (the first of {len(rows.ids)}, {rows.ids[row]!r}: "
        f"{reason}): give a folder with readable images"
    )


def assemble(
    rows: Rows, data: DataSettings, workers: int, progress: Callable[[int, int], None] | None
) -> ImageSet:
    """Decode all rows into one array, allocated once.

    Raises:
        UserError: no rows, a repeated id, a dataset larger than memory, or a corrupt image (with
            `skip_corrupt`: only if all images are corrupt).
    """
    if rows.vectors is not None:
        raise UserError(
            f"{rows.place} holds embeddings, and this needs images: use `snscc fit`, or "
            "`snscc run` without --workers"
        )
    total = len(rows.ids)
    check_ids(rows)
    pixels = _allocate(total, data)
    failed: list[tuple[int, str]] = []
    done = 0
    with closing(decode_all(rows.batches, pixels, workers, rows.reading)) as batches:
        for done, unreadable in batches:
            if unreadable and not data.skip_corrupt:
                raise corrupt(rows, *unreadable[0])
            failed += unreadable
            if progress is not None:
                progress(done, total)
    if done != total:
        raise UserError(f"{rows.place} changed while it was read: run again once it is stable")
    if len(failed) == total:
        raise all_corrupt(rows, *failed[0])
    kept = np.setdiff1d(np.arange(total), [row for row, _ in failed])
    if failed:
        for new, old in enumerate(kept):  # row by row: a full copy would double the memory
            pixels[new] = pixels[old]
    images = pixels[: len(kept)]
    return ImageSet(
        torch.from_numpy(images),
        describe(rows, kept, failed, digests(images), value_counts(images), images.shape[1:]),
    )


def describe(
    rows: Rows,
    kept: np.ndarray,
    failed: list[tuple[int, str]],
    digests: bytes,
    values: np.ndarray,
    shape: tuple[int, ...],
) -> Catalog:
    """Return the catalog of the `kept` rows. `digests` and `values` describe their pixels."""
    ids = rows.ids if len(kept) == len(rows.ids) else rows.ids.take(kept)
    return Catalog(
        ids=ids,
        labels=None if rows.labels is None else torch.from_numpy(rows.labels[kept]),
        class_names=rows.class_names,
        skipped=tuple((rows.ids[row], reason) for row, reason in failed),
        fingerprint=_fingerprint(ids, shape, digests),
        values=torch.from_numpy(values),
        distinct=_distinct(digests),
        notes=rows.notes,
        digests=digests,
        stamps=_stamps(rows, kept),
    )


def _stamps(rows: Rows, kept: np.ndarray) -> np.ndarray | None:
    if rows.files is None or is_url(rows.place):
        return None
    stamps = np.empty((len(kept), 2), np.int64)
    try:
        for place, state in enumerate(_states(rows.files, kept)):
            stamps[place] = state.st_size, state.st_mtime_ns
    except OSError:
        return None  # gone since, or on the machines of the workers only
    return stamps


def _states(files: Sequence[Path], kept: np.ndarray) -> Iterator[os.stat_result]:
    if not isinstance(files, Files):
        yield from (files[int(row)].stat() for row in kept)
        return
    # Without a Path for each of a million files, which takes longer than the call itself.
    root, names = os.fsencode(files.root), files.names.take(pa.array(kept))
    for first in range(0, len(kept), _PART):
        for name in names.slice(first, _PART).to_pylist():
            yield os.stat(os.path.join(root, name))


def _fingerprint(ids: Names, shape: tuple[int, ...], digests: bytes) -> str:
    """Hash [number, *shape, [id, …]] as JSON and then the digests, a part of the ids at a time."""
    whole = hashlib.sha256(json.dumps([len(ids), *shape]).encode()[:-1] + b", [")
    for first in range(0, len(ids), _PART):
        between = b", " if first else b""
        whole.update(between + json.dumps(list(ids[first : first + _PART])).encode()[1:-1])
    whole.update(b"]]" + digests)
    return whole.hexdigest()


def _distinct(digests: bytes) -> int:
    return int(pc.count_distinct(digest_column(digests)).as_py())


def digest_column(digests: bytes) -> pa.Array:
    """Return the digests of N images as a column of 16 bytes each."""
    kind = pa.binary(DIGEST)
    return pa.Array.from_buffers(kind, len(digests) // DIGEST, [None, pa.py_buffer(digests)])


def digests(images: np.ndarray) -> bytes:
    """Return 16 bytes per image, so that parts of a dataset can be hashed separately."""
    return b"".join(hashlib.blake2b(image.data, digest_size=DIGEST).digest() for image in images)


def value_counts(images: np.ndarray) -> np.ndarray:
    """Count each value in each channel, int64 (C, 256). Means computed from it are exact."""
    # In parts: bincount makes a copy eight times the size.
    parts = np.array_split(images, max(images.nbytes >> 24, 1))
    counts = np.zeros((images.shape[1], 256), np.int64)
    for part in parts:
        for channel in range(images.shape[1]):
            counts[channel] += np.bincount(part[:, channel].reshape(-1), minlength=256)
    return counts


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
