"""AE: an autoencoder, then K-Means on its features.

Bengio et al., "Greedy Layer-Wise Training of Deep Networks", NeurIPS 2006; here all layers train
at once.
"""

from __future__ import annotations

from torch import Tensor, nn

from snscc_ray.compare.decoder import Decoder
from snscc_ray.compare.descent import Descent, views_of
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.data.loading.resident import Batch
from snscc_ray.models.encoders import build_encoder, out_features


class AutoEncoder(nn.Module):
    """The recipe's encoder and a decoder; forward returns the reconstructed images."""

    def __init__(self, encoder: nn.Module, channels: int, size: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(out_features(encoder), channels, size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        again_BCHW: Tensor = self.decoder(self.encoder(x_BCHW))
        return again_BCHW


def reconstruction(made_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Mean squared error over rows and values. Returns a scalar."""
    return (made_BCHW.to(x_BCHW.dtype) - x_BCHW).square().mean()


def build(study: Study, part: str) -> AutoEncoder:
    recipe = study.context.recipe
    data = recipe.data
    return study.build(
        part,
        lambda: AutoEncoder(
            build_encoder(recipe.encoder, data.channels), data.channels, data.image_size
        ),
    )


def cluster(study: Study) -> MethodResult:
    network, settings = build(study, "ae"), study.context.recipe.train
    train(study, "ae", Descent(network, settings, views_of(study.context, "ae", None), _terms))
    return kmeans_of(study, network, network.encoder)


def kmeans_of(study: Study, network: nn.Module, encoder: nn.Module) -> MethodResult:
    """Run K-Means on the features of the clean images from `encoder`, a part of `network`."""
    features_ND = study.context.clean_pass(network, encoder)
    _, clusters_N = study.timed(lambda: kmeans(features_ND, study.clusters, study.key("kmeans")))
    return MethodResult(
        clusters_N, str(study.context.recipe.train.epochs), "k-means on its features"
    )


def _terms(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    return {"reconstruction": reconstruction(forward(views[0]), views[0])}
