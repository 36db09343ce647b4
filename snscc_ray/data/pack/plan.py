"""Assign the images of a folder to shards."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snscc_ray.config.errors import UserError
from snscc_ray.data.listing import find_images
from snscc_ray.data.pack.shard import Shard, file_state
from snscc_ray.data.sources import folder_classes, image_id, label_level, no_images

FORMAT = 1


@dataclass(frozen=True)
class Options:
    """The options that, with the images, determine the content of the shards."""

    shard_mb: int = 64
    image_size: int | None = None
    folders_are_labels: bool = False


def make_plan(
    folder: Path, out: Path, options: Options, skip_corrupt: bool
) -> tuple[list[Shard], tuple[str, ...]]:
    """Split the images, in order of their names, into shards of similar size.

    Also returns notes on the files left out and on the labels.

    Raises:
        UserError: there are no images, or one is in no sub-folder to take its label from.
    """
    found = find_images(folder)
    names = found.files
    if not names:
        raise UserError(f"{no_images(folder, found)}: give a folder that holds some")
    classes, level, notes = None, 0, found.notes()
    if options.folders_are_labels:
        level, note = label_level(folder, names, "leave --folders-are-labels out")
        classes, notes = folder_classes(names, level), (*notes, note)
    states = np.empty((len(names), 2), np.int64)
    for row, name in enumerate(names):
        states[row] = file_state(os.path.join(folder, name))
    sizes = states[:, 0]
    if options.image_size is not None:
        sizes = np.minimum(sizes, _reduced_bytes(names, options.image_size))
    total = max(1, int(sizes.sum()))
    count = math.ceil(total / (options.shard_mb * 1_000_000))
    before = np.cumsum(sizes) - sizes
    shard_of_row = np.minimum(before * (count / total), count - 1).astype(np.int64)
    starts = [0, *(np.flatnonzero(np.diff(shard_of_row)) + 1).tolist()]
    digits = max(5, len(str(len(starts) - 1)))  # file names sort like their numbers
    shards = [
        Shard(
            number=number,
            path=out / f"part-{number:0{digits}d}.parquet",
            root=folder,
            names=names[start:end],
            states=states[start:end],
            classes=classes,
            label_level=level,
            image_size=options.image_size,
            skip_corrupt=skip_corrupt,
        )
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(names)], strict=True))
    ]
    return shards, notes


def _reduced_bytes(names: list[str], size: int) -> np.ndarray:
    """Estimate the bytes of squares of that size, int64 (N,), as measured on photographs."""
    lossy = [name.lower().endswith((".jpg", ".jpeg", ".webp", ".avif", ".heic")) for name in names]
    return np.where(lossy, size * size, 2 * size * size)


def as_manifest(shards: list[Shard], options: Options) -> dict[str, Any]:
    entries = [_entry(shard) for shard in shards]
    files = sum(len(shard.names) for shard in shards)
    described, level = asdict(options), shards[0].label_level
    if level:  # of former packs it was always 0
        described["label_level"] = level
    return {"format": FORMAT, "options": described, "files": files, "shards": entries}


def _entry(shard: Shard) -> dict[str, Any]:
    """Return the manifest entry of a planned shard. The rest is added once it is finished."""
    ids = [image_id(name) for name in shard.names]
    source = hashlib.sha256(json.dumps([ids, shard.states.tolist()]).encode()).hexdigest()
    held = {"first": ids[0], "last": ids[-1], "source": source}
    return {"file": shard.path.name, "files": len(ids), **held}
