"""Work in parallel on a CPU, with results that do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from snscc_ray.core.memory import keeping_freed_memory

# Like `map`: a function and its arguments, one item of each sequence at a time.
Mapping = Callable[..., Iterator[Any]]


def threads_of(device: torch.device) -> int:
    """Return how many items are worked on at a time."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@contextmanager
def mapping(device: torch.device) -> Iterator[Mapping]:
    """On a CPU, map in one thread per core, each with its own item; results come in order.

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
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # each thread has its own mode
