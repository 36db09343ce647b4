"""The undo file of `snscc sort`: written before each batch of files, and read to put them back.

One JSON object per line. The first says what is done; then come a line for each folder before it is
made, one for each file before it is touched, and one for each file that was left out after all. So
the file is right at any moment of a kill: a line may announce what was never done, and undoing
looks at what is there.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from snscc_ray.config.errors import UserError
from snscc_ray.core.claim import NOT_WRITABLE

Action = Literal["link", "copy", "move"]

UNDO_FILE = "snscc-undo.jsonl"
# A file that is being written; it gets its name once it is whole.
PART = ".snscc-part"
_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One file: where it is or was, where it goes, and its size and time of change in ns."""

    source: str  # absolute
    target: str  # relative to the folder of the undo file
    bytes: int
    modified: int


@dataclass
class Undone:
    """What was put back or removed, and (path, reason) of what was left as it is."""

    action: Action
    done: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Journal:
    """The undo file while files are sorted."""

    def __init__(self, into: Path, action: Action, made: Sequence[Path]) -> None:
        """Begin it. made: folders that were made for it, innermost first. Raises UserError."""
        self.into = into
        try:
            # "x": an undo file that is there already says how to put other files back.
            self._file: IO[str] = (into / UNDO_FILE).open("x", encoding="ascii")
        except OSError as error:
            if error.errno in NOT_WRITABLE:
                raise UserError(f"{into} is not writable; use another --into") from error
            raise
        self._write({"version": _VERSION, "action": action, "made": [str(path) for path in made]})
        self.flush()

    def folder(self, name: str) -> None:
        """Announce a folder below DIR that is about to be made."""
        self._write({"folder": name})

    def announce(self, entry: Entry) -> None:
        self._write(
            {"from": entry.source, "to": entry.target, "bytes": entry.bytes,
             "modified": entry.modified}
        )  # fmt: skip

    def withdraw(self, entry: Entry) -> None:
        """Say that an announced file was left alone."""
        self._write({"left": entry.target})

    def flush(self) -> None:
        """Put all lines on the disk. Call it before what they announce."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a full disk: the lines that matter were flushed before
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")  # ASCII: a name may not be valid UTF-8


# -------------------------------------------------------------------------------- moving one file


def put(source: Path, target: Path) -> None:
    """Rename a file on one disk, never over another one. Raises OSError (EEXIST, EXDEV, …)."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.rename(source, target)
    else:
        os.unlink(source)


# Disks without hard links, and files of other owners.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
NO_LINKS = (*_NO_LINKS, errno.EXDEV)


def copy(source: Path, target: Path, part: Path) -> None:
    """Copy a file with its times, whole or not at all, never over another one. Raises OSError.

    part: a path on the disk of the target, for the file until it is whole.
    """
    try:
        shutil.copyfile(source, part)
        with suppress(OSError):  # some disks keep no owners or times; the pixels are there
            shutil.copystat(source, part)
        put(part, target)
    finally:
        part.unlink(missing_ok=True)


def move(source: Path, target: Path, part: Path) -> None:
    """Move a file, also to another disk, never over another one. Raises OSError.

    On another disk it is copied, put on the disk and compared before the source is removed.
    """
    try:
        put(source, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    copy(source, target, part)
    for path in (target, target.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if not _equal(source, target):
        target.unlink()
        raise OSError(errno.EIO, "the copy on the other disk differs", str(target))
    os.unlink(source)


def _equal(a: Path, b: Path) -> bool:
    return filecmp.cmp(a, b, shallow=False)


# ------------------------------------------------------------------------------------ putting back


def undo(into: Path, progress: Callable[[int, int], None]) -> Undone:
    """Put back what the undo file in the folder names. It can be repeated after a kill.

    A moved file returns to its place, unless something is there. A link or a copy is removed if it
    is unchanged and the file that it was made from is there, unchanged, too. Folders that were made
    are removed if they are empty, and the undo file if nothing is left. Raises UserError for a
    folder without an undo file, or with one that is damaged.
    """
    header, folders, entries = _read(into / UNDO_FILE)
    (into / PART).unlink(missing_ok=True)
    found = Undone(header["action"])
    back = {"link": _unlink, "copy": _remove_copy, "move": _move_back}[header["action"]]
    for number, entry in enumerate(reversed(entries), 1):
        try:
            back(Path(entry.source), into / entry.target, entry, found)
        except OSError as error:
            found.left.append((str(into / entry.target), error.strerror or str(error)))
        progress(number, len(entries))
    for folder in reversed(folders):
        with suppress(OSError):  # it holds something that is not ours
            (into / folder).rmdir()
    if not found.left:
        (into / UNDO_FILE).unlink()
    return found


def remove_made(made: Sequence[Path]) -> None:
    """Remove the folders that were made for the sort, innermost first, as far as they are empty."""
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return


def made_for(into: Path) -> list[Path]:
    """Return the folders that were made for the sort, innermost first. Raises UserError."""
    return [Path(path) for path in _read(into / UNDO_FILE)[0]["made"]]


def _unlink(source: Path, target: Path, entry: Entry, found: Undone) -> None:
    if not os.path.lexists(target):
        return
    if os.path.islink(target):
        if os.readlink(target) != entry.source:
            found.left.append((str(target), "it links to something else now"))
            return
    elif not source.exists():
        found.left.append((str(target), f"{source} is gone, so this is the only one left"))
        return
    elif not _has_both_names(source, target):
        found.left.append((str(target), f"it is no longer the same file as {source}"))
        return
    target.unlink()
    found.done += 1


def _remove_copy(source: Path, target: Path, entry: Entry, found: Undone) -> None:
    if not os.path.lexists(target):
        return
    if not source.exists():
        found.left.append((str(target), f"{source} is gone, so this is the only one left"))
    elif not _is_spare(source, target):
        found.left.append((str(target), f"it and {source} differ: one of them was changed"))
    else:
        target.unlink()
        found.done += 1


def _move_back(source: Path, target: Path, entry: Entry, found: Undone) -> None:
    here, there = os.path.lexists(target), os.path.lexists(source)
    if not here:
        if not there:
            found.left.append((str(source), f"it is no longer at {target}: find it and move it"))
        return
    if there:
        # A kill between the two steps of a move leaves both. Nothing else is removed.
        if not _is_spare(source, target):
            found.left.append((str(target), f"there is another file at {source} now"))
            return
        target.unlink()
        found.done += 1
        return
    state = target.lstat()
    source.parent.mkdir(parents=True, exist_ok=True)
    move(target, source, source.with_name(PART))
    found.done += 1
    if (state.st_size, state.st_mtime_ns) != (entry.bytes, entry.modified):
        found.notes.append(f"{source} was changed since, and went back as it is")


def _is_spare(source: Path, target: Path) -> bool:
    """Whether the source holds what the target holds, and still does without the target."""
    if not source.is_file() or not target.is_file():
        return False
    if os.path.samefile(source, target):
        return _has_both_names(source, target)
    return _equal(source, target)


def _has_both_names(source: Path, target: Path) -> bool:
    """Whether these are two names of one file, and none is a link or a mount of the other."""
    return (
        os.path.samefile(source, target)
        and os.path.realpath(source) != os.path.realpath(target)
        and target.stat().st_nlink > 1
    )


def _read(path: Path) -> tuple[dict[str, Any], list[str], list[Entry]]:
    """Return the first line, the folders as they were made, and the files. Raises UserError."""
    try:
        text = path.read_text("ascii")
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} holds no {UNDO_FILE}: give the folder that `snscc sort --into` made"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): bring back a copy of it") from error
    lines = list(_lines(path, text))
    if not lines or lines[0].get("version") != _VERSION:
        raise UserError(f"{path} is no undo file of this version: use the snscc that made it")
    folders = [line["folder"] for line in lines if "folder" in line]
    entries = {
        line["to"]: Entry(line["from"], line["to"], line["bytes"], line["modified"])
        for line in lines
        if "to" in line
    }
    for line in lines:
        if "left" in line:
            entries.pop(line["left"], None)
    for name in (*folders, *entries):
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path} names {name}, outside of its folder: bring back a copy of it")
    return lines[0], folders, [*entries.values()]


def _lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if not line.endswith("\n"):
                return  # a kill while it was written: what it announces was not begun
            raise UserError(
                f"{path}, line {number}, is damaged ({error}): bring back a copy of it"
            ) from error
