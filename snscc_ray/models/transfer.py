"""Find an encoder's weights in a checkpoint of any project.

No layout is hard-coded. The search finds the place in a checkpoint, and the prefix of names, with
most of the encoder's entries: `module.encoder_q.` (MoCo), `backbone.` (SCAN, solo-learn),
`online_network.encoder.`. A ResNet's parts may also be named by number (lightly cuts it into a
Sequential), and its `downsample` may be called `shortcut` (SCAN).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TypeGuard

import torch
from torch import Tensor, nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import EncoderSettings
from snscc_ray.core.checkpoints import not_finite
from snscc_ray.models.encoders import build_encoder

State = dict[str, Tensor]

# Names of the momentum copy of a network; the network itself is preferred.
_COPY = re.compile(r"(^|[._])(ema|momentum|target|teacher|key)([._]|$)|encoder_k\.")
_HEAD = re.compile(r"(fc|classifier|heads?|linear)\.")
_NAMES = 3  # number of names that a message lists
_DEPTH = 4


class Unusable(UserError):
    """A checkpoint holds no weights that any network could start from."""


@dataclass(frozen=True)
class Imported:
    """The weights that a checkpoint has for an encoder, and what was left out."""

    origin: str
    place: str
    """Place in the checkpoint, such as `state_dict: module.encoder_q.`."""
    weights: State
    """Weights by the encoder's own names."""
    head: tuple[str, ...]
    """Entries of the same network's classifier, left out."""
    unused: tuple[str, ...]
    """Other entries: projection heads, queues, copies."""
    absent: tuple[str, ...]
    """Counters and the like that the checkpoint lacks; the encoder keeps its own."""
    summed: bool
    """Whether an RGB stem was summed over its channels, for grey images."""

    def __str__(self) -> str:
        said = [f"encoder: {len(self.weights)} weights from {self.origin}{self.place}"]
        if self.summed:
            said.append("its RGB stem is summed over the channels, for grey images")
        for what, names in (
            ("head left out", self.head),
            ("unused", self.unused),
            # Counters of batch norms are of no use to a network that is trained already.
            ("not in it", [n for n in self.absent if not n.endswith("num_batches_tracked")]),
        ):
            if names:
                said.append(f"{what}: {_listed(names)}")
        return "; ".join(said)


def import_weights(held: object, encoder: nn.Module, origin: str) -> Imported:
    """Find the encoder's weights in `held`, a loaded checkpoint; the encoder is not changed.

    Raises UserError unless every weight of the encoder is there in its shape, and the same parts of
    the network hold nothing else.
    """
    own, states = encoder.state_dict(), list(_states(held))
    if not states:
        raise Unusable(
            f"{origin} holds no weights by name, as torch.save(model.state_dict(), FILE) makes them"
        )
    fits = [
        _Fit.of(own, place, state, prefix, rename)
        for place, state in states
        for rename in _renamings(encoder)
        for prefix in _prefixes(state, rename(next(iter(own))))
    ]
    best = max(
        fits,
        key=lambda fit: (fit.score, not _COPY.search(f"{fit.place}.{fit.prefix}")),
        default=None,
    )
    if best is None or not best.score:
        raise UserError(f"{origin} holds no weights of this encoder")
    if broken := not_finite(best.weights):
        raise Unusable(
            f"{origin}{best.where} is damaged: {_listed(broken)} hold a NaN, an infinity or a "
            "variance below zero"
        )
    if not any(weight.any() for weight in best.weights.values() if weight.dim() > 1):
        raise Unusable(f"{origin}{best.where} holds nothing but zeros")
    lacking = [name for name in own if name not in best.weights]
    needed = [name for name in lacking if own[name].is_floating_point()]
    if needed:
        raise UserError(f"{origin}{best.where} does not fit: {best.complaint(own, needed)}")
    taken = set(best.names.values())
    others = [name for name in best.state if name not in taken]
    heads = [name for name in others if _HEAD.match(name.removeprefix(best.prefix))]
    # A ResNet-34 has all names and shapes of a ResNet-18.
    parts = tuple({best.prefix + best.first(name) for name in taken})
    surplus = [name for name in others if name.startswith(parts) and name not in heads]
    if surplus:
        raise UserError(
            f"{origin}{best.where} does not fit: it belongs to a larger encoder, with "
            f"{_listed(surplus)}"
        )
    return Imported(
        origin,
        best.where,
        best.weights,
        head=tuple(heads),
        unused=tuple(name for name in others if name not in heads),
        absent=tuple(lacking),
        summed=any(
            best.state[best.names[name]].shape != weight.shape
            for name, weight in best.weights.items()
        ),
    )


def infer_encoder(held: object) -> EncoderSettings:
    """Return the built-in encoder that fits a checkpoint. Raises UserError if none does."""
    candidates = [
        EncoderSettings(name=name, stem=stem)
        for name, stem in product(("resnet18", "resnet34", "resnet50"), ("small", "standard"))
    ]
    for _, state in _states(held):
        for name, weight in state.items():
            if name.endswith("layers.0.weight") and weight.dim() == 4:
                candidates.append(EncoderSettings(name="convnet", width=weight.shape[0]))
    for settings in candidates:
        with torch.device("meta"):
            encoder = build_encoder(settings, channels=1)  # accepts an RGB stem as well
        try:
            import_weights(held, encoder, "it")
        except Unusable:
            raise
        except UserError:
            continue
        return settings
    raise UserError("its shapes match no known encoder")


@dataclass(frozen=True)
class _Fit:
    """One way to match a checkpoint: its names for the encoder's entries."""

    place: str
    prefix: str
    state: State
    names: dict[str, str]
    weights: State

    @classmethod
    def of(
        cls, own: State, place: str, state: State, prefix: str, rename: Callable[[str], str]
    ) -> _Fit:
        names = {name: prefix + rename(name) for name in own}
        names = {name: there for name, there in names.items() if there in state}
        weights = {}
        for name, there in names.items():
            weight = _shaped(state[there], own[name].shape)
            numbers = weight is not None and weight.is_floating_point()
            if weight is not None and (numbers or not own[name].is_floating_point()):
                weights[name] = weight
        return cls(place, prefix, state, names, weights)

    @property
    def score(self) -> int:
        """Number of weights that fit, without counters, which some programs leave out."""
        return sum(weight.is_floating_point() for weight in self.weights.values())

    def first(self, name: str) -> str:
        """The part of the network that a file's entry belongs to, such as `layer1.`."""
        part, dot, _ = name.removeprefix(self.prefix).partition(".")
        return part + dot

    @property
    def where(self) -> str:
        found = ": ".join(part for part in (self.place, self.prefix) if part)
        return f" ({found})" if found else ""

    def complaint(self, own: State, needed: list[str]) -> str:
        said = f"it lacks {_listed(needed)} of the encoder's {len(own)} entries"
        name = needed[0]
        if name in self.names:
            there, here = tuple(self.state[self.names[name]].shape), tuple(own[name].shape)
            said += f"; {name} is {there} there and {here} here"
        return said


def _shaped(weight: Tensor, shape: torch.Size) -> Tensor | None:
    """Return the weight in that shape, or None; grey counts as RGB with three equal channels."""
    if weight.shape == shape:
        return weight
    if len(shape) == 4 and weight.shape == (shape[0], 3, *shape[2:]) and shape[1] == 1:
        return weight.sum(1, keepdim=True)
    return None


def _states(held: object, place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield every state dict in a checkpoint, with its place."""
    if not isinstance(held, Mapping) or depth > _DEPTH:
        return
    items = [(name, value) for name, value in held.items() if isinstance(name, str)]
    # Compiled modules have this part in their names, at any depth.
    found = {name.replace("_orig_mod.", ""): v for name, v in items if _plain(v)}
    if found:
        yield place, found
    for name, value in items:
        yield from _states(value, f"{place}.{name}".lstrip("."), depth + 1)


def _plain(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of numbers that can be copied into another."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta)
    )


def _renamings(encoder: nn.Module) -> Iterator[Callable[[str], str]]:
    """Yield the ways in which other projects rename the encoder's entries."""
    children = dict(encoder.named_children())
    holding = [name for name, child in children.items() if child.state_dict()]
    for numbered in ({}, _numbers(list(children)), _numbers(holding)):
        for shortcut in ("downsample", "shortcut"):
            yield _Renaming(numbered, shortcut)


def _numbers(names: list[str]) -> dict[str, str]:
    return {name: str(number) for number, name in enumerate(names)}


@dataclass(frozen=True)
class _Renaming:
    first: dict[str, str]
    shortcut: str

    def __call__(self, name: str) -> str:
        first, dot, rest = name.partition(".")
        return self.first.get(first, first) + dot + rest.replace("downsample.", f"{self.shortcut}.")


def _prefixes(state: State, anchor: str) -> Iterator[str]:
    """Yield every prefix before the name of the encoder's first entry."""
    for name in state:
        if name == anchor or name.endswith(f".{anchor}"):
            yield name.removesuffix(anchor)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(names[:_NAMES]) + ", …" * (len(names) > _NAMES)
    return f"{len(names)} ({shown})"
