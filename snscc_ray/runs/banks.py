"""Find a feature bank that another run has computed, and share its files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.data.loading.bank import identity_of, open_bank

BANK = "bank"  # subfolder of the stage


def share_bank(folder: Path, identity: str, beside: Path) -> Path | None:
    """Share the bank of this identity with a run in the folder `beside`; return that run's folder.

    Files are hard links, so either run may be removed; where the file system has none they are
    copied. Returns None if `folder` already holds the bank, or if there is none to share.
    """
    if is_url(folder) or identity_of(folder) == identity:
        return None
    for other in _complete(identity, beside):
        try:
            _share(other, folder)
            open_bank(folder, torch.device("cpu"))  # it may be damaged, or removed meanwhile
        except (UserError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return other.parent.parent.parent
    return None


def is_computed(identity: str, beside: Path) -> bool:
    """Return whether a run in the folder `beside` has a complete bank of this identity."""
    return not is_url(beside) and next(_complete(identity, beside), None) is not None


def _complete(identity: str, beside: Path) -> Iterator[Path]:
    for path in _banks(beside):
        if identity_of(path.parent, complete=True) == identity:
            yield path


def _banks(beside: Path) -> Iterator[Path]:
    """Yield the description of each bank of a run, comparison or sweep in this folder."""
    for run in _folders(beside):
        for place in (run, *_folders(run)):
            path = place / "pretrain" / BANK / "bank.json"
            if path.exists():
                yield path


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name; none if it is gone or not readable."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _share(other: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The list of checksums comes last: without it the bank is not complete.
    for file in [*sorted(other.parent.glob("*.npy")), other]:
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
