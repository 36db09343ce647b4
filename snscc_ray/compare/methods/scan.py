"""SCAN (Van Gansbeke et al., "SCAN: Learning to Classify Images without Labels", ECCV 2020).

The clustering step uses the neighbours mined by our Pretrain, or those in the features of a frozen
encoder; self-labelling follows. The paper's settings are constants here: the entropy weight λ of
Eq. 2 and the threshold of Section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.compare.descent import Descent, views_of
from snscc_ray.compare.methods.ours import pretext
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.core import rng
from snscc_ray.core.losses import marginal_entropy
from snscc_ray.core.losses.instance import reduce_rows, safe_log
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.data.loading.resident import Batch, ResidentData, Viewer
from snscc_ray.models.encoders import ClusterHeads, ClusterNet, out_features
from snscc_ray.training.stages.train import probabilities

ENTROPY_WEIGHT = 5.0
THRESHOLD = 0.99


def consistency(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """First term of Eq. 2: the mean over rows of -log <p_i, q_i>, where q_i is a neighbour's.

    Returns a scalar. Products of 0 are clamped to 1e-19.
    """
    return reduce_rows(-safe_log((p_BC * q_BC).sum(dim=1)), "mean")


def self_labelling(p_BC: Tensor, logits_BC: Tensor, threshold: float) -> Tensor:
    """Section 2.3: cross-entropy of the logits against pseudo-labels, the argmax of p.

    Only rows whose maximum of p is above `threshold` count; all classes that occur have the same
    weight. p comes from the weakly augmented (here: clean) images and gets no gradient. Returns a
    scalar, exactly 0 if no row is confident.
    """
    confidence_B, y_B = p_BC.detach().max(dim=1)
    confident_B = confidence_B > threshold
    one_hot_BC = F.one_hot(y_B, p_BC.shape[1]) * confident_B[:, None]
    rows_C = one_hot_BC.sum(dim=0).to(logits_BC.dtype)
    weight_B = torch.where(confident_B, 1 / rows_C.clamp(min=1)[y_B], 0)
    loss_B = F.cross_entropy(logits_BC, y_B, reduction="none")
    return (weight_B * loss_B).sum() / weight_B.sum().clamp(min=1)


def cluster(study: Study) -> MethodResult:
    start = pretext(study)
    study = replace(study, context=start.context)
    context, recipe = study.context, study.context.recipe
    linear = recipe.train.model_copy(update={"head": "linear"})
    encoder = start.network.encoder
    assert isinstance(encoder, nn.Module)

    def build() -> ClusterNet:
        heads = ClusterHeads(linear, out_features(encoder), study.clusters, linear.num_heads)
        return ClusterNet(encoder, heads)

    network = study.build("scan", build)
    neighbors_NK = start.mined.neighbors_NK.long()  # on the CPU, as rows are when views are drawn
    train(study, "scan", Descent(network, recipe.train, _pairs(study, neighbors_NK), _clustering))
    network.heads.keep(_best_head(probabilities(context, network), neighbors_NK))
    views = views_of(context, "scan-self-label", None, recipe.boost.view)
    train(study, "scan-self-label", Descent(network, recipe.boost, views, _self_labelling, "boost"))
    clusters_N = probabilities(context, network)[:, 0].argmax(1)
    epochs = f"{recipe.train.epochs} + {recipe.boost.epochs}"
    if study.frozen:
        return MethodResult(clusters_N, epochs)
    return MethodResult(clusters_N, f"{recipe.pretrain.epochs} + {epochs}", "starts from pretext")


def _pairs(study: Study, neighbors_NK: Tensor) -> Callable[[int], Viewer]:
    """Make views of each row and of one of its mined neighbours, drawn anew each epoch."""
    context, view = study.context, study.context.recipe.train.view
    data = context.data
    assert isinstance(data, ResidentData | FeatureBank)

    def of_epoch(epoch: int) -> Viewer:
        draw, own, other = (context.key("scan", epoch, kind) for kind in ("draw", "own", "other"))

        def pair(inputs: Tensor, rows_B: Tensor) -> tuple[Tensor, ...]:
            K = neighbors_NK.shape[1]
            place_B1 = (rng.uniform(rows_B, draw, 1) * K).long()
            partners_B = neighbors_NK[rows_B].gather(1, place_B1)[:, 0]
            (first,) = context.viewer((view,), (own,))(inputs, rows_B)
            partners = data.take(partners_B)
            (second,) = context.viewer((view,), (other,))(partners, partners_B)
            return first, second

        return pair

    return of_epoch


def _clustering(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    _, logits_HBC = forward(torch.cat(views))
    heads = [p_BC.chunk(2) for p_BC in logits_HBC.softmax(2)]
    consistent = [consistency(p_BC, q_BC) for p_BC, q_BC in heads]
    spread = [marginal_entropy(p_BC) for p_BC, _ in heads]
    return {
        "consistency": torch.stack(consistent).mean(),
        "entropy": -ENTROPY_WEIGHT * torch.stack(spread).mean(),
    }


def _self_labelling(
    forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
) -> dict[str, Tensor]:
    _, logits_HBC = forward(torch.cat(views))
    clean_BC, strong_BC = logits_HBC[0].chunk(2)
    return {"label": self_labelling(clean_BC.softmax(1), strong_BC, THRESHOLD)}


def _best_head(p_NHC: Tensor, neighbors_NK: Tensor) -> int:
    """Return the head with the lowest Eq. 2 on the clean images, as in the paper; no labels."""
    losses = []
    for p_NC in p_NHC.unbind(1):
        K = neighbors_NK.shape[1]
        pairs = consistency(p_NC.repeat_interleave(K, 0), p_NC[neighbors_NK.flatten()])
        losses.append(float(pairs - ENTROPY_WEIGHT * marginal_entropy(p_NC)))
    return min(range(len(losses)), key=losses.__getitem__)
