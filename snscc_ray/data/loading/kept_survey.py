"""The findings of a survey, kept in the user's cache folder and found again for the same files.

The same files are those with the same paths, sizes and times of change, read in the same way. A
dataset of a million photographs then need not be read once more before each run, report or
prediction.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_text, is_url
from snscc_ray.config.settings import DataSettings
from snscc_ray.core.storage import write_whole
from snscc_ray.data.loading.slices import Findings, Slice
from snscc_ray.data.rows import Rows

# Smaller datasets are read in less time than it takes to wonder where a file comes from.
_LEAST_ROWS = 10_000
_VERSION = b"1"


def kept_or(
    rows: Rows,
    data: DataSettings,
    slices: Sequence[Slice],
    fresh: Callable[[], Generator[Findings]],
    say: Callable[[str], None],
) -> Generator[Findings]:
    """Yield the kept findings of the slices, or fresh ones, which are kept once all are there.

    A cache folder that cannot be read or written is no error.
    """
    file = place_of(rows, data)
    kept = _read(file, slices) if file is not None else None
    if kept is not None:
        say(f"the images are those of an earlier survey, which is used again: {file}")
        yield from kept
        return
    seen = []
    with closing(fresh()) as findings:
        for found in findings:
            seen.append(found)
            yield found
    if file is not None:
        with suppress(OSError, UserError):
            _write(file, slices, seen)


def place_of(rows: Rows, data: DataSettings) -> Path | None:
    """Return the file in which a survey of these rows is kept; None: it is not.

    Not kept are surveys of few rows, and of image files at URLs: to ask for the time of change of
    each would take as long as reading it.
    """
    if len(rows.ids) < _LEAST_ROWS:
        return None
    whole = hashlib.sha256(_VERSION)
    whole.update(repr((data.channels, data.image_size, rows.reading, len(rows.ids))).encode())
    if rows.shards is not None:
        files = [shard.file for shard in rows.shards]
        whole.update(repr([(shard.rows, shard.groups) for shard in rows.shards]).encode())
    elif rows.files is not None and not is_url(rows.files[0]):
        files = rows.files  # type: ignore[assignment]
    else:
        return None
    try:
        for file in files:
            state = file.stat()
            if not state.st_mtime:  # an object store that does not tell
                return None
            name = as_text(str(file if is_url(file) else file.absolute()))
            whole.update(repr((name, state.st_size, state.st_mtime)).encode())
    except OSError:
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "snscc_ray" / "surveys" / f"{whole.hexdigest()[:32]}.npz"


def _write(file: Path, slices: Sequence[Slice], findings: Sequence[Findings]) -> None:
    failed = [
        (piece.first + row, as_text(reason))
        for piece, found in zip(slices, findings, strict=True)
        for row, reason in found.failures
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "digests": np.frombuffer(b"".join(found.digests for found in findings), np.uint8),
        "values": np.sum([found.values for found in findings], axis=0),
        "failed": np.array([row for row, _ in failed], np.int64),
        "reasons": np.array([reason for _, reason in failed], np.str_),
    }
    write_whole(file, lambda opened: np.savez(opened, **arrays))


def _read(file: Path, slices: Sequence[Slice]) -> list[Findings] | None:
    """Return the findings for each slice; None if there are none, or the file is damaged."""
    if not file.exists():
        return None
    try:
        with np.load(file) as held:
            digests, values = held["digests"], held["values"]
            failed, reasons = held["failed"], held["reasons"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    readable = sum(piece.rows for piece in slices) - len(failed)
    if readable <= 0 or len(digests) % readable:
        return None
    each, place = len(digests) // readable, 0
    found = []
    for number, piece in enumerate(slices):
        first, last = np.searchsorted(failed, [piece.first, piece.first + piece.rows])
        end = place + (piece.rows - int(last - first)) * each
        counts = values if number == 0 else np.zeros_like(values)
        failures = [
            (int(row) - piece.first, str(reason))
            for row, reason in zip(failed[first:last], reasons[first:last], strict=True)
        ]
        found.append(Findings(digests[place:end].tobytes(), counts, failures))
        place = end
    return found
