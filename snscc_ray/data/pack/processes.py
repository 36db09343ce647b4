"""Write shards in many processes, which stop on request and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, forkserver
from typing import Any

from snscc_ray.config.errors import UserError
from snscc_ray.data.pack.shard import Shard, write_shard

_count: Any = None  # images that this pool has seen, shared by its processes
_stop: Any = None  # an event: set when the shards in progress are no longer wanted


class _Stopped(Exception):
    """The command was stopped, so the shard in progress stops too."""


def write_shards(
    shards: list[Shard], jobs: int, advance: Callable[[int], None]
) -> Generator[tuple[int, dict[str, Any]]]:
    """Write shards in `jobs` processes. Yields (number, record) of each as it is finished.

    After a failure the shards in progress are finished. Then the error of the shard with the
    lowest number is raised, so that timing does not matter.
    """
    if jobs == 1:
        for shard in shards:
            yield shard.number, write_shard(shard, advance)
        return
    # Processes, because small images are mostly work in Python. A fork of this process could hang
    # on the locks of its threads. The fork server has no threads, and imports everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision.io"])
    # Ctrl-C during its imports would print a traceback.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    count, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (count, stop))
    todo = iter(shards)
    running: dict[Future[dict[str, Any]], int] = {}
    failures: dict[int, BaseException] = {}
    shown = 0
    try:
        while True:
            if not failures:
                for shard in islice(todo, jobs - len(running)):
                    running[pool.submit(_work, shard)] = shard.number
            if not running:
                break
            finished, _ = wait_for(running, timeout=0.2, return_when=FIRST_COMPLETED)
            if (seen := count.value) > shown:
                advance(seen - shown)
                shown = seen
            for future in finished:
                number = running.pop(future)
                if error := future.exception():
                    failures[number] = error
                else:
                    yield number, future.result()
        if failures:
            raise failures[min(failures)]
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for lack of memory: run the same command again with "
            "fewer --jobs"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _begin_worker(count: Any, stop: Any) -> None:
    global _count, _stop
    _count, _stop = count, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all processes get Ctrl-C; the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent is killed. Otherwise this would write on, beside the next command."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(shard: Shard) -> dict[str, Any]:
    return write_shard(shard, _advance)


def _advance(images: int) -> None:
    if _stop.is_set():
        raise _Stopped
    with _count.get_lock():
        _count.value += images
