"""Do what a plan of `sort` says: link, copy or move each file.

Nothing is ever overwritten. What is done is written to the undo file first (see `journal`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from snscc_ray.answers.journal import NO_LINKS, PART, UNDO_FILE, Action, Entry, Journal, copy, move
from snscc_ray.answers.sort import Plan, SortRequest
from snscc_ray.config.errors import UserError
from snscc_ray.core import storage
from snscc_ray.core.display import Display
from snscc_ray.core.storage import is_disk_full
from snscc_ray.runs.folder import MOVED_FILE
from snscc_ray.texts import counted

# Files announced in the undo file at a time: one flush to the disk costs as much as many links.
_BATCH = 512


@dataclass(frozen=True)
class Sorted:
    """What was done."""

    done: int
    symbolic: int  # links that are symbolic, as the disk has no hard links to those files
    left: list[tuple[str, str]]


def carry_out(plan: Plan, request: SortRequest, made: Sequence[Path], display: Display) -> Sorted:
    """Do what the plan says, in a folder that this process has claimed.

    made: folders that were made for it, innermost first. A file that cannot be handled is left
    where it is and named. A full disk or a lost one ends it; the undo file is right then, too.
    Raises UserError.
    """
    into, left = request.into, list(plan.left)
    done = symbolic = 0
    again = f"`snscc sort --undo {into}` puts them back"
    if request.action == "move":
        held = {"into": str(into.absolute()), "undo": str((into / UNDO_FILE).absolute())}
        storage.write_json(request.run / MOVED_FILE, held)
    journal = Journal(into, request.action, made)
    tell = display.counting(_DOING[request.action], "files")
    try:
        for batch in _announced(plan, request, journal):
            for entry in batch:
                try:
                    symbolic += _act(request.action, entry, into)
                    done += 1
                except OSError as error:
                    if is_disk_full(error) or error.errno == errno.EROFS:
                        raise
                    journal.withdraw(entry)
                    left.append((entry.source, error.strerror or str(error)))
            tell(done + len(left) - len(plan.left), len(plan.items))
        journal.flush()
    except OSError as error:
        raise UserError(
            f"{into}: {error.strerror} after {done:,} of {counted(len(plan.items), 'file')}; "
            f"{again}; then sort into a folder on another disk, or free some space"
        ) from error
    except KeyboardInterrupt:
        display.line(f"{done:,} of {counted(len(plan.items), 'file')} were done: {again}")
        raise
    finally:
        journal.close()
        display.finish()
    return Sorted(done, symbolic, left)


_DOING = {"link": "linking", "copy": "copying", "move": "moving"}


def _announced(plan: Plan, request: SortRequest, journal: Journal) -> Iterator[list[Entry]]:
    """Yield the files in batches that are in the undo file, and whose folders are there."""
    made: set[str] = set()
    for first in range(0, len(plan.items), _BATCH):
        items = plan.items[first : first + _BATCH]
        new = list(dict.fromkeys(f for item in items for f in _with_parents(item.folder)))
        new = [folder for folder in new if folder not in made]
        made.update(new)
        entries = []
        for folder in new:
            journal.folder(folder)
        for item in items:
            # A link to a link would break with it.
            link = request.action == "link" and item.source.is_symlink()
            source = os.path.realpath(item.source) if link else item.source
            entries.append(Entry(str(source), item.target, item.bytes, item.modified))
            journal.announce(entries[-1])
        journal.flush()
        for folder in new:
            (request.into / folder).mkdir()
        yield entries


def _with_parents(folder: str) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def _act(action: Action, entry: Entry, into: Path) -> bool:
    """Handle one file. Returns whether it became a symbolic link. Raises OSError."""
    source, target = Path(entry.source), into / entry.target
    if action == "copy":
        copy(source, target, into / PART)
    elif action == "move":
        move(source, target, into / PART)
    else:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.symlink(source, target)
            return True
    return False
