"""Work in parallel on a CPU, with results that do not depend on the number of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from snscc_ray.core.memory import keeping_freed_memory

# Like `map`: a function and its arguments, one item of each iterable at a time.
Mapping = Callable[..., Iterator[Any]]
_AHEAD = 3  # items in work or waiting, per thread


def threads_of(device: torch.device) -> int:
    """Return how many items are worked on at a time."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@contextmanager
def mapping(device: torch.device) -> Iterator[Mapping]:
    """On a CPU, map in one thread per core, each with its own item; results come in order.

    Items are taken as they are needed, a few ahead of the results, so an iterable may be too large
    for memory.
    Threads that share the operations of one item wait for one another at each: 1.1 to 3 times as
    slow, the more other work there is on the machine. They also add in an order that depends on
    their number. Inside, torch's operations use one thread each, and the items have no gradients.
    """
    if device.type != "cpu":
        yield map
        return
    threads = threads_of(device)
    with keeping_freed_memory(), ThreadPoolExecutor(threads, initializer=_prepare) as pool:
        torch.set_num_threads(1)
        try:
            yield partial(_map_ahead, pool, _AHEAD * threads)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _map_ahead(
    pool: ThreadPoolExecutor, ahead: int, function: Callable[..., Any], *items: Iterable[Any]
) -> Iterator[Any]:
    """Yield the results in order, with at most `ahead` items in work or waiting."""
    begun: deque[Future[Any]] = deque()
    for arguments in zip(*items, strict=False):
        begun.append(pool.submit(function, *arguments))
        if len(begun) == ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # each thread has its own mode
