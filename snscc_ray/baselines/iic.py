"""IIC (Ji, Henriques & Vedaldi, "Invariant Information Clustering", ICCV 2019).

Several linear heads, as the paper has them, without its auxiliary over-clustering.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snscc_ray.baselines.descent import Descent, views_of
from snscc_ray.baselines.study import Found, Study, train
from snscc_ray.data.resident import Batch
from snscc_ray.encoders import ClusterHeads, ClusterNet, build_encoder, out_features
from snscc_ray.losses.instance import matmul, safe_log
from snscc_ray.stages.train import probabilities


def mutual_information(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """Eq. 3: I(z, z') of the joint distribution of Eq. 2, made symmetric, ≥ 0. Returns a scalar.

    The loss is its negative. An empty batch gives exactly 0.
    """
    joint_CC = matmul(p_BC.T, q_BC) / max(len(p_BC), 1)
    joint_CC = (joint_CC + joint_CC.T) / 2
    own_C = safe_log(joint_CC.sum(dim=1))
    return (joint_CC * (safe_log(joint_CC) - own_C[:, None] - own_C)).sum()


def cluster(study: Study) -> Found:
    context, recipe = study.context, study.context.recipe
    linear = recipe.train.model_copy(update={"head": "linear"})

    def build() -> ClusterNet:
        encoder = build_encoder(recipe.encoder, recipe.data.channels)
        heads = ClusterHeads(linear, out_features(encoder), study.clusters, linear.num_heads)
        return ClusterNet(encoder, heads)

    network = study.build("iic", build)
    views = views_of(context, "iic", None, recipe.pretrain.view)
    train(study, "iic", Descent(network, recipe.train, views, _terms))
    p_NHC = probabilities(context, network)
    # The head of the lowest loss, as in the paper; no label is read.
    information = [float(mutual_information(p_NC, p_NC)) for p_NC in p_NHC.unbind(1)]
    best = max(range(len(information)), key=information.__getitem__)
    return Found(p_NHC[:, best].argmax(1), str(recipe.train.epochs), "from scratch")


def _terms(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    _, logits_HBC = forward(torch.cat(views))
    heads = [mutual_information(*p_BC.chunk(2)) for p_BC in logits_HBC.softmax(2)]
    return {"information": -torch.stack(heads).mean()}
