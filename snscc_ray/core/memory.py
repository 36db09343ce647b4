"""The C library's memory: keep what is freed for the next allocation.

glibc gives large blocks back to the system as soon as they are freed. A network's activations are
such blocks: every batch gets new ones, and the system clears them page by page. On a CPU that is a
third of the time of a frozen encoder (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MOST = 2**31 - 1
# The largest thresholds that glibc chooses by itself; a program that frees large blocks has them.
_USUAL_MMAP, _USUAL_TRIM = 32 << 20, 64 << 20
# What a user sets instead; see mallopt(3).
_SET_BY_USER = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")

_users = 0  # of `keeping_freed_memory` at this moment


@cache
def share_one_pool() -> None:
    """Let all threads share one pool: glibc never keeps large blocks for a single thread.

    It must come before other threads start.
    """
    if libc := _glibc():
        libc.mallopt(_ARENA_MAX, 1)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keep freed memory, and return it to the system at the end.

    Does nothing with another C library, nor if the environment sets up the memory.
    """
    global _users
    libc = _glibc()
    if libc is None:
        yield
        return
    _users += 1
    libc.mallopt(_MMAP_THRESHOLD, _MOST)
    libc.mallopt(_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
            libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
            libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if platform.libc_ver()[0] != "glibc" or any(n.startswith(_SET_BY_USER) for n in os.environ):
        return None
    return ctypes.CDLL(None)
