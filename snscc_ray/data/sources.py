"""Find the source that the `data` settings mean, list its rows and load its images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path, is_url
from snscc_ray.config.settings import DataSettings
from snscc_ray.data.archives import ARCHIVES, archive_folder, read_archive
from snscc_ray.data.decode import Reading
from snscc_ray.data.imageset import ImageSet, assemble
from snscc_ray.data.listing import EXTENSIONS, ImageListing, find_images
from snscc_ray.data.names import Files, Names
from snscc_ray.data.rows import Batches, Rows
from snscc_ray.data.shards import image_shards, read_shards, shard_files
from snscc_ray.data.vectors import ARRAYS, embedding_shards, read_vectors

__all__ = ["ImageSet", "list_rows", "load_images", "resolve_source"]


Listed = Callable[[int], None]  # gets the number of files found so far

# Names of folders that are parts of a dataset and no labels.
_PARTS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing"])
# The remedy, in terms of `snscc fit` and of the recipes.
_NO_LABELS = "do without labels: leave --labels out, or use --set data.folders_are_labels=false"


def load_images(
    data: DataSettings,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Read and decode the whole dataset in `workers` threads (0: one per core).

    `progress` is called now and then with the number of rows done and the total. `data.limit`
    counts corrupt rows too.

    Raises:
        UserError: what is wrong with the source and how to fix it, in one line.
    """
    return assemble(list_rows(data), data, workers, progress)


def resolve_source(data: DataSettings) -> str:
    """Return the concrete source that `data` means, without decoding anything.

    `auto` is resolved by the content of `data.path`. For the datasets of torchvision, Parquet files
    at that path are used instead.

    Raises:
        UserError: `auto` without a path, or with a path that is missing or holds nothing known.
    """
    with _reaching(data.path):
        return _resolve(data)[0]


def _resolve(data: DataSettings, progress: Listed | None = None) -> tuple[str, ImageListing | None]:
    """Return the source, and the images of the folder if it was searched."""
    if data.source == "auto":
        return _recognise(data, progress)
    if data.source in ARCHIVES and data.path is not None:
        held = image_shards(shard_files(as_path(data.path)))
        return ("shards" if held else data.source), None
    return data.source, None


def _recognise(data: DataSettings, progress: Listed | None) -> tuple[str, ImageListing | None]:
    path = _existing_path(data)
    if path.suffix.lower() in ARRAYS and path.is_file():
        return "embeddings", None
    files = shard_files(path)
    named, lists = embedding_shards(files, data.column)
    if path.is_file() and files:
        return ("embeddings" if named or lists else "shards"), None
    shards = image_shards(files)
    if not shards:
        for source in ARCHIVES:
            if archive_folder(source, path).is_dir():
                return source, None
    found = find_images(path, progress) if path.is_dir() else ImageListing()
    if named > len(found.files):
        return "embeddings", None
    if shards or found.files:
        # Take the larger: a few files beside shards, or a sample beside files, are not the dataset.
        more = len(found.files) > sum(shards.values())
        return ("folder" if more else "shards"), found
    if files:
        if lists:
            return "embeddings", None
        return "shards", None  # reading them reports what is wrong
    if path.is_file():
        raise UserError(
            f"{path} is a file, but not a Parquet or NumPy file: give the folder of the images"
        )
    known = ", ".join(archive.folder for archive in ARCHIVES.values())
    aside = "".join(f"; {note}" for note in found.notes())
    raise UserError(
        f"no images in {path} (looked for image files at any depth, *.parquet, {known}{aside}): "
        "give another folder or file"
    )


def list_rows(data: DataSettings, progress: Listed | None = None) -> Rows:
    """List the rows of the source without decoding any image.

    progress: called now and then with the number of image files found so far.

    Raises:
        UserError: what is wrong with the source and how to fix it, in one line.
    """
    with _reaching(data.path):
        source, found = _resolve(data, progress)
        if source == "folder" and found is None:
            found = find_images(_existing_folder(data, source), progress)
        return replace(READERS[source](data, source, found), reading=Reading.of(data))


def _existing_path(data: DataSettings) -> Path:
    if data.path is None:
        fetch = ", and --set data.download=true to fetch it there" * (data.source in ARCHIVES)
        raise UserError(f"source {data.source!r} needs a place to read: give --data PATH{fetch}")
    path = as_path(data.path)
    if not path.exists():
        fetch = ", or add --set data.download=true to fetch it" * (data.source in ARCHIVES)
        raise UserError(f"{path} does not exist: give an existing folder or file{fetch}")
    return path


def _existing_folder(data: DataSettings, source: str) -> Path:
    path = _existing_path(data)
    if not path.is_dir():
        raise UserError(f"{path} is a file: source {source!r} needs a folder")
    return path


@contextmanager
def _reaching(place: str | None) -> Iterator[None]:
    """Turn any error of an object store's client into a UserError of one line."""
    try:
        yield
    except Exception as error:
        if place is None or not is_url(place) or isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{place} cannot be read ({reason}): check the address and the credentials"
        ) from error


# ------------------------------------------------------------------------------------ digits


def _digits(data: DataSettings, source: str, found: ImageListing | None) -> Rows:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.round(values[: data.limit] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return Rows(
        place="the digits of scikit-learn",
        ids=Names.of(f"digits/{row:04d}" for row in range(len(images))),
        batches=Batches(images),
        labels=labels[: data.limit].astype(np.int64),
        class_names=tuple("0123456789"),
    )


# ------------------------------------------------------------- torchvision's copies, and shards


def _archive(data: DataSettings, source: str, found: ImageListing | None) -> Rows:
    fetch = data.download and data.path is not None  # torchvision creates the folder
    path = as_path(str(data.path)) if fetch else _existing_path(data)
    if is_url(path):
        raise UserError(
            f"{path}: torchvision's copy of {source} must be a folder on this machine; give "
            "one, or Parquet shards at that address"
        )
    return read_archive(source, path, download=data.download, limit=data.limit)


def _shards(data: DataSettings, source: str, found: ImageListing | None) -> Rows:
    rows = read_shards(_existing_path(data), data.limit)
    if found is not None and found.files:
        beside = f"ignored: {len(found.files):,} image files, because the shards hold more images"
        rows = replace(rows, notes=(*rows.notes, beside))
    return rows


def _embeddings(data: DataSettings, source: str, found: ImageListing | None) -> Rows:
    return read_vectors(_existing_path(data), data.column, data.limit)


# ---------------------------------------------------------------------------- image folders


def _folder(data: DataSettings, source: str, found: ImageListing | None) -> Rows:
    """List every image of a folder by its relative path. Names of sub-folders may be labels."""
    path, limit = _existing_folder(data, source), data.limit
    assert found is not None
    files = found.files
    if not files:
        raise UserError(f"{no_images(path, found)}: give a folder that holds some")
    if not data.folders_are_labels:
        return _file_rows(path, files[:limit], None, None, found.notes())
    deepest = data.folders_are_labels == "deepest"
    level, note = label_level(path, files, _NO_LABELS, deepest=deepest)
    if level == 0 and any(file.count("/") > 1 for file in files):
        note += (
            "; --labels-deepest (data.folders_are_labels=deepest) takes those that hold the files"
        )
    classes = folder_classes(files, level)
    labels = np.array([classes[file.split("/")[level]] for file in files[:limit]], np.int64)
    return _file_rows(path, files[:limit], labels, tuple(classes), (*found.notes(), note))


def no_images(path: Path, found: ImageListing) -> str:
    aside = "".join(f"; {note}" for note in found.notes())
    return f"no images found below {path} (looked for {' '.join(sorted(EXTENSIONS))}{aside})"


def label_level(
    root: Path, files: list[str], remedy: str, *, deepest: bool = False
) -> tuple[int, str]:
    """Return which part of a path below `root`, split at `/`, is its label, and a note on it.

    It is the first, or the second where the first are only parts of a dataset, such as train and
    val. deepest: it is the folder that holds the file. Raises UserError for a file without it.
    """
    loose = next((file for file in files if "/" not in file), None)
    if loose is not None:
        raise UserError(
            f"{root / loose} is not in a sub-folder, which would be its label: move it into one, "
            f"or {remedy}"
        )
    if deepest:
        return -2, "labels: the names of the folders that hold the files"
    tops = sorted({file.split("/", 1)[0] for file in files})
    if not all(top.lower() in _PARTS for top in tops):
        return 0, f"labels: the names of the folders directly in {root}"
    loose = next((file for file in files if file.count("/") < 2), None)
    if loose is not None:
        raise UserError(
            f"{root / loose} has no label: {loose.split('/')[0]!r} is a part of a dataset, and the "
            f"file is in no folder below it: move it into one, or {remedy}"
        )
    return 1, f"labels: the names of the folders in {', '.join(tops)}, which are no labels"


def folder_classes(files: list[str], level: int) -> dict[str, int]:
    """Return the label of each name at this level, see `label_level`."""
    return {name: label for label, name in enumerate(sorted({f.split("/")[level] for f in files}))}


def _imagenet(data: DataSettings, source: str, found: ImageListing | None) -> Rows:
    """List the images of the named class folders, in the order of the names."""
    path, classes, limit = _existing_folder(data, source), data.classes, data.limit
    if not classes:
        raise UserError("source 'imagenet' needs class folders: name them in data.classes")
    root = path / "train" if (path / "train").is_dir() else path
    files: list[str] = []
    labels: list[int] = []
    aside = ImageListing()
    for number, name in enumerate(classes):
        if not (root / name).is_dir():
            raise UserError(
                f"class folder {root / name} is missing: give the folder of "
                "ImageNet, or leave the class out of data.classes"
            )
        held = find_images(root / name)
        aside.aside += held.aside
        if not held.files:
            raise UserError(
                f"class folder {root / name} holds no images: unpack it again, or leave the "
                "class out of data.classes"
            )
        files += [f"{name}/{file}" for file in held.files]
        labels += [number] * len(held.files)
    kept = np.array(labels[:limit], np.int64)
    return _file_rows(root, files[:limit], kept, classes, aside.notes())


def image_id(file: str) -> str:
    """Return the name as valid UTF-8, so that it can be written to any file."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def _file_rows(
    root: Path,
    files: list[str],
    labels: np.ndarray | None,
    classes: tuple[str, ...] | None,
    notes: tuple[str, ...],
) -> Rows:
    paths = Files.of(root, files)
    return Rows(
        place=str(root),
        ids=Names.of(map(image_id, files)),
        batches=Batches(paths),
        labels=labels,
        class_names=classes,
        files=paths,
        notes=notes,
    )


# A reader gets the settings, the source that they mean, and the images of the folder if it was
# searched for them. `_recognise` says what `auto` means.
Reader = Callable[[DataSettings, str, ImageListing | None], Rows]
READERS: dict[str, Reader] = {
    "digits": _digits,
    **dict.fromkeys(ARCHIVES, _archive),
    "imagenet": _imagenet,
    "folder": _folder,
    "shards": _shards,
    "embeddings": _embeddings,
}
