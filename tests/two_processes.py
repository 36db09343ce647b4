"""One step of a stage in float64, by one process or by several over the same global batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.core import distributed
from snscc_ray.core.clustering import mining
from snscc_ray.core.clustering.mining import mine
from snscc_ray.data.sources import load_images
from snscc_ray.models.encoders import (
    ClusterHeads,
    ClusterNet,
    PretextNet,
    build_encoder,
    out_features,
)
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.stages.boost import Boost
from snscc_ray.training.stages.pretrain import Pretrain
from snscc_ray.training.stages.train import Train
from tests.conftest import TINY, make_context


def one_step(stage_name: str, overrides: list[str]) -> dict[str, Any]:
    """Loss terms, gradients and batch-norm statistics after one step on this process's share."""
    recipe = override(recipes.get("digits"), [*TINY, *overrides])
    images = load_images(recipe.data)
    context = make_context(recipe, images)
    torch.manual_seed(0)
    stage = _stage(stage_name, context)
    stage.begin_epoch(0)
    stage.network.double().train()
    if isinstance(stage, Pretrain):
        for name, held in vars(stage.pretext).items():
            if isinstance(held, torch.nn.Module | torch.Tensor):
                setattr(stage.pretext, name, held.double())
    *_, batch = context.data.epoch(stage.settings.batch_size, 7)
    views = tuple(view.double() for view in stage.viewer(0)(batch.inputs, batch.rows_B))
    forward = distributed.wrap(stage.network)  # held: a wrapper that is gone averages nothing
    terms = stage.step(forward, views, batch)
    sum(terms.values(), torch.zeros(())).backward()
    return {
        "terms": {name: term.detach() for name, term in terms.items()},
        "gradients": {
            name: weight.grad
            for name, weight in stage.network.named_parameters()
            if weight.grad is not None
        },
        "buffers": dict(stage.network.named_buffers()),
        "extra": stage.state(),
    }


def resumed(rank: int, world: int, folder: str) -> None:
    """Entry point of a spawned process: weights after six steps, with and without a new wrap."""
    with _group(rank, world, folder):
        found = [_trained(wrapped_anew_at) for wrapped_anew_at in (None, None, 1, 3)]
        torch.save(found, Path(folder) / f"weights-rank{rank}.pt")
        distributed.barrier()


def _trained(wrapped_anew_at: int | None) -> dict[str, Tensor]:
    recipe = override(recipes.get("digits"), TINY)
    context = make_context(recipe, load_images(recipe.data))
    torch.manual_seed(0)
    stage = _stage("pretrain", context)
    stage.network.train()
    optimizer = torch.optim.SGD(stage.network.parameters(), 0.1)
    forward = distributed.wrap(stage.network)
    batches = context.data.epoch(stage.settings.batch_size, 7)
    for step, batch in zip(range(6), batches, strict=False):
        if step == wrapped_anew_at:
            forward = distributed.wrap(stage.network)
        views = stage.viewer(0)(batch.inputs, batch.rows_B)
        optimizer.zero_grad()
        sum(stage.step(forward, views, batch).values(), torch.zeros(())).backward()
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in stage.network.named_parameters()}


def _stage(name: str, context: Context) -> Stage:
    recipe = context.recipe
    if name == "pretrain":
        return Pretrain(context)
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    mined = mine(context.data.images_NCHW.flatten(1).float(), recipe.pretrain.mined_neighbors)
    if name == "train":
        return Train(context, PretextNet(encoder, recipe.pretrain), mined)
    heads = ClusterHeads(recipe.train, out_features(encoder), recipe.data.num_clusters, 1)
    return Boost(context, context.to_device(ClusterNet(encoder, heads)), mined)


def process(rank: int, world: int, folder: str, cases: dict[int, tuple[str, list[str]]]) -> None:
    """Entry point of a spawned process: joins the group and writes what its steps gave.

    cases: stage and overrides of each, by the number that names its file.
    """
    with _group(rank, world, folder):
        for number, (stage, overrides) in cases.items():
            torch.save(one_step(stage, overrides), Path(folder) / f"case{number}-rank{rank}.pt")
            distributed.barrier()


def miner(rank: int, world: int, folder: str, features_ND: Tensor) -> None:
    """Entry point of a spawned process: mines, with no row searched exactly."""
    with _group(rank, world, folder):
        mining._EXACT_ROWS = 100
        mined = mine(features_ND, 5)
        torch.save(astuple(mined), Path(folder) / f"mined-rank{rank}.pt")
        distributed.barrier()


@contextmanager
def _group(rank: int, world: int, folder: str) -> Iterator[None]:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
