"""Write files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url

WRITE_ANEW = "bring back a copy of it, or repeat the command that wrote it, with --overwrite"


def _umask() -> int:
    """Read the umask, by setting it: once, at import, before there are threads."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _umask()


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file next to `path`, and move it into place once it is on disk.

    A kill or a full disk leaves the previous file unchanged. An object store shows an object only
    once it is complete. Raises UserError on a full disk.
    """
    if is_url(path):
        with tempfile.NamedTemporaryFile() as whole:
            write(cast(IO[bytes], whole))
            whole.flush()
            store: Any = path
            store.fs.put_file(whole.name, store.path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_UMASK)  # temporary files are private to their owner
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if is_disk_full(error):
            raise UserError(
                f"no space left while writing {path}; the previous file is untouched: "
                "free some space and run the same command again (`snscc run` with --resume)"
            ) from error
        raise


def check_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written; call it before the work, not after."""
    if is_url(path):
        return
    there = next(place for place in path.absolute().parents if place.exists())
    if not there.is_dir():
        raise UserError(f"{path}: {there} is a file, not a folder; give another file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {there} is not writable; give a file in another folder")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one of its causes, means that the disk or the quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        # torch's zip writer reports a failed write only in its message.
        if isinstance(seen, RuntimeError) and "file write failed" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def write_json(path: Path, value: object) -> None:
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error}): {WRITE_ANEW}") from error
