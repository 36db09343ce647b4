"""DAE: a denoising autoencoder (Vincent et al., "Stacked Denoising Autoencoders", JMLR 2010),
then K-Means on its features. All layers train at once; the noise is masking, as in Section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snscc_ray.compare.descent import Descent
from snscc_ray.compare.methods.ae import AutoEncoder, build, kmeans_of, reconstruction
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.core import rng
from snscc_ray.core.views import clean_view
from snscc_ray.data.loading.resident import Batch, Viewer
from snscc_ray.training.context import Context

MASKED = 0.25


def cluster(study: Study) -> MethodResult:
    network = trained(study)
    return kmeans_of(study, network, network.encoder)


def trained(study: Study) -> AutoEncoder:
    """Return the network, trained once for all methods that start from it."""
    network, settings = build(study, "dae"), study.context.recipe.train
    train(study, "dae", Descent(network, settings, _clean_and_masked(study.context), _terms))
    return network


def masked(x_BCHW: Tensor, rows_B: Tensor, key: int, share: float) -> Tensor:
    """Set a share of each image's pixels, drawn by row and key, to 0, the mean value."""
    B, _, H, W = x_BCHW.shape
    keep_BP = rng.uniform(rows_B, key, H * W) >= share
    return torch.where(keep_BP.view(B, 1, H, W), x_BCHW, 0)


def _clean_and_masked(context: Context) -> Callable[[int], Viewer]:
    def of_epoch(epoch: int) -> Viewer:
        key = context.key("dae", epoch)

        def views(images_BCHW: Tensor, rows_B: Tensor) -> tuple[Tensor, ...]:
            clean_BCHW = clean_view(images_BCHW, context.normalize)
            return clean_BCHW, masked(clean_BCHW, rows_B, key, MASKED)

        return views

    return of_epoch


def _terms(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    clean_BCHW, masked_BCHW = views
    return {"reconstruction": reconstruction(forward(masked_BCHW), clean_BCHW)}
