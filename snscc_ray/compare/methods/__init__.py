"""The methods of a comparison: one file each, and one line here.

A method is a function from a `Study` to a `MethodResult`. This module does not import torch, to
keep `snscc compare --help` fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES, StageName

if TYPE_CHECKING:
    from snscc_ray.compare.study import MethodResult, Study


class Method(NamedTuple):
    title: str  # in the table
    file: str  # in this folder, without .py
    stages: tuple[StageName, ...]  # those whose settings it trains by
    function: str = "cluster"


# In the order of the table.
METHODS = {
    "kmeans": Method("K-Means on pixels", "kmeans", ()),
    "sc": Method("Spectral on pixels", "sc", ()),
    "ac": Method("Agglomerative on pixels", "ac", ()),
    "nmf": Method("NMF on pixels", "nmf", ()),
    "ae": Method("AE + K-Means", "ae", ("train",)),
    "dae": Method("DAE + K-Means", "dae", ("train",)),
    "vae": Method("VAE + K-Means", "vae", ("train",)),
    "dec": Method("DEC", "dec", ("train",)),
    "iic": Method("IIC", "iic", ("train",)),
    "pica": Method("PICA", "pica", ("train",)),
    "cc": Method("CC", "cc", ("train",)),
    "pretext": Method("Pretrain + K-Means", "ours", ("pretrain",), "pretext_kmeans"),
    "scan": Method("SCAN", "scan", STAGES),
    "snscc": Method("SNSCC (ours)", "ours", STAGES),
}


def load(name: str) -> Callable[[Study], MethodResult]:
    """Return the function of the named method."""
    method = METHODS[name]
    module = import_module(f"{__name__}.{method.file}")
    function: Callable[[Study], MethodResult] = getattr(module, method.function)
    return function


def stages_of(names: Iterable[str]) -> tuple[StageName, ...]:
    """Return the stages whose settings any of the methods trains by."""
    used = {stage for name in names for stage in METHODS[name].stages}
    return tuple(stage for stage in STAGES if stage in used)


def chosen(text: str) -> tuple[str, ...]:
    """Parse `all` or `name,…` into methods, in the table's order, each once.

    Raises UserError for an unknown name.
    """
    if text.strip() == "all":
        return tuple(METHODS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"--methods {text}: there is no method {name!r}; {hint}"
                f"use all, or some of {', '.join(METHODS)}"
            )
    return tuple(name for name in METHODS if name in names)
