"""PICA (Huang, Gong & Zhu, "Deep Semantic Clustering by Partition Confidence Maximisation",
CVPR 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snscc_ray.compare.descent import Descent, views_of
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.core.losses import marginal_entropy, one_way_column_contrast
from snscc_ray.data.loading.resident import Batch
from snscc_ray.models.encoders import ClusterHeads, ClusterNet, build_encoder, out_features
from snscc_ray.training.stages.train import probabilities

# λ, as in the paper.
ENTROPY_WEIGHT = 2.0


def partition_uncertainty(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """First term: each cluster's column of p has to identify its own column among all of q.

    q are the predictions of the transformed images. Columns are compared by cosine, the partition
    uncertainty index. Returns a scalar.
    """
    return one_way_column_contrast(p_BC, q_BC)


def imbalance(p_BC: Tensor) -> Tensor:
    """Second term: log C minus the entropy of the cluster sizes, ≥ 0; 0 if all are equal.

    Returns a scalar.
    """
    return math.log(p_BC.shape[1]) - marginal_entropy(p_BC)


def cluster(study: Study) -> MethodResult:
    context, recipe = study.context, study.context.recipe
    linear = recipe.train.model_copy(update={"head": "linear"})

    def build() -> ClusterNet:
        encoder = build_encoder(recipe.encoder, recipe.data.channels)
        return ClusterNet(encoder, ClusterHeads(linear, out_features(encoder), study.clusters, 1))

    network = study.build("pica", build)
    views = views_of(context, "pica", None, recipe.pretrain.view)
    train(study, "pica", Descent(network, recipe.train, views, _terms))
    clusters_N = probabilities(context, network)[:, 0].argmax(1)
    return MethodResult(clusters_N, str(recipe.train.epochs), "from scratch")


def _terms(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    _, logits_HBC = forward(torch.cat(views))
    p_BC, q_BC = logits_HBC[0].softmax(1).chunk(2)
    return {
        "uncertainty": partition_uncertainty(p_BC, q_BC),
        "imbalance": ENTROPY_WEIGHT * imbalance(p_BC),
    }
