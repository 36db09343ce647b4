"""The C library's memory, in processes of their own: its settings hold for a whole process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
MEGABYTES, ROUNDS = 40, 10
# A thread that gets and frees blocks as large as activations, and the pages that it is given.
WORK = f"""
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from snscc_ray.core.memory import keeping_freed_memory, share_one_pool
share_one_pool()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def rounds(pool):
    before = faults()
    for _ in range({ROUNDS}):
        pool.submit(lambda: torch.ones({MEGABYTES} << 18).sum()).result()
    return faults() - before
kept = keeping_freed_memory if sys.argv[1] == "kept" else nullcontext
with kept(), kept(), ThreadPoolExecutor(1) as pool:
    rounds(pool)
    inside = rounds(pool)
import psutil
print(inside, psutil.Process().memory_info().rss >> 20)
"""


def pages_and_megabytes(*command: str, **environment: str) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", WORK, *command],
        env={"PATH": "/usr/bin", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    pages, megabytes = done.stdout.split()
    return int(pages), int(megabytes)


@glibc
def test_large_blocks_are_used_again_and_given_back_at_the_end() -> None:
    block = MEGABYTES * 256  # pages of 4 KB
    pages, usual = pages_and_megabytes("usual")
    assert pages > block * ROUNDS / 2, "else there is nothing to gain"
    pages, megabytes = pages_and_megabytes("kept")
    assert pages < block
    assert megabytes < usual + MEGABYTES / 2


@glibc
def test_what_the_user_set_up_is_left_alone() -> None:
    pages, _ = pages_and_megabytes("kept", MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert pages > MEGABYTES * 256 * ROUNDS / 2
