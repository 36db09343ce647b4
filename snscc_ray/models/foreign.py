"""Read checkpoints of other projects from a local file, the web or an object store.

Nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path, is_url
from snscc_ray.core.checkpoints import check_bytes

_COPY = "copy or download it again, or give another"


def read_checkpoint(place: str) -> Any:
    """Read tensors, numbers, texts and containers of them from a torch or safetensors file.

    Objects of any other class become empty. Raises UserError if the file cannot be read.
    """
    content = _bytes(place)
    if not content:
        raise UserError(f"{place} is empty; {_COPY}")
    if place.endswith(".safetensors"):
        return _read_safetensors(content, place)
    parts = _parts(content)
    try:
        # Every class or function that the file names becomes an empty container.
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
        if parts is not None:  # files from before torch 1.6 name none, and are just as safe
            check_bytes(io.BytesIO(content))
            named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
            stand_ins += [(_Nothing, name) for name in named]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on how the file was made: not the user's fault
            held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError, TypeError, RuntimeError, EOFError,
            ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:  # fmt: skip
        if isinstance(error, pickle.UnpicklingError) and content[:1] in (b"P", b"\x80"):
            raise UserError(
                f"{place} holds pickled objects, which are not loaded here; extract the weights "
                "where it was written: torch.save(torch.load(FILE, "
                "weights_only=False)['state_dict'], 'weights.pth')"
            ) from error
        if any(name.endswith("/constants.pkl") for name in parts or ()):
            raise UserError(
                f"{place} is TorchScript, a program and its weights; extract the weights: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            ) from error
        raise UserError(f"{place} is damaged or not a torch checkpoint; {_COPY}") from error
    if "_modules" in getattr(held, "__dict__", ()):  # an object that became empty
        raise UserError(
            f"{place} is a whole pickled model, which is not loaded here; save its weights where "
            "it was written: torch.save(model.state_dict(), 'weights.pth')"
        )
    return held


def digest(place: str) -> str:
    """Return a hash of the file's content. Raises UserError if it cannot be read."""
    local = None if is_url(place) else as_path(place)
    there = local.stat() if local is not None and local.exists() else None
    return _digest(place, there.st_mtime_ns if there else 0, there.st_size if there else 0)


@lru_cache(maxsize=16)
def _digest(place: str, changed: int, size: int) -> str:
    return hashlib.blake2b(_bytes(place), digest_size=16).hexdigest()


def _parts(content: bytes) -> list[str] | None:
    """Return the names of a zip file's parts (none if it is damaged), or None for another file."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            return parts.namelist()
    except zipfile.BadZipFile:
        return []


class _Nothing:
    """Replaces every class that a checkpoint names and torch does not know."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()  # the only container whose items and state torch sets


def _read_safetensors(content: bytes, place: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise UserError(f"{place} needs safetensors; pip install safetensors") from error
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{place} is damaged or not a safetensors file; {_COPY}") from error


def _bytes(place: str) -> bytes:
    try:
        return _reached(place).read_bytes()
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"encoder.weights={place}: there is no such file; give an existing one"
        ) from error
    except IsADirectoryError as error:
        raise UserError(
            f"encoder.weights={place} is a folder; give a file in it (in a run folder: "
            "boost/final.pt)"
        ) from error
    except Exception as error:  # an object store's client may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"encoder.weights={place} cannot be read ({reason}); check the address and the rights"
        ) from error


def _reached(place: str) -> Path:
    """Return the file's path; a web file, which does not change, is copied to torch's cache."""
    if not place.startswith(("http://", "https://")):
        return as_path(place)
    name = place.partition("?")[0].rpartition("/")[2]
    mark = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
    copy = Path(torch.hub.get_dir(), "checkpoints", f"snscc-{mark}-{name}")
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(place, str(copy), progress=False)
    return copy
