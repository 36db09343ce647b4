"""The only file that calls a collective. With one process every function here is the identity.

Losses are computed on gathered rows, the same on every process. Gathering sums gradients over
processes and DistributedDataParallel takes their mean, so that W processes over a global batch
have exactly the gradients of one process over that batch.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.share = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank() * ctx.share : (rank() + 1) * ctx.share]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def gather(rows: Tensor) -> Tensor:
    """Rows of every process, in rank order, with gradients; every process holds equally many."""
    return cast(Tensor, _Gather.apply(rows)) if world_size() > 1 else rows


def gather_uneven(rows: Tensor, sizes: list[int]) -> Tensor:
    """Rows of every process where process r holds `sizes[r]` of them; without gradients."""
    if world_size() == 1:
        return rows
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def share_of(total: int) -> list[int]:
    """How many of `total` rows each process takes, in rank order (they differ by one at most)."""
    world = world_size()
    return [total // world + (r < total % world) for r in range(world)]


def any_process(value: bool) -> bool:
    """Whether it is so on any process."""
    if world_size() == 1:
        return value
    values: list[bool] = [False] * world_size()
    dist.all_gather_object(values, value)
    return any(values)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch statistics over all processes, on any device and in any float type.

    torch's own runs on CUDA only; this one makes CPU runs and float64 tests exact as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        count = x.numel() // x.shape[1] * world_size()
        mean = cast(Tensor, _AllReduce.apply(x.sum(dims))) / count
        centred = x - mean.view(shape)
        variance = cast(Tensor, _AllReduce.apply(centred.square().sum(dims))) / count
        with torch.no_grad():
            momentum = cast(float, self.momentum)
            cast(Tensor, self.num_batches_tracked).add_(1)
            cast(Tensor, self.running_mean).lerp_(mean, momentum)
            cast(Tensor, self.running_var).lerp_(variance * (count / max(count - 1, 1)), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


def synchronise_batch_norm(network: nn.Module) -> nn.Module:
    """Replace every batch norm by one that takes its statistics over all processes."""
    if world_size() == 1:
        return network
    if next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                norm = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                norm.to(child.weight)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
    return network


def wrap(network: nn.Module) -> nn.Module:
    """The network as the training step calls it: DistributedDataParallel where it is needed."""
    if world_size() == 1:
        return network
    # Statistics are synchronised and so equal everywhere: no need to broadcast buffers.
    return nn.parallel.DistributedDataParallel(network, **_no_buffer_broadcast())


def _no_buffer_broadcast() -> dict[str, Any]:
    """The option's name changed in torch 2.15; the old one warns there."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    new = "forward_sync_buffers"
    return {new if new in known else "broadcast_buffers": False}
