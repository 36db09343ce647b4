"""Frozen encoders, and the adapter that is trained on their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.config.settings import Recipe
from snscc_ray.models import libraries
from snscc_ray.models.encoders import Exact, build_encoder, out_features
from snscc_ray.models.pretrained import start_encoder
from snscc_ray.models.transfer import Imported


class FrozenEncoder(nn.Module):
    """One or more trained encoders, which never change: images in [0, 1] to features (B, D).

    Each encoder gets the images in its own normalisation, and its features have length 1. They are
    appended to one another and rounded to float16, as they are stored.
    """

    def __init__(
        self, parts: Sequence[nn.Module], statistics: Sequence[libraries.Statistics | None]
    ) -> None:
        """statistics: mean and std that each encoder expects; None: the images come normalised."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        for number, values in enumerate(statistics):
            mean, std = values or ((0.0,), (1.0,))
            self.register_buffer(f"mean{number}", torch.tensor(mean).view(1, -1, 1, 1))
            self.register_buffer(f"std{number}", torch.tensor(std).view(1, -1, 1, 1))
        self.out_features = sum(out_features(part) for part in parts)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode: batch statistics would depend on the batch."""
        return super().train(False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features = [
            F.normalize(part((x_BCHW - self._own("mean", n)) / self._own("std", n)).float(), dim=1)
            for n, part in enumerate(self.parts)
        ]
        return torch.cat(features, dim=1).half().float()

    def _own(self, name: str, number: int) -> Tensor:
        return cast(Tensor, getattr(self, f"{name}{number}"))


class Adapter(Exact):
    """What is trained on cached features (B, D): it centres, projects, scales and maps them.

    The projection is linear, to d numbers (`extract.projection`); the result has length 1. `linear`
    and `mlp` (with a residual connection) then map it; both start as the identity. `none` has no
    weights.
    """

    exact = True

    def __init__(self, width: int, components: int, kind: str = "none") -> None:
        """components: d, of the D = `width` numbers."""
        super().__init__()
        self.in_features, self.out_features = width, components
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(width, components))
        self.map: nn.Module = nn.Identity()
        if kind == "linear":
            linear = _Linear(components, components)
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.map = linear
        elif kind == "mlp":
            self.map = _Residual(components)

    def project_on(self, mean_D: Tensor, basis_Dd: Tensor) -> None:
        """Set the mean of the features and the map that `extract.projection` gives."""
        cast(Tensor, self.mean).copy_(mean_D)
        cast(Tensor, self.basis).copy_(basis_Dd)

    def forward(self, features_BD: Tensor) -> Tensor:
        # In full precision: the features are close to one another before they are centred.
        with torch.autocast(features_BD.device.type, enabled=False):
            centred_BD = features_BD.float() - cast(Tensor, self.mean)
            basis_Dd = cast(Tensor, self.basis)
            if self.exact and not self.training:
                projected_Bd = (centred_BD.double() @ basis_Dd.double()).float()
            else:
                projected_Bd = centred_BD @ basis_Dd
            projected_Bd = F.normalize(projected_Bd, dim=1)
        mapped: Tensor = self.map(projected_Bd)
        return mapped


def components_of(recipe: Recipe, width: int, rows: int) -> int:
    """Return how many principal components of the features a recipe uses."""
    asked = recipe.encoder.components
    return min(asked or width, width, rows)


class _Linear(Exact, nn.Linear):
    exact = True

    def forward(self, x_BD: Tensor) -> Tensor:
        if not self.exact or self.training:
            return super().forward(x_BD)
        return F.linear(x_BD.double(), self.weight.double(), self.bias.double()).float()


class _Residual(nn.Module):
    """x + W2 · relu(W1 · x), where W2 starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _Linear(width, width), _Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + cast(Tensor, self.second(F.relu(self.first(x_BD))))


class WholeEncoder(nn.Module):
    """A frozen encoder and its adapter: images, or cached features (B, D), to (B, D)."""

    def __init__(self, frozen: FrozenEncoder, adapter: Adapter) -> None:
        super().__init__()
        self.frozen, self.adapter = frozen, adapter
        self.out_features = adapter.out_features

    def forward(self, x: Tensor) -> Tensor:
        features_BD = self.frozen(x) if x.ndim == 4 else x
        adapted: Tensor = self.adapter(features_BD)
        return adapted


class FrozenNet(nn.Module):
    """A frozen encoder and the adapter behind it, in Pretrain's place."""

    def __init__(self, frozen: FrozenEncoder | None, adapter: Adapter) -> None:
        super().__init__()
        self.frozen = frozen
        self.encoder = adapter


def build_frozen(recipe: Recipe) -> FrozenEncoder:
    """Build a recipe's frozen encoders, for weights that `load_frozen` gave. Raises UserError."""
    channels = recipe.data.channels
    return _frozen(recipe, [build_encoder(part, channels) for part in recipe.encoder.each()])


def load_frozen(recipe: Recipe) -> tuple[FrozenEncoder, list[Imported]]:
    """Build a recipe's frozen encoders with their weights. Raises UserError."""
    parts, found = [], []
    for settings in recipe.encoder.each():
        parts.append(build_encoder(settings, recipe.data.channels))
        found.append(start_encoder(settings, parts[-1]))
    return _frozen(recipe, parts), found


def _frozen(recipe: Recipe, parts: list[nn.Module]) -> FrozenEncoder:
    normalised = recipe.data.mean is not None
    names = [part.name for part in recipe.encoder.each()]
    statistics = [None if normalised else libraries.input_of(name).statistics for name in names]
    return FrozenEncoder([_folded(part.eval()) for part in parts], statistics)


@torch.no_grad()
def _folded(encoder: nn.Module) -> nn.Module:
    """Merge each batch norm into the convolution before it, which takes a quarter less time."""
    for parent in list(encoder.modules()):
        before: nn.Module | None = None
        for name, part in list(parent.named_children()):
            if isinstance(before, nn.Conv2d) and isinstance(part, nn.BatchNorm2d):
                merged = torch.nn.utils.fuse_conv_bn_eval(before, part)
                before.weight, before.bias = merged.weight, merged.bias
                # timm's batch norms include the activation.
                parent.register_module(name, getattr(part, "act", nn.Identity()))
            before = part
    return encoder


def encoder_widths(recipe: Recipe) -> list[int]:
    """Return how many numbers each of a recipe's encoders gives for one image."""
    with torch.device("meta"):
        parts = [build_encoder(part, recipe.data.channels) for part in recipe.encoder.each()]
    return [out_features(part) for part in parts]


def feature_width(recipe: Recipe, rows: int) -> int:
    """Return how many numbers a recipe's features of one image have."""
    width = sum(encoder_widths(recipe))
    return components_of(recipe, width, rows) if recipe.encoder.frozen else width
