"""VAE (Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014), then K-Means on the means
of its codes. Codes have the width of the recipe's pretext projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snscc_ray.compare.decoder import Decoder
from snscc_ray.compare.descent import Descent
from snscc_ray.compare.methods.ae import kmeans_of
from snscc_ray.compare.study import MethodResult, Study, train
from snscc_ray.core import rng
from snscc_ray.core.views import clean_view
from snscc_ray.data.loading.resident import Batch, Viewer
from snscc_ray.models.encoders import build_encoder, out_features
from snscc_ray.training.context import Context


class VariationalAutoEncoder(nn.Module):
    """forward(images, noise) returns the reconstruction, and the code's mean and log variance."""

    def __init__(self, encoder: nn.Module, code: int, channels: int, size: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = nn.Linear(out_features(encoder), code)
        self.log_variance = nn.Linear(out_features(encoder), code)
        self.decoder = Decoder(code, channels, size)

    def forward(self, x_BCHW: Tensor, noise_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h_BF = self.encoder(x_BCHW)
        mean_BD, log_variance_BD = self.mean(h_BF).float(), self.log_variance(h_BF).float()
        code_BD = mean_BD + (log_variance_BD / 2).exp() * noise_BD
        return self.decoder(code_BD).float(), mean_BD, log_variance_BD


def reconstruction(made_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """-log p(x | z) for a Gaussian of variance 1, without its constant. Returns a scalar.

    This is half the squared error, averaged over rows.
    """
    return (made_BCHW - x_BCHW).square().sum() / (2 * max(len(x_BCHW), 1))


def divergence(mean_BD: Tensor, log_variance_BD: Tensor) -> Tensor:
    """KL(q(z | x) ‖ N(0, I)) as in Appendix B, mean over rows, ≥ 0. Returns a scalar.

    The sum with `reconstruction` is -ELBO.
    """
    each_BD = mean_BD.square() + log_variance_BD.exp() - 1 - log_variance_BD
    return each_BD.sum() / (2 * max(len(mean_BD), 1))


def cluster(study: Study) -> MethodResult:
    context, recipe = study.context, study.context.recipe
    code, data = recipe.pretrain.projection_dim, recipe.data
    network = study.build(
        "vae",
        lambda: VariationalAutoEncoder(
            build_encoder(recipe.encoder, data.channels), code, data.channels, data.image_size
        ),
    )
    train(study, "vae", Descent(network, recipe.train, _clean_and_noise(context, code), _terms))
    return kmeans_of(study, network, nn.Sequential(network.encoder, network.mean))


def _clean_and_noise(context: Context, code: int) -> Callable[[int], Viewer]:
    """Pass the noise as a view, drawn by row and epoch: a resumed run needs no generator state."""

    def of_epoch(epoch: int) -> Viewer:
        key = context.key("vae", epoch)

        def views(images_BCHW: Tensor, rows_B: Tensor) -> tuple[Tensor, ...]:
            noise_BD = normal(rows_B, key, code)
            return clean_view(images_BCHW, context.normalize), noise_BD[:, None, None]

        return views

    return of_epoch


def normal(rows_B: Tensor, key: int, count: int) -> Tensor:
    """Draw standard normal float32 numbers by row and key, (B, count)."""
    # Shift up by half a step: the uniform numbers may be 0 and are never 1.
    uniform = rng.uniform(rows_B, key, count).double() + 2.0**-25
    normal: Tensor = torch.special.ndtri(uniform)
    return normal.float()


def _terms(forward: nn.Module, views: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
    x_BCHW, noise_B11D = views
    made_BCHW, mean_BD, log_variance_BD = forward(x_BCHW, noise_B11D[:, 0, 0])
    return {
        "reconstruction": reconstruction(made_BCHW, x_BCHW),
        "divergence": divergence(mean_BD, log_variance_BD),
    }
