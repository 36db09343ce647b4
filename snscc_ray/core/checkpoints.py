"""Save checkpoints whole, and load them without executing pickled code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.core.storage import write_whole

FORMAT = 1
# How to recover a damaged file of a run; valid for every command that may report one.
AGAIN = (
    "bring back a copy of it, or remove it and repeat the command that made the run (`snscc run` "
    "with --resume)"
)


def save(path: Path, payload: dict[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them."""
    write_whole(path, lambda file: torch.save({"format": FORMAT, **payload}, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint. Raises UserError if it is missing, truncated, altered or foreign."""
    try:
        held = io.BytesIO(path.read_bytes()) if is_url(path) else path
        check_bytes(held)
        payload = torch.load(held, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}: {AGAIN}") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint: {AGAIN}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} was not written by this version: {AGAIN}")
    return payload


def check_bytes(held: Path | IO[bytes]) -> None:
    """Raise BadZipFile if a torch file was altered; torch itself would load altered weights."""
    if isinstance(held, Path) and not held.is_file():
        return  # reading it will report that
    with zipfile.ZipFile(held) as parts:
        altered = parts.testzip()
    if altered is not None:
        raise zipfile.BadZipFile(f"{altered} is altered")
    if not isinstance(held, Path):
        held.seek(0)


def load_final(path: Path, channels: int, device: torch.device | str) -> dict[str, Any]:
    """Load a finished stage's checkpoint, with `network` and `normalize`.

    Raises UserError if it cannot be used for prediction.
    """
    held = load(path, device)
    network, normalize = held.get("network"), held.get("normalize")
    if normalize is None:
        raise UserError(f"{path} was written by an older version; run the recipe again")
    try:
        mean, std = (torch.tensor(normalize[name]) for name in ("mean", "std"))
        sound = (
            mean.shape == std.shape == (channels,)
            and bool(mean.isfinite().all() & std.isfinite().all() & (std > 0).all())
            and isinstance(network, dict)
            and all(isinstance(weight, torch.Tensor) for weight in network.values())
            and not not_finite(network)
        )
    except (KeyError, TypeError, ValueError, RuntimeError):
        sound = False
    if not sound:
        raise UserError(f"checkpoint {path} holds no usable network: {AGAIN}")
    return held


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of entries with a NaN, an infinity or a negative variance."""
    return [
        name
        for name, weight in state.items()
        if not weight.isfinite().all()
        or (name.endswith("running_var") and bool((weight < 0).any()))
    ]


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], origin: object) -> None:
    """Load a state dict strictly. Raises UserError naming the first weight that does not fit."""
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own or own[name].shape != state[name].shape:
            have = tuple(state[name].shape) if name in state else "absent"
            want = tuple(own[name].shape) if name in own else "absent"
            raise UserError(
                f"{origin} has another architecture: {name} is {have} there and {want} in this "
                "recipe; bring back the recipe.json that it was made with, or run the recipe into "
                "another folder"
            )
    module.load_state_dict(state)
