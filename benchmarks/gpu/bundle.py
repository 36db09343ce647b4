"""Pack a run into a few flat files of at most 15 MB, for transfers with few and small files.

Weights and checkpoints without optimizer state are stored in half precision, so a run resumed from
a bundle is not bit for bit the uninterrupted run. The optimizer's momentum starts anew; ten steps
make up for that. What is kept, by the state of the run:

in Pretrain          Pretrain's checkpoint
in Train             Pretrain's result, its neighbours, Train's checkpoint
Train done, or Boost Pretrain's result, its neighbours, Train's result (Boost is short: it restarts)
all done             the last stage's result, the assignments and the figures: a run folder that
                     `snscc predict` accepts
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES

LIMIT = 15 * 10**6  # bytes per file
_NAME = "bundle.tar"
_FOR_ALL = ("recipe.json", "metrics.jsonl", "baselines.json", "sittings.json", "compiled.bin")
_RESULT = ("metrics.json", "assignments.parquet", "pretrain/neighbors.parquet")


def pack(run: Path, out: Path, limit: int = LIMIT) -> list[Path]:
    """Write the run as `bundle.tar.00`, `.01`, … into `out`; return the files in order.

    Removes the pieces of an older bundle first. Raises UserError if there is no run.
    """
    if not (run / "recipe.json").exists():
        raise UserError(f"{run} holds no run, so there is nothing to bundle")
    for old in _pieces(out):
        old.unlink()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name in _kept(run):
            content = _halved(run / name) if name.endswith(".pt") else (run / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    packed = whole.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for number, start in enumerate(range(0, len(packed), limit)):
        files.append(out / f"{_NAME}.{number:02}")
        files[-1].write_bytes(packed[start : start + limit])
    return files


def unpack(bundle: Path, run: Path) -> None:
    """Restore the run folder from a bundle, with tensors in full precision again.

    Raises UserError if a piece is missing or damaged, or if `run` exists.
    """
    if run.exists():
        raise UserError(f"{run} exists already; name another folder")
    pieces = _pieces(bundle)
    expected = [f"{_NAME}.{number:02}" for number in range(len(pieces))]
    if not pieces or [piece.name for piece in pieces] != expected:
        raise UserError(f"{bundle} holds no whole bundle ({_NAME}.00 and those after it)")
    packed = b"".join(piece.read_bytes() for piece in pieces)
    part = run.with_name(run.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(part, filter="data")
        if not (part / "recipe.json").exists():
            raise tarfile.ReadError("no recipe in it")
        for path in part.glob("*/*.pt"):
            torch.save(_each(torch.load(path, weights_only=True), _full), path)
    except (tarfile.TarError, RuntimeError, EOFError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{bundle} is damaged ({error}); copy it again") from error
    part.rename(run)


def _pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_NAME}.[0-9][0-9]"))


def _kept(run: Path) -> list[str]:
    """Return the names of the files to keep; see the module's docstring."""
    done = [stage for stage in STAGES if (run / stage / "stage.json").exists()]
    names = list(_FOR_ALL)
    if (run / "metrics.json").exists() and len(done) == len(STAGES):
        names += [*_RESULT, f"{STAGES[-1]}/final.pt", *(f"{stage}/stage.json" for stage in STAGES)]
    else:
        for stage in done:
            names += [f"{stage}/final.pt", f"{stage}/stage.json"]
        names.append("pretrain/neighbors.parquet" if done else "pretrain/latest.pt")
        if done == ["pretrain"]:
            names.append("train/latest.pt")
    return [name for name in names if (run / name).exists()]


def _halved(path: Path) -> bytes:
    held = torch.load(path, map_location="cpu", weights_only=True)
    if "optimizer" in held:
        held["optimizer"]["state"] = {}
    file = io.BytesIO()
    torch.save(_each(held, _half), file)
    return file.getvalue()


def _half(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    # Values out of half precision's range, such as a large variance, stay in float32.
    return half if torch.equal(half.isfinite(), tensor.isfinite()) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _each(held: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested containers."""
    if isinstance(held, Tensor):
        return change(held)
    if isinstance(held, dict):
        return type(held)((name, _each(value, change)) for name, value in held.items())
    if isinstance(held, list | tuple):
        return type(held)(_each(value, change) for value in held)
    return held


def describe(files: list[Path]) -> str:
    """Describe number and sizes of the files in one line."""
    sizes = [file.stat().st_size for file in files]
    return f"{len(files)} files, {sum(sizes) / 10**6:.1f} MB, none above {max(sizes) / 10**6:.1f}"
