"""DEC (Xie, Girshick & Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", ICML 2016).

Starts from the denoising autoencoder's encoder and the k-means centres of its features. The target
distribution is recomputed over the whole dataset each epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snscc_ray.compare.descent import views_of
from snscc_ray.compare.methods.dae import trained
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.config.settings import StageName
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.losses.instance import safe_log
from snscc_ray.data.loading.resident import Batch, Viewer
from snscc_ray.training.context import Context


def soft_assignment(z_BD: Tensor, centres_CD: Tensor) -> Tensor:
    """Eq. 1 with one degree of freedom: q_ij ∝ 1 / (1 + ‖z_i - μ_j‖²). Returns (B, C)."""
    square_BC = (z_BD[:, None] - centres_CD).square().sum(dim=2)
    kernel_BC = 1 / (1 + square_BC)
    return kernel_BC / kernel_BC.sum(dim=1, keepdim=True)


def target_distribution(q_NC: Tensor) -> Tensor:
    """Eq. 3: p_ij ∝ q_ij² / f_j with f_j = Σ_i q_ij, over the whole dataset. Returns (N, C)."""
    sharp_NC = q_NC.square() / q_NC.sum(dim=0).clamp(min=torch.finfo(q_NC.dtype).tiny)
    return sharp_NC / sharp_NC.sum(dim=1, keepdim=True)


def divergence(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """Eq. 2: KL(P ‖ Q), mean over rows. p is the target and gets no gradient. Returns a scalar."""
    p_BC = p_BC.detach()
    return (p_BC * (safe_log(p_BC) - safe_log(q_BC))).sum() / max(len(q_BC), 1)


class DecNet(nn.Module):
    """Encoder and C centres in its feature space; forward returns the soft assignment (B, C)."""

    def __init__(self, encoder: nn.Module, centres_CD: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.centres_CD = nn.Parameter(centres_CD.clone())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return soft_assignment(self.encoder(x_BCHW).float(), self.centres_CD)


class _Dec:
    """The engine stage; checkpoints hold its target distribution."""

    name: StageName = "train"

    def __init__(self, context: Context, network: DecNet) -> None:
        self.context, self.network = context, network
        self.settings = context.recipe.train
        self._views = views_of(context, "dec", None)
        self._target_NC: Tensor | None = None

    def viewer(self, epoch: int) -> Viewer:
        return self._views(epoch)

    def begin_epoch(self, epoch: int) -> None:
        self._target_NC = target_distribution(self.context.clean_pass(self.network, self.network))

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        assert self._target_NC is not None
        return {"divergence": divergence(self._target_NC[batch.rows_B], forward(views[0]))}

    def after_step(self) -> None:
        pass

    def end_epoch(self, epoch: int) -> dict[str, float]:
        return {}

    def finish(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"target": self._target_NC}

    def load_state(self, state: dict[str, Any]) -> None:
        self._target_NC = state["target"]


def cluster(study: Study) -> MethodResult:
    context = study.context
    start = trained(study)
    features_ND = context.clean_pass(start, start.encoder)
    centres_CD, _ = study.timed(lambda: kmeans(features_ND, study.clusters, study.key("kmeans")))
    network = context.to_device(DecNet(start.encoder, centres_CD))
    train(study, "dec", _Dec(context, network))
    clusters_N = context.clean_pass(network, network).argmax(1).cpu()
    epochs = context.recipe.train.epochs
    return MethodResult(clusters_N, f"{epochs} + {epochs}", "starts from dae")
