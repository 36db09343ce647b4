"""CC (Li et al., "Contrastive Clustering", AAAI 2021): contrasts rows and columns at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.compare.descent import Descent, views_of
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.core.losses import cluster_contrast, marginal_entropy, nt_xent
from snscc_ray.data.loading.resident import Batch
from snscc_ray.models.encoders import build_encoder, out_features

# τ_I, τ_C and the output width of the instance head, as in the paper.
INSTANCE_TEMPERATURE, CLUSTER_TEMPERATURE = 0.5, 1.0
PROJECTION = 128


def cluster_level(p_BC: Tensor, q_BC: Tensor, temperature: float) -> Tensor:
    """Cluster-level loss: NT-Xent over the columns of both views' predictions, minus H(Y).

    H(Y) is the sum of the entropies of both views' mean predictions. Returns a scalar.
    """
    spread = marginal_entropy(p_BC) + marginal_entropy(q_BC)
    return cluster_contrast(p_BC, q_BC, temperature) - spread


class ContrastNet(nn.Module):
    """Encoder with two MLPs; forward returns projections (B, 128) and cluster logits (B, C)."""

    def __init__(self, encoder: nn.Module, clusters: int) -> None:
        super().__init__()
        self.encoder = encoder
        features = out_features(encoder)
        self.instance, self.cluster = (
            nn.Sequential(
                nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, out)
            )
            for out in (PROJECTION, clusters)
        )

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h_BD = self.encoder(x_BCHW)
        return self.instance(h_BD).float(), self.cluster(h_BD).float()


def cluster(study: Study) -> MethodResult:
    context, recipe = study.context, study.context.recipe
    network = study.build(
        "cc",
        lambda: ContrastNet(build_encoder(recipe.encoder, recipe.data.channels), study.clusters),
    )
    views = views_of(context, "cc", recipe.pretrain.view, recipe.pretrain.view)
    train(study, "cc", Descent(network, recipe.train, views, _terms))
    p_NC = context.clean_pass(network, lambda x: F.softmax(network(x)[1], dim=1))
    return MethodResult(p_NC.argmax(1).cpu(), str(recipe.train.epochs), "from scratch")


def _terms(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    z, logits = forward(torch.cat(views))
    (z_BD, other_BD), (p_BC, q_BC) = z.chunk(2), logits.softmax(1).chunk(2)
    return {
        "instance": nt_xent(z_BD, other_BD, INSTANCE_TEMPERATURE),
        "cluster": cluster_level(p_BC, q_BC, CLUSTER_TEMPERATURE),
    }
