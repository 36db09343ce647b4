"""Paths on this machine and URLs of object stores, behind one interface: pathlib's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from snscc_ray.config.errors import UserError


def as_path(text: str | Path) -> Path:
    """A `Path`, or, for `s3://bucket/x` and other URLs fsspec knows, what behaves like one.

    Raises UserError for a URL whose package is not installed.
    """
    if not is_url(text):
        return expanded(text)
    try:
        # Imported here: a run on local files does without them.
        from upath import UPath

        path = UPath(str(text))
        path.fs  # noqa: B018  (imports what the protocol needs)
    except ImportError as error:
        kind = str(text).partition(":")[0]
        raise UserError(
            f"{text}: reading {kind}:// needs another package ({error}); "
            "pip install universal-pathlib and s3fs (S3) or gcsfs (Google Cloud)"
        ) from error
    except ValueError as error:
        raise UserError(f"{text} is a URL of no kind known here ({error})") from error
    return cast(Path, path)


def arrow_storage(folder: Path) -> tuple[str, Any]:
    """A folder as Ray wants it: a path, and pyarrow's file system, or None for this machine's.

    The one that our own files go through, so that credentials and settings are the same.
    """
    if not is_url(folder):
        return str(folder), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    store: Any = folder
    return store.path, PyFileSystem(FSSpecHandler(store.fs))


def expanded(text: str | Path) -> Path:
    """A path with `~` taken for the home folder. Raises UserError where there is none."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: no home folder is known here; give the path in full") from error


def as_text(name: str) -> str:
    """A name made UTF-8 if it is not, by escapes, for files that hold nothing else."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_url(path: str | Path) -> bool:
    return "://" in str(path)
