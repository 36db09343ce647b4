"""Extraction, in Pretrain's place: the features of a frozen encoder, computed once per image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.core import distributed, rng
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.clustering.neighbors import knn, place_drawn
from snscc_ray.core.clustering.whitening import within_whitening
from snscc_ray.core.threads import Mapping, mapping
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
from snscc_ray.data.loading.resident import Images
from snscc_ray.models.frozen import FrozenEncoder
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Monitor

# Images per step of the progress.
_STEP_ROWS = 64
_PROJECTION_ROWS, _PROJECTION_NEIGHBORS = 20_000, 20
_MOST_MIXED = 0.5  # the largest share of a neighbour in a view of an embedding


@torch.no_grad()
def extract(
    context: Context, frozen: FrozenEncoder, folder: Path, identity: str, monitor: Monitor
) -> FeatureBank:
    """Compute the features of all images, and return the bank in `folder`.

    Shards that are there already with the same identity are kept, so a kill costs one shard. Each
    worker computes its share of the shards. Raises UserError on a full disk.
    """
    shape = BankShape(len(context.data), context.recipe.encoder.views, frozen.out_features)
    if distributed.from_first(lambda: begin_bank(folder, identity, shape)):
        return open_bank(folder, context.device)
    frozen.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    first, last = distributed.own_share(len(shape.edges()))
    edges = list(enumerate(shape.edges()))[first:last]
    missing = [(number, edge) for number, edge in edges if not shard_path(folder, number).exists()]
    steps = [-(-(end - begin) // _STEP_ROWS) for _, (begin, end) in missing]
    monitor.start("features", 1, sum(steps), 0)
    with mapping(context.device) as mapped:
        batches = batches_of(context.data, [edge for _, edge in missing])
        computed = in_steps(context, frozen, batches, mapped)
        for (number, _), count in zip(missing, steps, strict=True):
            parts = []
            for part in islice(computed, count):
                parts.append(part)
                monitor.advance()
            write_shard(folder, number, np.concatenate(parts))
    distributed.barrier()
    if distributed.rank() == 0:
        finish_bank(folder, identity, shape)
    distributed.barrier()
    return open_bank(folder, context.device)


@torch.no_grad()
def mix_neighbors(context: Context, mined: MinedNeighbors, folder: Path, identity: str) -> None:
    """Write a bank of given embeddings, with views that mix each row with one of its neighbours.

    View v of row i is (1 - λ) f_i + λ f_j, with length 1: j is one of the mined neighbours, drawn
    by confidence, and λ is uniform in [0, 0.5]. Both depend on the row, v and `encoder.views_seed`
    only. `context.data` holds the embeddings. Each worker writes its share of the shards.
    """
    bank, settings = context.data, context.recipe.encoder
    assert isinstance(bank, FeatureBank)
    shape = BankShape(len(bank), settings.views, bank.width)
    if distributed.rank() == 0:
        begin_bank(folder, identity, shape)
    distributed.barrier()
    chance_NK = mined.confidence_NK / mined.confidence_NK.sum(1, keepdim=True)
    first, last = distributed.own_share(len(shape.edges()))
    for number, (begin, end) in list(enumerate(shape.edges()))[first:last]:
        if shard_path(folder, number).exists():
            continue
        rows_B = torch.arange(begin, end)
        own_BD = _vectors(bank, rows_B)
        views = [own_BD]
        for view in range(settings.views):
            key = rng.fold(settings.views_seed, "neighbors", view)
            draw_B, share_B = rng.uniform(rows_B, key, 2).unbind(1)
            place_B1 = place_drawn(chance_NK[rows_B], draw_B[:, None].contiguous())
            partners_B = mined.neighbors_NK[rows_B].long().gather(1, place_B1)[:, 0]
            share_B1 = _MOST_MIXED * share_B[:, None]
            mixed_BD = torch.lerp(own_BD, _vectors(bank, partners_B), share_B1)
            views.append(F.normalize(mixed_BD, dim=1))
        write_shard(folder, number, torch.stack(views, 1).half().numpy())
    distributed.barrier()
    if distributed.rank() == 0:
        finish_bank(folder, identity, shape)
    distributed.barrier()


def _vectors(bank: FeatureBank, rows_B: Tensor) -> Tensor:
    return bank.take(rows_B)[:, 0].cpu().float()


def batches_of(data: Images, edges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the images of each step, for the rows first..end of each edge."""
    for begin, end in edges:
        images = data.slices(begin, end, _STEP_ROWS)
        yield from zip(range(begin, end, _STEP_ROWS), images, strict=True)


def in_steps(
    context: Context,
    frozen: FrozenEncoder,
    batches: Iterable[tuple[int, Tensor]],
    mapped: Mapping,
) -> Iterator[np.ndarray]:
    """Yield the features of each batch of images, float16 (B, 1 + V, D).

    batches: the number of the first row, and uint8 images (B, C, H, W). mapped: from
    `threads.mapping`. Raises UserError if a feature is not finite.
    """

    def compute(batch: tuple[int, Tensor]) -> np.ndarray:
        first, images_BCHW = batch
        rows_B = torch.arange(first, first + len(images_BCHW))
        features_BVD = features_of(context, frozen, images_BCHW, rows_B).cpu().half()
        if not features_BVD.isfinite().all():
            raise UserError(
                "the frozen encoder gives a NaN or an infinity for some images; use other "
                "weights, or precision=float32"
            )
        return features_BVD.numpy()

    yield from mapped(compute, batches)


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


def projection(bank: FeatureBank, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of the clean features and the map (D, count) to what the heads see.

    The map is the first principal components, whitened within the pairs that should be alike: an
    image and its views, and an image and its neighbours (see `within_whitening`). It is computed
    on at most 20,000 rows, drawn at random.
    """
    drawn_N = torch.randperm(len(bank), generator=rng.generator("projection"))
    rows_N = drawn_N[:_PROJECTION_ROWS].sort().values  # not evenly spaced: rows may have a period
    clean_ND = torch.cat([bank.take(part)[:, 0].cpu().float() for part in rows_N.split(4096)])
    mean_D, basis_Dd = principal_components(clean_ND, count)
    parts = [bank.take(part).cpu().float() - mean_D for part in rows_N.split(4096)]
    projected_NVd = torch.cat([F.normalize(part @ basis_Dd, dim=2) for part in parts])
    _, neighbors_NK = knn(projected_NVd[:, 0], min(_PROJECTION_NEIGHBORS, len(rows_N) - 1))
    return mean_D, basis_Dd @ within_whitening(projected_NVd, neighbors_NK)


def principal_components(rows_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the first principal components (D, count) of the rows (N, D).

    count: at most N and D.
    """
    N, D = rows_ND.shape
    mean_D = rows_ND.double().mean(0)
    centred_ND = rows_ND - mean_D.float()
    if N < D:
        _, _, basis_ND = torch.linalg.svd(centred_ND.double(), full_matrices=False)
        return mean_D.float(), basis_ND[:count].T.float().contiguous()
    products_DD = (centred_ND.T @ centred_ND).double().numpy()
    # All D of them would take D³: a minute for 4,096 numbers.
    _, basis_Dd = eigh(products_DD, subset_by_index=[D - count, D - 1], check_finite=False)
    basis_Dd = basis_Dd[:, ::-1].copy()  # eigenvalues ascend
    return mean_D.float(), torch.from_numpy(basis_Dd).float()
