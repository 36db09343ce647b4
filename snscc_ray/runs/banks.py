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


def link_bank(folder: Path, identity: str, among: Path | None = None) -> Path | None:
    """Share the bank of this identity with a run beside this one; return that run's folder.

    Looks at the runs and comparisons in the folder `among`; None: in that of this run. Files are
    hard links, so either run may be removed; where the file system has none they are copied. Does
    nothing in an object store, if there is no such bank, or if `folder` already holds one.
    """
    if is_url(folder) or identity_of(folder) == identity:
        return None
    among = among or folder.parent.parent.parent
    for other in _banks(among):
        if other.parent == folder or identity_of(other.parent, complete=True) != identity:
            continue
        try:
            _share(other, folder)
            open_bank(folder, torch.device("cpu"))  # it may be damaged, or removed meanwhile
        except (UserError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return other.parent.parent.parent
    return None


def _banks(among: Path) -> Iterator[Path]:
    """Yield the description of each bank of a run in this folder, or in a comparison in it."""
    for run in _folders(among):
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
