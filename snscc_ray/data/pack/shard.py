"""Write one shard, read it back and describe it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from snscc_ray.config.errors import UserError
from snscc_ray.core.storage import is_disk_full, write_whole
from snscc_ray.data.decode import (
    OWN_RANGE,
    UnreadableImage,
    decode_into,
    is_deep,
    open_image,
    without_limits,
)
from snscc_ray.data.sources import image_id

# Bytes of images in a row group, which a reader holds at once.
_ROW_GROUP = 4_000_000
# Size for decoding images only to check them: the whole file is read at any size.
_CHECKED_SIZE = 32
# Images between two reports of progress.
_REPORT = 64
_LOSSLESS = ("PNG", "BMP", "TIFF", "GIF", "PPM")

_Row = tuple[Any, ...]  # id, image and, if there are labels, label and class name


@dataclass(frozen=True, eq=False)
class Shard:
    number: int
    path: Path  # the shard's file
    root: Path
    names: list[str]  # paths of its images below `root`
    states: np.ndarray  # int64 (N, 2): their `file_state` when the plan was made
    classes: dict[str, int] | None  # label of each sub-folder
    label_level: int  # see `sources.label_level`
    image_size: int | None
    skip_corrupt: bool


def write_shard(shard: Shard, advance: Callable[[int], None]) -> dict[str, Any]:
    """Write one shard, read it back and return its record. Calls `advance` with images done.

    Raises:
        UserError: a corrupt image that may not be skipped, an image that changed since the plan
            was made, a full disk, or a shard that differs when it is read back.
    """
    fields = {"id": pa.string(), "image": pa.binary()}
    if shard.classes is not None:
        fields |= {"label": pa.int64(), "class_name": pa.string()}
    schema, columns = pa.schema(fields), list(fields)
    content = hashlib.sha256()
    skipped: list[tuple[str, str]] = []
    cut: list[str] = []

    def write(file: IO[bytes]) -> None:
        with pq.ParquetWriter(
            file,
            schema,
            # Encoded images do not compress or repeat, and their minimum and maximum are useless.
            compression={name: "NONE" if name == "image" else "SNAPPY" for name in columns},
            use_dictionary=columns[2:],
            write_statistics=[name for name in columns if name != "image"],
            write_page_checksum=True,
        ) as writer:
            for group in _row_groups(shard, skipped, cut, advance):
                _hash_rows(content, group)
                values = dict(zip(columns, zip(*group, strict=True), strict=True))
                writer.write_table(pa.table(values, schema), row_group_size=len(group))

    with keeps_shards(shard.path):
        write_whole(shard.path, write)
    if not _reads_back(shard.path, columns, content.hexdigest()):
        shard.path.unlink()
        raise UserError(
            f"{shard.path} cannot be read back as written: check the disk and memory of this "
            "machine, then run the same command again"
        )
    size, digest = file_digest(shard.path)
    rows = len(shard.names) - len(skipped)
    record = {"rows": rows, "bytes": size, "sha256": digest, "skipped": skipped}
    return record | ({"first_frames": len(cut)} if cut else {})


def corrupt(root: Path, identifier: str, reason: str) -> UserError:
    return UserError(
        f"image {identifier!r} in {root} is corrupt ({reason}): leave out such images with "
        "--skip-corrupt (finished shards are kept), or repair or remove it and start again with "
        "--overwrite"
    )


def file_state(path: str) -> tuple[int, int]:
    """Return a file's size in bytes and mtime in ns, or zeros if stat fails (a broken link)."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def file_digest(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.seek(0, os.SEEK_END), digest


@contextmanager
def keeps_shards(path: Path) -> Iterator[None]:
    """While `path` is written, turn a full disk into a UserError with this command's remedy."""
    try:
        yield
    except (UserError, OSError) as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"no space left while writing {path}: free some space and run the same command again, "
            "which keeps the finished shards"
        ) from error


def _row_groups(
    shard: Shard,
    skipped: list[tuple[str, str]],
    cut: list[str],
    advance: Callable[[int], None],
) -> Iterator[list[_Row]]:
    """Yield the rows of a shard, a few MB at a time.

    Adds corrupt images to `skipped`, and the ids of images cut to one frame or page to `cut`.
    """
    group: list[_Row] = []
    held = 0
    for number, (name, state) in enumerate(zip(shard.names, shard.states.tolist(), strict=True), 1):
        identifier = image_id(name)
        try:
            image, alone = _image(os.path.join(shard.root, name), tuple(state), shard.image_size)
        except UnreadableImage as error:
            if not shard.skip_corrupt:
                raise corrupt(shard.root, identifier, str(error)) from error
            skipped.append((identifier, str(error)))
        else:
            held += len(image)
            cut += [] if alone else [identifier]
            row: _Row = (identifier, image)
            if shard.classes is not None:
                folder = name.split("/")[shard.label_level]
                row += (shard.classes[folder], image_id(folder))
            group.append(row)
        if number % _REPORT == 0:
            advance(_REPORT)
        if held >= _ROW_GROUP:
            yield group
            group, held = [], 0
    advance(len(shard.names) % _REPORT)
    if group:
        yield group


def _image(path: str, state: tuple[int, int], image_size: int | None) -> tuple[bytes, bool]:
    """Check one image by decoding it. Returns the bytes to store and whether all frames are kept.

    Raises:
        UnreadableImage: the image is corrupt.
        UserError: the file has changed since the plan was made.
    """
    encoded = _read(path, state)
    size = image_size or _CHECKED_SIZE
    pixels = np.empty((3, size, size), np.uint8)
    decode_into(encoded, pixels)
    return (encoded, True) if image_size is None else _reduced(encoded, pixels)


def _read(path: str, state: tuple[int, int]) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    finally:  # also when reading failed: a file that is gone is not reported as corrupt
        if file_state(path) != state:
            raise UserError(
                f"{path} has changed since the start: run again with --overwrite when nothing "
                "writes to the images"
            )


def _reduced(encoded: bytes, pixels: np.ndarray) -> tuple[bytes, bool]:
    """Encode the decoded `pixels` (3, S, S), or keep `encoded` if the image is no larger.

    A run always resizes the shorter side and crops the centre, so nothing that a run at size S or
    below would see is lost. Also returns whether all frames are kept.
    """
    with without_limits(), open_image(encoded, OWN_RANGE) as image:
        size, lossless = image.size, image.format in _LOSSLESS
        alone = getattr(image, "n_frames", 1) == 1
        # The value range and background of such images are chosen for the whole dataset.
        open_yet = is_deep(image) or image.has_transparency_data
    if min(size) <= pixels.shape[1] or open_yet:
        return encoded, True
    grey = (pixels == pixels[0]).all()
    square = Image.fromarray(pixels[0] if grey else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    if lossless:
        square.save(buffer, "PNG")
    else:
        square.save(buffer, "JPEG", quality=95, subsampling=0)  # small images: keep their colours
    return buffer.getvalue(), alone


def _hash_rows(content: Any, rows: list[_Row]) -> None:
    """Add rows to a hash, unambiguously."""
    for identifier, image, *label in rows:
        content.update(json.dumps([identifier, len(image), *label]).encode())
        content.update(image)


def _reads_back(path: Path, columns: list[str], digest: str) -> bool:
    """Whether a shard is readable, with right page checksums, and its content has this `digest`."""
    content = hashlib.sha256()
    try:
        with (
            path.open("rb") as file,
            pq.ParquetFile(file, buffer_size=1 << 20, page_checksum_verification=True) as opened,
        ):
            if opened.schema_arrow.names != columns:
                return False
            for number in range(opened.num_row_groups):
                group = opened.read_row_group(number, use_threads=False)
                values = (column.to_pylist() for column in group.columns)
                _hash_rows(content, list(zip(*values, strict=True)))
    except (pa.ArrowException, OSError):
        return False
    return content.hexdigest() == digest
