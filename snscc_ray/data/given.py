"""Turn images that a program passes (arrays, paths, a Ray Dataset) into the rows of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snscc_ray.config.paths import as_path
from snscc_ray.data.decode import Source
from snscc_ray.data.names import Names
from snscc_ray.data.rows import Batches, Rows
from snscc_ray.data.sources import image_id

HAIR = 1e-3  # tolerance for floats outside 0 to 1: less than one step of uint8


def rows_of_paths(paths: Sequence[str | Path]) -> Rows:
    """Make one row per path or URL. The path is the id."""
    files = [as_path(path) for path in paths]
    return Rows(
        place="the list of paths",
        ids=Names.of(image_id(str(file)) for file in files),
        batches=Batches(files),
        files=files,
    )


def rows_of_array(images: np.ndarray) -> Rows:
    """Make one row per image of a uint8 array (N, H, W), (N, H, W, C) or (N, C, H, W).

    The id of an image is its number. Channels are its last axis if that has length 1 or 3, else
    its first. Raises ValueError for other shapes.
    """
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3) or not images.size:
        raise ValueError(
            f"X has shape {images.shape}: give images as (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1 or 3 channels"
        )
    if images.ndim == 3 and images.shape[2] in (1, 3):
        raise ValueError(f"X has shape {images.shape}, which is one image: give X[None]")
    return Rows(
        place="X",
        ids=Names.of(map(str, range(len(images)))),
        batches=Batches(np.ascontiguousarray(images)),
    )


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Convert pixels to uint8: integers from 0 to 255 are kept, floats from 0 to 1 times 255.

    Floats up to HAIR outside are clipped, because resizing and scaling produce them.
    Raises ValueError for other numbers.
    """
    if values.dtype == np.uint8:
        return values
    wanted = "give integers from 0 to 255, or floats from 0 to 1"
    if values.dtype.kind not in "biuf":
        raise ValueError(f"X holds {values.dtype.name} values: {wanted}")
    whole = values.dtype.kind in "iu"
    top, hair = (255, 0) if whole else (1, HAIR)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not (low >= -hair and high <= top + hair):  # NaN is neither
        raise ValueError(f"X holds {values.dtype.name} values from {low:g} to {high:g}: {wanted}")
    if whole:
        return values.astype(np.uint8)
    return np.asarray(np.rint(values.clip(0, 1) * 255), np.uint8)


def is_ray_dataset(given: object) -> bool:
    """Whether this is a Ray Dataset, by the name of its class, without importing Ray."""
    return any(
        kind.__name__ == "Dataset" and kind.__module__.startswith("ray.data")
        for kind in type(given).__mro__
    )


def rows_of_dataset(dataset: Any) -> Rows:
    """Read the column `image` of a Ray Dataset, in order, into memory. Ids come from a column `id`.

    Without that column the ids are numbers. An image is encoded bytes (also in Hugging Face's
    struct with `bytes`), an array (H, W), (H, W, C) or (C, H, W), or a path.
    Raises ValueError if there is no column `image`, or if it holds anything else.
    """
    schema = dataset.schema()
    names = [] if schema is None else schema.names
    if "image" not in names:
        held = ", ".join(names) or "nothing"
        raise ValueError(f"the dataset has no column `image` (it has: {held})")
    wanted = dataset.select_columns([name for name in ("id", "image") if name in names])
    wanted.context.execution_options.preserve_order = True
    sources: list[Source] = []
    ids: list[str] = []
    for number, row in enumerate(wanted.iter_rows()):
        name = row.get("id")
        ids.append(str(number if name is None else name))
        try:
            sources.append(_source(row["image"]))
        except ValueError as error:
            raise ValueError(f"image {ids[-1]!r} of the dataset: {error}") from error
    files = [source for source in sources if isinstance(source, Path)]
    return Rows(
        place="the Ray Dataset",
        ids=Names.of(ids),
        batches=Batches(sources),
        files=files if len(files) == len(sources) else None,
    )


def _source(image: Any) -> Source:
    """Convert the image of one row to a Source. Raises ValueError."""
    if isinstance(image, dict) and "bytes" in image:
        image = image["bytes"]
    if isinstance(image, str):
        return as_path(image)
    if isinstance(image, bytes) or image is None:
        return image
    if not isinstance(image, np.ndarray):
        raise ValueError(f"it is {type(image).__name__}: give bytes, an array or a path")
    shape = image.shape
    if image.ndim == 3 and shape[2] not in (1, 3) and shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if not image.size or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(
            f"its shape is {shape}: give (H, W), (H, W, C) or (C, H, W) with 1 or 3 channels"
        )
    return np.ascontiguousarray(as_bytes(image))
