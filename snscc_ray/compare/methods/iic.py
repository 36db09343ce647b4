"""IIC (Ji, Henriques & Vedaldi, "Invariant Information Clustering", ICCV 2019).

Several linear heads, and as many for the auxiliary over-clustering. Both kinds train at once; the
paper alternates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snscc_ray.compare.descent import Descent, views_of
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.config.settings import TrainSettings
from snscc_ray.core.losses.instance import matmul, safe_log
from snscc_ray.data.loading.resident import Batch
from snscc_ray.models.encoders import ClusterHeads, build_encoder, out_features

# Auxiliary clusters per cluster, as the paper's 50 for the 10 of MNIST.
OVERCLUSTERING = 5


def mutual_information(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """Eq. 3: I(z, z') of the joint distribution of Eq. 2, made symmetric, ≥ 0. Returns a scalar.

    The loss is its negative. An empty batch gives exactly 0.
    """
    joint_CC = matmul(p_BC.T, q_BC) / max(len(p_BC), 1)
    joint_CC = (joint_CC + joint_CC.T) / 2
    own_C = safe_log(joint_CC.sum(dim=1))
    return (joint_CC * (safe_log(joint_CC) - own_C[:, None] - own_C)).sum()


class OverclusteringNet(nn.Module):
    """forward returns logits of the heads (H, B, C) and of the auxiliary heads (H, B, 5 C)."""

    def __init__(self, encoder: nn.Module, settings: TrainSettings, clusters: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads, self.auxiliary = (
            ClusterHeads(settings, out_features(encoder), width, settings.num_heads)
            for width in (clusters, OVERCLUSTERING * clusters)
        )

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h_BD = self.encoder(x_BCHW).float()
        return self.heads(h_BD), self.auxiliary(h_BD)


def cluster(study: Study) -> MethodResult:
    context, recipe = study.context, study.context.recipe
    linear = recipe.train.model_copy(update={"head": "linear"})

    def build() -> OverclusteringNet:
        encoder = build_encoder(recipe.encoder, recipe.data.channels)
        return OverclusteringNet(encoder, linear, study.clusters)

    network = study.build("iic", build)
    # Both views are random. With a clean image and a view, the network could tell the two apart:
    # two clusters unrelated to the content, with mutual information log 2.
    views = views_of(context, "iic", recipe.pretrain.view, recipe.pretrain.view)
    train(study, "iic", Descent(network, recipe.train, views, _terms))
    p_NHC = context.clean_pass(network, lambda x: network(x)[0].softmax(2).transpose(0, 1)).cpu()
    # The head with the lowest loss, as in the paper; no labels are used.
    information = [float(mutual_information(p_NC, p_NC)) for p_NC in p_NHC.unbind(1)]
    best = max(range(len(information)), key=information.__getitem__)
    return MethodResult(p_NHC[:, best].argmax(1), str(recipe.train.epochs), "from scratch")


def _terms(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    main_HBC, auxiliary_HBC = forward(torch.cat(views))
    return {"main": -_mean_information(main_HBC), "auxiliary": -_mean_information(auxiliary_HBC)}


def _mean_information(logits_HBC: Tensor) -> Tensor:
    heads = [mutual_information(*p_BC.chunk(2)) for p_BC in logits_HBC.softmax(2)]
    return torch.stack(heads).mean()
