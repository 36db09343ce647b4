"""Work in threads, with results in order and a limit on how far it runs ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from PIL import Image

T = TypeVar("T")
S = TypeVar("S")


def in_threads(
    work: Callable[[S], T], items: Sequence[S], workers: int, ahead: int
) -> Generator[T]:
    """Yield `work(item)` in order. At most `ahead` results are in progress or waiting."""
    Image.init()  # here, because the threads would race for it
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            if len(pending) >= max(1, ahead):
                yield pending.popleft().result()
            pending.append(pool.submit(work, item))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Failed(NamedTuple):
    error: BaseException


def made_ahead(items: Generator[T], depth: int) -> Generator[T]:
    """Yield the same items, made in a thread at most `depth` items ahead.

    When this generator closes, the thread closes `items` and ends.
    """
    queue: SimpleQueue[T | _Failed | None] = SimpleQueue()  # None: no more
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def make() -> None:
        try:
            with closing(items):
                while room.acquire() and not stopped.is_set():
                    item = next(items, None)
                    queue.put(item)
                    if item is None:
                        return
        except BaseException as error:
            queue.put(_Failed(error))

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()
