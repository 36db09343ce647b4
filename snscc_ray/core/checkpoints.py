"""Checkpoints: saved whole, and read without executing pickled code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.core.storage import write_whole

FORMAT = 1


def save(path: Path, payload: dict[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them."""
    write_whole(path, lambda file: torch.save({"format": FORMAT, **payload}, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save` wrote. Raises UserError when it is truncated or foreign."""
    try:
        held = io.BytesIO(path.read_bytes()) if is_url(path) else path
        payload = torch.load(held, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"checkpoint {path} is truncated or not a checkpoint; delete it and use --resume to "
            "train that stage again"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} was not written by this version; use --overwrite")
    return payload


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], origin: object) -> None:
    """Load a state dict strictly. Raises UserError naming the first weight that does not fit."""
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own or own[name].shape != state[name].shape:
            have = tuple(state[name].shape) if name in state else "absent"
            want = tuple(own[name].shape) if name in own else "absent"
            raise UserError(
                f"{origin} is of another architecture: {name} is {have} there and {want} in this "
                "recipe; use the recipe that made it or another --out"
            )
    module.load_state_dict(state)
