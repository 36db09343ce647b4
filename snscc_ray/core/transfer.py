"""Copy small tensors to a GPU during an epoch."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy the tensor to the device without waiting for a GPU, by way of pinned memory.

    A tensor that is already there is returned unchanged.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
