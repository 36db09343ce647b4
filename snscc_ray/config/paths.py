"""Local paths and object-store URLs behind one interface: pathlib's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from snscc_ray.config.errors import UserError


def as_path(text: str | Path) -> Path:
    """Return a `Path`, or a path-like object for `s3://bucket/x` and other URLs fsspec knows.

    Raises UserError for an unknown kind of URL, or one whose package is not installed.
    """
    if not is_url(text):
        return expanded(text)
    try:
        # Imported here because local files do not need it.
        from upath import UPath

        path = UPath(str(text))
        path.fs  # noqa: B018  (imports the protocol's package)
    except ImportError as error:
        kind = str(text).partition(":")[0]
        raise UserError(
            f"{text}: reading {kind}:// needs another package ({error}); "
            "pip install universal-pathlib and s3fs (S3) or gcsfs (Google Cloud)"
        ) from error
    except ValueError as error:
        raise UserError(f"{text}: this kind of URL is not supported ({error})") from error
    return cast(Path, path)


def arrow_storage(folder: Path) -> tuple[str, Any]:
    """Return a folder as Ray takes it: a path and a pyarrow file system (None if local).

    The file system is the one our own files use, so credentials and settings are the same.
    """
    if not is_url(folder):
        return str(folder), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    store: Any = folder
    return store.path, PyFileSystem(FSSpecHandler(store.fs))


def expanded(text: str | Path) -> Path:
    """Expand `~` to the home folder. Raises UserError if no home folder is known."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: the home folder is unknown; give the full path") from error


def absolute(path: Path) -> Path:
    """Return a local path from the root on, for another process; a URL stays as it is."""
    return path if is_url(path) else path.absolute()


def as_text(name: str) -> str:
    """Escape the parts of a name that are not UTF-8, for files that hold UTF-8 only."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_url(path: str | Path) -> bool:
    return "://" in str(path)
