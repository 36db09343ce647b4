"""Claims: lock files that let one command at a time write into a folder or a file.

A claim is a file that describes its holder. System locks are not used, as a shared file system may
have none. O_EXCL creates the file: it lets only one of two processes succeed, there as well.
"""

from __future__ import annotations

import _thread
import errno
import json
import os
import platform
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.core.storage import is_disk_full

CLAIM = ".snscc-in-use"
# How often a holder touches its claim, and after how long a silent holder on another machine counts
# as dead: longer than a file server is away.
_BEAT_SECONDS = 20.0
_DEAD_SECONDS = 15 * 60.0
_POLL_SECONDS = 1.0
# Errors of a folder without write permission, or on a read-only disk.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def claimed(folder: Path, say: Callable[[str], object], *, patient: bool = False) -> Iterator[None]:
    """Hold a folder exclusively; create it if needed, and remove it again if it stays empty.

    Takes over the claim of a dead process. A folder without write permission is only checked for a
    holder. Raises UserError naming the holder; with `patient`, waits for it instead.
    """
    if is_url(folder):
        say(f"{folder} is in an object store, which cannot be locked: one command at a time there")
        yield
        return
    folder = folder.absolute()
    if folder.exists() and not os.access(folder, os.W_OK):
        refuse_in_use(folder)
        yield
        return
    with _held(folder, folder / CLAIM, patient):
        yield


@contextmanager
def claimed_file(file: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Hold a file exclusively for writing; other files in its folder stay free.

    Raises UserError naming the holder.
    """
    if is_url(file):
        say(f"{file} is in an object store, which cannot be locked: one command at a time there")
        yield
        return
    file = file.absolute()
    with _held(file, file.with_name(f"{CLAIM}.{file.name}")):
        yield


@contextmanager
def _held(what: Path, path: Path, patient: bool = False) -> Iterator[None]:
    """Hold `what` by the claim file `path`."""
    made = _make(path.parent)
    own = _Own()
    try:
        while (holder := _take(path, own)) is not None:
            if not patient:
                raise UserError(_in_use(what, path, holder))
            time.sleep(_POLL_SECONDS)
        over = threading.Event()
        threading.Thread(target=_beat, args=(what, path, own, over), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            if _read(path) == own.text:
                path.unlink(missing_ok=True)
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def refuse_in_use(folder: Path) -> None:
    """Raise UserError if a command is writing into the folder, as its content is incomplete."""
    if is_url(folder):
        return
    path = folder / CLAIM
    text = _read(path)
    if text is not None and not _dead(path, text):
        raise UserError(_in_use(folder, path, text))


def _make(folder: Path) -> list[Path]:
    """Make a folder and return all folders that were made, innermost first. Raises UserError."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file, not a folder; use another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NOT_WRITABLE:
            raise UserError(f"{there} is not writable; use another folder") from error
        if is_disk_full(error):
            raise
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); use another folder"
        ) from error
    return made


class _Own:
    """The text of this process's claim; a token tells two claims of one process apart."""

    def __init__(self) -> None:
        command = Path(sys.argv[0]).stem.replace("__main__", "snscc")
        about = {
            "machine": _machine(),
            "host": platform.node(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "command": " ".join([command, *sys.argv[1:2]]),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "token": secrets.token_hex(8),
        }
        self.text = json.dumps(about)


def _take(path: Path, own: _Own) -> str | None:
    """Make the claim and return None, or return the text of the live holder's claim."""
    while True:
        try:
            _create(path, own)
            return None
        except FileExistsError:
            text = _read(path)
        if text is None:
            continue  # it was just released
        if not _dead(path, text):
            return text
        # If several processes find the claim dead, only one can create the "-next" file. It checks
        # the claim again and moves its own over it, so that there is a claim at all times.
        following = path.with_name(f"{path.name}-next")
        try:
            _create(following, own)
        except FileExistsError:
            if _silent_seconds(following) > _BEAT_SECONDS:  # its maker was killed in between
                following.unlink(missing_ok=True)
            return ""
        if _read(path) != text:
            following.unlink(missing_ok=True)
            continue
        with suppress(FileNotFoundError):
            os.replace(following, path)
        if _read(path) == own.text:
            return None


def _create(path: Path, own: _Own) -> None:
    """Create the claim file. Raises FileExistsError."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(own.text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _about(text: str) -> dict[str, Any]:
    """Parse a claim; empty if its maker has not written it yet, or was killed before that."""
    try:
        about = json.loads(text)
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _dead(path: Path, text: str) -> bool:
    about = _about(text)
    if about.get("machine") == _machine():
        started = _started(about["pid"])
        # The pid alone is not enough: another process may have it by now.
        return started is None or started not in ("", about["started"])
    return _silent_seconds(path) > (_DEAD_SECONDS if about else _BEAT_SECONDS)


def _silent_seconds(path: Path) -> float:
    """Return the seconds since the claim was last touched, or 0 if it is gone.

    Uses the file system's clock, which may differ from this machine's.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}-") as now:
            return os.stat(now.name).st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0


def _in_use(what: Path, path: Path, text: str) -> str:
    about = _about(text)
    if not about:
        return f"{what} is in use by a process that has just started; try again in a moment"
    here = about["machine"] == _machine()
    who = f"process {about['pid']} ({about['command']})" + f" on {about['host']}" * (not here)
    mend = f"wait until it ends, or use another {'folder' if path.name == CLAIM else 'file'}"
    if not here:
        mend += f"; if it no longer runs there, remove {path}"
    return f"{what} is in use by {who} since {about['since']}: {mend}"


def _beat(what: Path, path: Path, own: _Own, over: threading.Event) -> None:
    """Touch the claim regularly; end this process if its claim was taken over while it slept."""
    while not over.wait(_BEAT_SECONDS):
        try:
            if _read(path) != own.text and not over.is_set():
                print(f"snscc: {what} was taken over by another process", file=sys.stderr)
                _thread.interrupt_main()
                return
            os.utime(path)
        except OSError:
            continue  # a file server may be away for a while


def _machine() -> str:
    """Name the scope of process ids: a host, and a container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()} {space}".strip()


def _started(pid: int) -> str | None:
    """Return a process's start time, in a form that changes of the clock do not affect.

    None if it is not running; empty if it is, but its start time is not accessible.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        if not psutil.pid_exists(pid):
            return None
        try:
            return str(psutil.Process(pid).create_time())  # a system without /proc
        except psutil.Error:
            return ""
    return None if state[0] in (b"Z", b"X") else f"{boot} {state[19].decode()}"
