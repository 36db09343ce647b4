"""Images as a program has them (arrays, tensors, paths, a Ray Dataset) as rows of a set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snscc_ray.data.decode import Source
from snscc_ray.data.imageset import Batches, Rows
from snscc_ray.data.sources import image_id
from snscc_ray.paths import as_path


def rows_of_paths(paths: Sequence[str | Path]) -> Rows:
    """An image for each path or URL, which is its id."""
    files = [as_path(path) for path in paths]
    return Rows(
        place="the list of paths",
        ids=[image_id(str(file)) for file in files],
        batches=Batches(files),
        files=files,
    )


def rows_of_array(images: np.ndarray) -> Rows:
    """An image for each (H, W), (H, W, C) or (C, H, W) of uint8, its number being its id.

    Channels are the last axis if that is 1 or 3 long, and else the first.
    Raises ValueError for what has no such shape.
    """
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(
            f"X has shape {images.shape}: give images as (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1 or 3 channels"
        )
    if images.ndim == 3 and images.shape[2] in (1, 3):
        raise ValueError(f"X has shape {images.shape}, which is one image: give X[None]")
    return Rows(
        place="X",
        ids=[str(row) for row in range(len(images))],
        batches=Batches(np.ascontiguousarray(images)),
    )


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Pixels as uint8: integers of 0 to 255 as they are, floats of 0 to 1 times 255.

    Raises ValueError for other numbers.
    """
    if values.dtype == np.uint8:
        return values
    whole = values.dtype.kind in "iu"
    top = 255 if whole else 1
    low, high = values.min(), values.max()
    if low < 0 or high > top:
        raise ValueError(
            f"X holds {values.dtype.name} values from {low:g} to {high:g}: give integers from 0 to "
            "255, or floats from 0 to 1"
        )
    return values.astype(np.uint8) if whole else np.rint(values * 255).astype(np.uint8)


def is_ray_dataset(given: object) -> bool:
    """Known by its name: Ray is not imported for it."""
    return any(
        kind.__name__ == "Dataset" and kind.__module__.startswith("ray.data")
        for kind in type(given).__mro__
    )


def rows_of_dataset(dataset: Any) -> Rows:
    """The column `image` of a Ray Dataset (encoded, or uint8 arrays) in its order, all held here;
    `id`, where there is such a column, names them.

    Raises ValueError where there is no such column.
    """
    names = dataset.schema().names
    if "image" not in names:
        raise ValueError(f"the dataset has no column `image` (it has: {', '.join(names)})")
    wanted = dataset.select_columns([name for name in ("id", "image") if name in names])
    wanted.context.execution_options.preserve_order = True
    sources: list[Source] = []
    ids: list[str] = []
    for number, row in enumerate(wanted.iter_rows()):
        image = row["image"]
        sources.append(_squeezed(as_bytes(image)) if isinstance(image, np.ndarray) else image)
        ids.append(str(row.get("id", number)))
    return Rows(place="the Ray Dataset", ids=ids, batches=Batches(sources))


def _squeezed(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
