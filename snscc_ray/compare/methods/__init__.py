"""The methods of a comparison: one file each, and one line here.

A method is a function from a `Study` to a `MethodResult`. With a frozen encoder, methods work on
its features; those that need pixels, or train the encoder, are left out then. This module does not
import torch, to keep `snscc compare --help` fast.
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
    file: str  # in this folder, as in a dotted name
    stages: tuple[StageName, ...]  # those whose settings it trains by
    function: str = "cluster"
    on_features: str | None = None  # its title with a frozen encoder; None: it does not run then
    after: tuple[str, ...] = ()  # methods that train what it starts from, if they run, too


# In the order of the table.
METHODS = {
    "kmeans": Method("K-Means on pixels", "kmeans", (), on_features="K-Means on features"),
    "sc": Method("Spectral on pixels", "sc", (), on_features="Spectral on features"),
    "ac": Method("Agglomerative on pixels", "ac", (), on_features="Agglomerative on features"),
    "nmf": Method("NMF on pixels", "nmf", ()),
    "ae": Method("AE + K-Means", "ae", ("train",)),
    "dae": Method("DAE + K-Means", "dae", ("train",)),
    "vae": Method("VAE + K-Means", "vae", ("train",)),
    "dec": Method("DEC", "dec", ("train",), after=("dae",)),
    "iic": Method("IIC", "iic", ("train",)),
    "pica": Method("PICA", "pica", ("train",)),
    "cc": Method("CC", "cc", ("train",)),
    "pretext": Method("Pretrain + K-Means", "ours", ("pretrain",), "pretext_kmeans"),
    "temi": Method(
        "Pretrain + TEMI", "features.temi", ("pretrain",), on_features="TEMI on features"
    ),
    "turtle": Method(
        "Pretrain + TURTLE", "features.turtle", ("pretrain",), on_features="TURTLE on features"
    ),
    "scan": Method("SCAN", "scan", STAGES, on_features="SCAN on features"),
    "snscc": Method("SNSCC (ours)", "ours", STAGES, on_features="SNSCC (ours) on features"),
}


def load(name: str) -> Callable[[Study], MethodResult]:
    """Return the function of the named method."""
    method = METHODS[name]
    module = import_module(f"{__name__}.{method.file}")
    function: Callable[[Study], MethodResult] = getattr(module, method.function)
    return function


def title_of(name: str, *, frozen: bool) -> str:
    """Return a method's title in the table, for a frozen encoder or another."""
    method = METHODS[name]
    return method.on_features or method.title if frozen else method.title


def stages_of(names: Iterable[str], *, frozen: bool = False) -> tuple[StageName, ...]:
    """Return the stages whose settings any of the methods trains by.

    All methods need a frozen encoder's features, which are computed in Pretrain's place.
    """
    used = {stage for name in names for stage in METHODS[name].stages}
    return tuple(stage for stage in STAGES if stage in used or (frozen and stage == "pretrain"))


def left_out() -> tuple[str, ...]:
    """Return the methods that do not run with a frozen encoder."""
    return tuple(name for name, method in METHODS.items() if method.on_features is None)


def refuse_left_out(names: Iterable[str]) -> None:
    """Raise UserError if any of the methods does not run with a frozen encoder."""
    out = left_out()
    if wrong := [name for name in names if name in out]:
        fit = ", ".join(name for name in METHODS if name not in out)
        hint = "pretext is kmeans there; " if "pretext" in wrong else ""
        raise UserError(
            f"--methods {','.join(wrong)}: with a frozen encoder, methods work on its features, "
            f"and not on pixels; {hint}use all, or some of {fit}"
        )


def chosen(text: str, *, frozen: bool = False) -> tuple[str, ...]:
    """Parse `all` or `name,…` into methods, in the table's order, each once.

    With a frozen encoder, `all` is without those of `left_out`. Raises UserError for an unknown
    name.
    """
    if text.strip() == "all":
        return tuple(name for name in METHODS if not (frozen and name in left_out()))
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
