"""Extraction, in Pretrain's place: the features of a frozen encoder, computed once per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snscc_ray.core import distributed, rng
from snscc_ray.core.views import make_view
from snscc_ray.data.loading.bank import (
    BankShape,
    FeatureBank,
    begin_bank,
    finish_bank,
    open_bank,
    shard_path,
    write_shard,
)
from snscc_ray.models.frozen import FrozenEncoder
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Monitor

# Images per step of the progress.
_STEP_ROWS = 64


@torch.no_grad()
def extract(
    context: Context, frozen: FrozenEncoder, folder: Path, identity: str, monitor: Monitor
) -> FeatureBank:
    """Compute the features of all images, and return the bank in `folder`.

    Shards that are there already with the same identity are kept, so a kill costs one shard. Each
    worker computes its share of the shards. Raises UserError on a full disk.
    """
    shape = BankShape(len(context.data), context.recipe.encoder.views, frozen.widths)
    if distributed.rank() == 0:
        begin_bank(folder, identity, shape)
    distributed.barrier()
    frozen.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    first, last = distributed.own_share(len(shape.edges()))
    edges = list(enumerate(shape.edges()))[first:last]
    missing = [(number, edge) for number, edge in edges if not shard_path(folder, number).exists()]
    steps = sum(-(-(end - begin) // _STEP_ROWS) for _, (begin, end) in missing)
    monitor.start("pretrain", 1, steps, 0)
    for number, (begin, end) in missing:
        images_BCHW = torch.cat(list(context.data.slices(begin, end, end - begin)))
        parts = []
        for rows_B in torch.arange(begin, end).split(_STEP_ROWS):
            own_BCHW = images_BCHW[int(rows_B[0]) - begin : int(rows_B[-1]) + 1 - begin]
            parts.append(features_of(context, frozen, own_BCHW, rows_B).cpu().half().numpy())
            monitor.advance()
        write_shard(folder, number, np.concatenate(parts))
    distributed.barrier()
    if distributed.rank() == 0:
        finish_bank(folder, identity, shape)
    distributed.barrier()
    return open_bank(folder, context.device)


@torch.no_grad()
def features_of(
    context: Context, frozen: FrozenEncoder, images_BCHW: Tensor, rows_B: Tensor
) -> Tensor:
    """Return the features of the clean view and of each augmented view, (B, 1 + V, D) float32.

    A view depends on the row, its number and `encoder.views_seed` only.
    """
    settings = context.recipe.encoder
    with context.autocast(), context.float32_as_asked():
        features = [context.output_of(frozen, context.clean(images_BCHW))]
        for number in range(settings.views):
            key = rng.fold(settings.views_seed, "bank", number)
            view = context.recipe.pretrain.view
            x_BCHW = make_view(images_BCHW, rows_B, view, key, context.normalize)
            features.append(context.output_of(frozen, x_BCHW))
    return torch.stack(features, dim=1)


def mean_features(bank: FeatureBank) -> Tensor:
    """Return the mean of the clean features, float32 (D,)."""
    total = torch.zeros(sum(bank.widths), dtype=torch.float64)
    for features_BVD in bank.slices(0, len(bank), 4096):
        total += features_BVD[:, 0].double().sum(0).cpu()
    return (total / len(bank)).float()
