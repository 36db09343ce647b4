"""Encoders, heads, and the two networks that the stages train.

Pretrain trains a `PretextNet` (encoder, projection head); Train and Boost train a `ClusterNet`
(encoder, cluster heads). Each is called once per step, on all views together, so that
DistributedDataParallel sees one forward and batch statistics cover all views.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.config.settings import BUILT_IN, EncoderSettings, PretrainSettings, TrainSettings
from snscc_ray.models import libraries


class ConvNet(nn.Module):
    """Six 3×3 convolutions, two poolings and a global mean, for images of 8 to 32 pixels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = (width, width, 2 * width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        previous = channels
        for index, current in enumerate(widths):
            # Pooling before the widening keeps the cost of each pair of layers about equal.
            if index in (2, 4):
                layers.append(nn.MaxPool2d(2))
            layers += [
                nn.Conv2d(previous, current, 3, padding=1, bias=False),
                nn.BatchNorm2d(current),
                nn.ReLU(inplace=True),
            ]
            previous = current
        self.layers = nn.Sequential(*layers)
        self.out_features = previous

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BD: Tensor = self.layers(x_BCHW).mean(dim=(2, 3))
        return h_BD


def _resnet(settings: EncoderSettings, channels: int) -> nn.Module:
    # Imported here because torchvision takes a second to import and ConvNet does not need it.
    from torchvision import models

    net: Any = getattr(models, settings.name)(weights=None, zero_init_residual=False)
    if settings.stem == "small":
        net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    net.out_features = net.fc.in_features
    net.fc = nn.Identity()
    return cast(nn.Module, net)


def build_encoder(settings: EncoderSettings, channels: int) -> nn.Module:
    """Build an encoder with random weights, from (B, channels, H, W) to (B, `out_features`).

    Raises UserError if the library does not have the model.
    """
    if settings.name == "convnet":
        return ConvNet(channels, settings.width)
    if settings.name in BUILT_IN:
        return _resnet(settings, channels)
    return libraries.build(settings.name, channels)


def activation_bytes(settings: EncoderSettings, channels: int, side: int) -> int:
    """Bytes that one image of side × side pixels keeps for the backward pass, in float32.

    Counts on a network without storage, so it takes no memory and works for any model.
    """
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Keep the tensor alive, or a later storage could get the same id.
        held[id(tensor.untyped_storage())] = tensor
        return tensor

    with torch.device("meta"):
        encoder = build_encoder(settings, channels)
        # Two images, because batch norm cannot train on one value per channel.
        images_BCHW = torch.zeros(2, channels, side, side)
    weights = {id(weight.untyped_storage()) for weight in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(images_BCHW)
    saved = [tensor for storage, tensor in held.items() if storage not in weights]
    return sum(tensor.untyped_storage().nbytes() for tensor in saved) // 2


def _full(x: Tensor) -> Tensor:
    """Convert autocast's half types to float32; float64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def out_features(encoder: nn.Module) -> int:
    return cast(int, encoder.out_features)


class PretextNet(nn.Module):
    """Encoder and two-layer projection head; forward returns L2-normalised projections (B, P).

    For BYOL the head has a batch norm, and a predictor of the same form follows it.
    """

    def __init__(self, encoder: nn.Module, settings: PretrainSettings) -> None:
        super().__init__()
        hidden, dim = settings.projection_hidden, settings.projection_dim
        byol = settings.method == "byol"
        self.encoder = encoder
        self.projection = _head(out_features(encoder), hidden, dim, norm=byol)
        self.predictor = _head(dim, hidden, dim, norm=True) if byol else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BD = self.predictor(self.projection(self.encoder(x_BCHW)))
        # Normalise in full precision, because the loss divides by a small temperature.
        return F.normalize(_full(h_BD), dim=1)


def _head(features: int, hidden: int, out: int, *, norm: bool) -> nn.Sequential:
    between = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(
        nn.Linear(features, hidden), *between, nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


class Exact(nn.Module):
    """A part that may compute its products in float64 outside of training.

    In float32 the last bits of a row depend on its place in the batch, and cached features must
    give the answers of their images.
    """

    exact = False


class ClusterHeads(Exact):
    """H cluster heads at once, `weight` (H, C, D); each head trains as if it were alone.

    prototype: logits = scale × cosine(feature, prototype); linear: the paper's affine head.
    """

    def __init__(self, settings: TrainSettings, features: int, clusters: int, heads: int) -> None:
        super().__init__()
        self.scale = settings.head_scale
        self.weight = nn.Parameter(torch.randn(heads, clusters, features) * features**-0.5)
        linear = settings.head == "linear"
        self.bias = nn.Parameter(torch.zeros(heads, 1, clusters)) if linear else None

    def forward(self, h_BD: Tensor) -> Tensor:
        """Map features (B, D) to logits (H, B, C)."""
        weight_HCD: Tensor = self.weight
        bias = self.bias
        exact = self.exact and not self.training
        if exact:
            h_BD, weight_HCD = h_BD.double(), weight_HCD.double()
        if bias is not None:
            logits_HBC = torch.einsum("bd,hcd->hbc", h_BD, weight_HCD) + bias
        else:
            logits_HBC = self.scale * torch.einsum(
                "bd,hcd->hbc", F.normalize(h_BD, dim=1), F.normalize(weight_HCD, dim=2)
            )
        return logits_HBC.float() if exact else logits_HBC

    @torch.no_grad()
    def start_at(self, centres_HCD: Tensor) -> None:
        """Set the prototypes to the given centres (k-means of the pretext features)."""
        self.weight.copy_(F.normalize(centres_HCD, dim=2))

    @torch.no_grad()
    def keep(self, head: int) -> None:
        """Drop every head but one."""
        self.weight = nn.Parameter(self.weight[head : head + 1].clone())
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias[head : head + 1].clone())


class ClusterNet(nn.Module):
    """Encoder and cluster heads; forward returns L2-normalised features (B, D) and logits
    (H, B, C), both in full precision."""

    def __init__(self, encoder: nn.Module, heads: ClusterHeads) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = heads
        heads.exact = isinstance(encoder, Exact)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h_BD = _full(self.encoder(x_BCHW))
        # The head is small; in full precision its softmax gives exact confidences above .99.
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return F.normalize(h_BD, dim=1), self.heads(h_BD)
