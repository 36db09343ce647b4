"""Find the images below a folder, by file name extension or first bytes."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.data.formats import BEGINNING, PACKAGES, installed, kind_at_beginning
from snscc_ray.texts import counted

# In lower case. A file with such an extension counts as an image, readable or not. The first bytes
# of all others say whether they are images.
EXTENSIONS = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k",
])  # fmt: skip
# Folders of thumbnails, copies and deleted files made by other programs. Folders whose names start
# with a dot are left out too.
_FOREIGN = frozenset([
    "__MACOSX", "@eaDir", "#recycle", "#snapshot", "@Recycle", "$RECYCLE.BIN", "lost+found",
    "System Volume Information",
])  # fmt: skip
# Files that a run, a sweep and a comparison write into their folders; each contains the recipe.
_OURS = ("recipe.json", "sweep.json", "compare.json")
_ENDINGS = 8  # most kinds that a note names
_TOLD = 10_000  # images between two calls of a progress function


@dataclass
class ImageListing:
    """The files below a folder."""

    files: list[str] = field(default_factory=list)  # relative POSIX paths of images, sorted
    aside: Counter[str] = field(default_factory=Counter)  # number of other files, by kind
    # Relative paths of the images that need a package that is not installed, by kind.
    without: dict[str, list[str]] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """Say in a sentence what is left out."""
        needing = tuple(
            f"left out: {counted(len(files), f'{kind} file')}, the first of them {min(files)!r}; "
            f"to read them, pip install {PACKAGES[kind]}"
            for kind, files in sorted(self.without.items())
        )
        kinds = [(kind, count) for kind, count in self.aside.most_common() if count]
        if not kinds:
            return needing
        named = ", ".join(f"{kind} ({count:,})" for kind, count in kinds[:_ENDINGS])
        more = sum(count for _, count in kinds[_ENDINGS:])
        rest = f" and others ({more:,})" if more else ""
        return (*needing, f"ignored, because they are not readable images: {named}{rest}")

    def holds_image(self, file: str, begin: bytes) -> bool:
        """Whether a file is an image that can be read here, by its first bytes; else count it."""
        kind = kind_at_beginning(begin, os.path.splitext(file)[1].lower())
        if kind is None:
            self.aside[_ending(file)] += 1
        elif not installed(kind):
            self.without.setdefault(kind, []).append(file)
        else:
            return True
        return False


def find_images(root: Path, progress: Callable[[int], None] | None = None) -> ImageListing:
    """Find all images below `root`. Hidden files and files that are not images are counted.

    progress: called now and then with the number of images found so far.
    """
    found = ImageListing()
    if is_url(root):
        _find_remote(root, found)
    else:
        for file in _walk(root, found):
            found.files.append(file)
            if progress is not None and len(found.files) % _TOLD == 0:
                progress(len(found.files))
    found.files.sort()
    return found


def _walk(root: Path, found: ImageListing) -> Iterator[str]:
    """Yield the relative path of each image. Links to folders are followed."""
    seen: set[str] = set()  # no folder is read twice
    left = [(str(root), "")]
    while left:
        folder, above = left.pop()
        real = os.path.realpath(folder)
        inner: list[os.DirEntry[str]] = []
        files: list[os.DirEntry[str]] = []
        for entry in _entries(folder):
            (inner if _is_folder(entry) else files).append(entry)
        if real in seen or (above and _is_ours(folder, [entry.name for entry in files])):
            found.aside["folders seen already" if real in seen else "folders of snscc's own"] += 1
            continue
        seen.add(real)
        # In the order of the names: of a folder and a link to it, the first one counts.
        for entry in sorted(inner, key=lambda entry: entry.name, reverse=True):
            if _is_foreign(entry.name):
                found.aside[_folder_kind(entry.name)] += 1
            else:
                left.append((entry.path, f"{above}{entry.name}/"))
        for entry in files:
            name = entry.name
            kind = _kind_left_aside(name) or _special(entry)
            if kind is not None:
                found.aside[kind] += 1
            elif _ends_like_an_image(name) or found.holds_image(above + name, _begin(entry.path)):
                yield above + name


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return what a folder holds. Raises UserError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"cannot list {error.filename} ({error.strerror}): make it readable, or give another "
            "folder"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads nowhere: reading it reports the error


def _find_remote(root: Path, found: ImageListing) -> None:
    url: Any = root
    above = url.path.rstrip("/") + "/"
    unsure: list[str] = []
    names = sorted(url.fs.find(url.path))
    ours = _remote_ours(url, above, names)
    found.aside["folders of snscc's own"] += len(ours)
    for name in names:
        if name.startswith(tuple(ours)):
            continue
        file = PurePosixPath(name.removeprefix(above))
        foreign = next((part for part in file.parts[:-1] if _is_foreign(part)), None)
        kind = f"in {foreign}" if foreign else _kind_left_aside(file.name)
        if kind is not None:
            found.aside[kind] += 1
        elif _ends_like_an_image(file.name):
            found.files.append(str(file))
        else:
            unsure.append(name)
    if not unsure:
        return
    # All at once: an object store takes as long for one request as for many.
    begins = url.fs.cat_ranges(unsure, [0] * len(unsure), [BEGINNING] * len(unsure))
    for name, begin in zip(unsure, begins, strict=True):
        if found.holds_image(name.removeprefix(above), begin if isinstance(begin, bytes) else b""):
            found.files.append(name.removeprefix(above))


def _remote_ours(url: Any, above: str, names: list[str]) -> list[str]:
    """Return the folders below a URL that `_is_ours` would match, each ending in a slash."""
    marks = [name for name in names if name.rpartition("/")[2] in _OURS]
    marks = [name for name in marks if name.rpartition("/")[0] + "/" != above]
    held = url.fs.cat(marks, on_error="return") if marks else {}
    folders = {name.rpartition("/")[0] + "/" for name, text in held.items() if _has_recipe(text)}
    outermost: list[str] = []  # nested folders count once
    for name in sorted(folders):
        if not name.startswith(tuple(outermost)):
            outermost.append(name)
    return outermost


def _has_recipe(content: object) -> bool:
    with suppress(ValueError):
        held = json.loads(content) if isinstance(content, bytes) else None
        return isinstance(held, dict) and isinstance(held.get("recipe"), dict)
    return False


def _is_ours(folder: str, names: list[str]) -> bool:
    """Whether the folder holds a run, sweep or comparison, whose figures are not dataset images."""
    for name in _OURS:
        if name in names:
            with suppress(OSError):
                if _has_recipe(Path(folder, name).read_bytes()):
                    return True
    return False


def _is_foreign(folder: str) -> bool:
    return folder.startswith(".") or folder in _FOREIGN


def _folder_kind(folder: str) -> str:
    return "hidden folders" if folder.startswith(".") else f"folders {folder}"


def _kind_left_aside(name: str) -> str | None:
    return "hidden files" if name.startswith(".") else None


def _ends_like_an_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an extension"


def _special(entry: os.DirEntry[str]) -> str | None:
    """Return the kind of a pipe, socket or device: reading it might never end."""
    try:
        if entry.is_file():
            return None
        mode = entry.stat().st_mode
    except OSError:
        return None  # a broken link: reading it reports the error
    return None if stat.S_ISREG(mode) else "pipes, sockets or devices"


def _begin(file: str) -> bytes:
    try:
        with open(file, "rb", buffering=0) as opened:
            return opened.read(BEGINNING)
    except OSError:
        return b""
