"""The only file that calls collectives. With one process every function here is the identity.

Losses are computed on gathered rows and are the same on every process. `gather` sums gradients
over processes and DistributedDataParallel averages them, so W processes over a global batch have
exactly the gradients of one process over that batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        ctx.own = own_share(total)
        return _all_gather(rows, share_of(total))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        begin, end = ctx.own
        return summed[begin:end], None


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


def _all_gather(rows: Tensor, sizes: list[int]) -> Tensor:
    """Gather the rows of every process in rank order; process r holds `sizes[r]` rows."""
    rows = rows.contiguous()
    if rows.shape[0] < max(sizes):  # collectives need one shape everywhere
        rows = torch.cat([rows, rows.new_zeros(max(sizes) - rows.shape[0], *rows.shape[1:])])
    parts = [torch.empty_like(rows) for _ in sizes]
    dist.all_gather(parts, rows)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather(rows: Tensor, total: int) -> Tensor:
    """Gather all `total` rows in rank order, with gradients, from each process's `own_share`."""
    return cast(Tensor, _Gather.apply(rows, total)) if world_size() > 1 else rows


def share_of(total: int) -> list[int]:
    """Number of rows per process, of `total`, in rank order; they differ by at most one."""
    world = world_size()
    return [total // world + (r < total % world) for r in range(world)]


def own_share(total: int) -> tuple[int, int]:
    """Return (begin, end) of this process's share of `total` rows."""
    shares = share_of(total)
    begin = sum(shares[: rank()])
    return begin, begin + shares[rank()]


def from_first(compute: Callable[[], T]) -> T:
    """Call `compute` on the first process only, and return its result on every process.

    An error is raised on every process, as the others would wait for ever otherwise.
    """
    if world_size() == 1:
        return compute()
    held: list[Any] = [None, None]
    if rank() == 0:
        try:
            held[0] = compute()
        except Exception as error:
            held[1] = error
    dist.broadcast_object_list(held, src=0)
    if held[1] is not None:
        raise held[1]
    return cast(T, held[0])


def any_process(value: bool) -> bool:
    """Whether `value` is true on any process."""
    if world_size() == 1:
        return value
    values: list[bool] = [False] * world_size()
    dist.all_gather_object(values, value)
    return any(values)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics over all processes, on any device and in any float type.

    torch's own runs on CUDA only; this one makes CPU runs and float64 tests exact as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        # The count is summed too, because processes may hold different numbers of rows.
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = cast(Tensor, _AllReduce.apply(torch.cat([x.sum(dims), count])))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = cast(Tensor, _AllReduce.apply(centred.square().sum(dims))) / count
        with torch.no_grad():
            momentum = cast(float, self.momentum)
            cast(Tensor, self.num_batches_tracked).add_(1)
            cast(Tensor, self.running_mean).lerp_(mean, momentum)
            cast(Tensor, self.running_var).lerp_(
                variance * (count / (count - 1).clamp_min(1)), momentum
            )
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


def synchronise_batch_norm(network: nn.Module) -> nn.Module:
    """Replace every batch norm by one with statistics over all processes."""
    if world_size() == 1:
        return network
    if next(network.parameters()).is_cuda:
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return synchronised
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                norm = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                norm.to(child.weight)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
    return network


def wrap(network: nn.Module) -> nn.Module:
    """Wrap the network in DistributedDataParallel if there are several processes."""
    if world_size() == 1:
        return network
    # Buffers need no broadcast: statistics are synchronised, so they are equal everywhere.
    # The search for unused parameters finds none, but keeps the gradients in one order. Otherwise
    # DistributedDataParallel changes it after its first step, several workers then sum and round
    # differently, and a resumed run does not get the weights of an uninterrupted one.
    return nn.parallel.DistributedDataParallel(
        network, find_unused_parameters=True, **_no_buffer_broadcast()
    )


def _no_buffer_broadcast() -> dict[str, Any]:
    """Return the option by its name in this torch: 2.15 renamed it and warns about the old one."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    new = "forward_sync_buffers"
    return {new if new in known else "broadcast_buffers": False}
