"""Names of folders and files for sorted images: valid on every common system, none used twice."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

from snscc_ray.texts import shown

_LONGEST = 255  # bytes of a name on common file systems
_FOLDER = 120  # bytes of a folder's name: Windows allows 260 characters for a whole path
_FORBIDDEN = frozenset('\\/:*?"<>|')  # on Windows; a slash everywhere
_LEADING = (".", "-", "~")  # hidden, or read as an option or a home folder
# Devices of Windows, with any extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)


def folder_names(labels: Iterable[str], reserved: Iterable[str]) -> dict[str, str]:
    """Return the name of a folder for each label, none equal to another or to a reserved one.

    What is not valid on Linux, macOS or Windows becomes `_`. Names that would be equal there, where
    small and capital letters are the same, get a number: ` (2)`.
    """
    taken = {_key(name) for name in reserved}
    return {label: _free(_valid(label), "", taken) for label in labels}


def file_names(paths: Sequence[str]) -> list[str]:
    """Return the name in one folder of each of these files, none equal to another.

    paths: relative, with slashes. A file keeps its name. Where several have the same one, it gets
    the names of its folders before it (`2021/a.jpg` → `2021_a.jpg`), and a number if those are
    equal, too. The names depend on the paths only, in their order.
    """
    plain = [path.rpartition("/")[2] for path in paths]
    keys = [_key(name) for name in plain]
    often = {key for key, count in _counted(keys).items() if count > 1}
    taken = set(keys) - often
    return [
        name if key not in often else _free(*os.path.splitext(path.replace("/", "_")), taken)
        for path, name, key in zip(paths, plain, keys, strict=True)
    ]


def _counted(keys: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


def _valid(label: str) -> str:
    text = unicodedata.normalize("NFC", label)
    text = "".join("_" if c in _FORBIDDEN or shown(c) != c else c for c in text)
    text = text.strip().rstrip(". ")  # Windows drops them at the end
    if text.startswith(_LEADING):
        text = "_" + text[1:]
    text = os.fsencode(text)[:_FOLDER].decode("utf-8", "ignore").rstrip(". ")
    if _RESERVED.fullmatch(text):
        text = f"_{text}"
    return text or "unnamed"


def _key(name: str) -> str:
    """Names with the same key are one name on some system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _free(stem: str, ending: str, taken: set[str]) -> str:
    """Return the name, shortened and numbered as needed, and take it."""
    number, found = 1, _fitting(stem, ending)
    while _key(found) in taken:
        number += 1
        found = _fitting(stem, f" ({number}){ending}")
    taken.add(_key(found))
    return found


def _fitting(stem: str, ending: str) -> str:
    """Join them; what is too long loses its beginning."""
    room = _LONGEST - len(os.fsencode(ending))
    while len(os.fsencode(stem)) > room:
        stem = stem[1:]
    return stem + ending
