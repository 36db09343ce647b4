"""CIFAR-10, CIFAR-100 (its 20 superclasses) and STL-10, as torchvision lays them out on disk.

torchvision downloads them and knows their checksums. This module reads the files, one at a time:
torchvision's classes would hold every image twice and keep only the fine labels of CIFAR-100.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snscc_ray.config.errors import UserError
from snscc_ray.data.decode import Source
from snscc_ray.data.names import Names
from snscc_ray.data.rows import Batches, Rows


class Archive(NamedTuple):
    title: str
    dataset: str  # its class in torchvision.datasets
    folder: str  # base_folder of that class, repeated here to avoid the import


ARCHIVES = {
    "cifar10": Archive("CIFAR-10", "CIFAR10", "cifar-10-batches-py"),
    "cifar20": Archive("CIFAR-100", "CIFAR100", "cifar-100-python"),
    "stl10": Archive("STL-10", "STL10", "stl10_binary"),
}
_CIFAR_KEYS = {
    "cifar10": ("labels", "label_names"),
    "cifar20": ("coarse_labels", "coarse_label_names"),
}
_STL10_SIDE = 96


def archive_folder(source: str, path: Path) -> Path:
    """Return the folder of the files of `source`. `path` is that folder or its parent."""
    folder = ARCHIVES[source].folder
    return path if path.name == folder else path / folder


def read_archive(source: str, path: Path, *, download: bool, limit: int | None) -> Rows:
    """Read the train rows, then the test rows. Ids are `train/00000`, `test/00000`.

    Raises:
        UserError: a file is missing or its checksum is not torchvision's, or the download failed.
    """
    import torchvision.datasets

    folder = archive_folder(source, path)
    dataset = getattr(torchvision.datasets, ARCHIVES[source].dataset)
    if download:
        _download(source, dataset, folder.parent)
    read = _read_stl10 if source == "stl10" else _read_cifar
    return read(source, dataset, folder, limit)


def _download(source: str, dataset: Any, root: Path) -> None:
    rest = {"split": "test"} if source == "stl10" else {"train": False}
    try:
        dataset(root, download=True, **rest)
    except Exception as error:  # network, archive and disk errors of many kinds
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot download {ARCHIVES[source].title} into {root} ({reason}): "
            "try again, or put a copy there by hand"
        ) from error


def _checked(source: str, file: Path, md5: str) -> bytes:
    """Return the content of a file whose checksum is right, so that it is safe to unpickle."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"no {ARCHIVES[source].title} found: cannot read {file} "
            f"({error.strerror}); give the folder that {file.parent.name} lies in, or add "
            "--set data.download=true to fetch it"
        ) from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(
            f"{file} is damaged (its checksum is not the published one): remove "
            f"{file.parent} and add --set data.download=true to fetch it again"
        )
    return content


# ------------------------------------------------------------------------------------- CIFAR


def _read_cifar(source: str, dataset: Any, folder: Path, limit: int | None) -> Rows:
    label_key, names_key = _CIFAR_KEYS[source]
    meta = _unpickle(source, folder / dataset.meta["filename"], dataset.meta["md5"])
    used: list[tuple[Path, str, int]] = []
    ids: list[str] = []
    labels: list[int] = []
    # Each file is read twice, for labels and for pixels, so that only one holds pixels at a time.
    for split, files in (("train", dataset.train_list), ("test", dataset.test_list)):
        rows = 0
        for name, md5 in files:
            if limit is not None and len(ids) >= limit:
                break
            found = _unpickle(source, folder / name, md5)[label_key]
            found = found[: None if limit is None else limit - len(ids)]
            used.append((folder / name, md5, len(found)))
            labels += found
            ids += [f"{split}/{row:05d}" for row in range(rows, rows + len(found))]
            rows += len(found)
    return Rows(
        place=str(folder),
        ids=Names.of(ids),
        batches=_CifarImages(source, used),
        labels=np.array(labels, np.int64),
        class_names=tuple(meta[names_key]),
    )


def _unpickle(source: str, file: Path, md5: str) -> Any:
    return pickle.loads(_checked(source, file, md5), encoding="latin1")


@dataclass(frozen=True, eq=False)
class _CifarImages:
    """The images of some files in batches. It can be iterated repeatedly."""

    source: str
    used: list[tuple[Path, str, int]]  # file, checksum, rows

    def __iter__(self) -> Iterator[list[Source]]:
        for file, md5, rows in self.used:
            images = _unpickle(self.source, file, md5)["data"][:rows].reshape(-1, 3, 32, 32)
            yield from Batches(images.transpose(0, 2, 3, 1))


# ------------------------------------------------------------------------------------ STL-10


@dataclass(frozen=True, eq=False)
class _Parts:
    """The images of several arrays in batches. It can be iterated repeatedly."""

    parts: list[np.ndarray]

    def __iter__(self) -> Iterator[list[Source]]:
        for part in self.parts:
            yield from Batches(part)


def _read_stl10(source: str, dataset: Any, folder: Path, limit: int | None) -> Rows:
    checksums = dict(dataset.train_list + dataset.test_list)
    parts: list[np.ndarray] = []
    ids: list[str] = []
    labels: list[np.ndarray] = []
    for split in ("train", "test"):
        if limit is not None and len(ids) >= limit:
            break
        left = None if limit is None else limit - len(ids)
        answers = _checked(source, folder / f"{split}_y.bin", checksums[f"{split}_y.bin"])
        labels.append(np.frombuffer(answers, np.uint8).astype(np.int64)[:left] - 1)
        _checked(source, folder / f"{split}_X.bin", checksums[f"{split}_X.bin"])
        # Mapped, not read: it stays in the page cache. Images are stored column by column.
        pixels = np.memmap(folder / f"{split}_X.bin", np.uint8, mode="r")
        images = pixels.reshape(-1, 3, _STL10_SIDE, _STL10_SIDE).transpose(0, 3, 2, 1)
        parts.append(images[:left])
        ids += [f"{split}/{row:05d}" for row in range(len(labels[-1]))]
    names = folder / dataset.class_names_file
    return Rows(
        place=str(folder),
        ids=Names.of(ids),
        batches=_Parts(parts),
        labels=np.concatenate(labels),
        class_names=tuple(names.read_text().splitlines()) if names.is_file() else None,
    )
