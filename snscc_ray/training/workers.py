"""The engine's worker interface: rank, world size, and where checkpoints go.

`LocalWorker` is this process with a folder; under torchrun it is one of several processes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from snscc_ray.config.errors import UserError
from snscc_ray.core import checkpoints, distributed
from snscc_ray.core.memory import share_one_pool


class Worker(Protocol):
    rank: int
    world_size: int
    device: torch.device

    def report(
        self, stage: str, metrics: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        """Publish a stage's metrics so far, with a checkpoint if one is due."""
        ...

    def latest_checkpoint(self, stage: str) -> dict[str, Any] | None:
        """Return the stage's last reported checkpoint, on this worker's device."""
        ...


class LocalWorker:
    """A worker with its checkpoints in `folder/STAGE/latest.pt`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()

    def report(
        self, stage: str, metrics: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        if checkpoint is not None and self.rank == 0:
            checkpoints.save(self.folder / stage / "latest.pt", checkpoint)

    def latest_checkpoint(self, stage: str) -> dict[str, Any] | None:
        path = self.folder / stage / "latest.pt"
        return checkpoints.load(path, self.device) if path.exists() else None


def choose_device(name: str) -> torch.device:
    """Return the device; `auto` is a GPU if there is one. Raises UserError if `cuda` has no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda: torch sees no GPU here; use cpu (--device, or runtime.device of a recipe)"
        )
    share_one_pool()
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def join_group(device: torch.device) -> None:
    """Under torchrun, join the process group (NCCL on GPUs, gloo on CPUs)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
