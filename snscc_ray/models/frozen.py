"""Frozen encoders, and the adapter that is trained on their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.config.settings import EncoderSettings, Recipe
from snscc_ray.models import libraries
from snscc_ray.models.encoders import build_encoder, out_features
from snscc_ray.models.importers import Imported
from snscc_ray.models.pretrained import start_encoder


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
        self.widths = tuple(out_features(part) for part in parts)
        self.out_features = sum(self.widths)
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


class Adapter(nn.Module):
    """What is trained on cached features (B, D): it centres and scales them, and maps them.

    The features of each encoder are centred and scaled to length 1. `linear` and `mlp` (with a
    residual connection) both start as the identity; `none` has no weights.
    """

    def __init__(
        self, widths: Sequence[int], mean_D: Tensor | None = None, kind: str = "none"
    ) -> None:
        """mean_D: of the clean features; None: 0, before a checkpoint is loaded."""
        super().__init__()
        self.widths = list(widths)
        self.out_features = D = sum(widths)
        self.register_buffer("mean", torch.zeros(D) if mean_D is None else mean_D.clone())
        self.map: nn.Module = nn.Identity()
        if kind == "linear":
            linear = nn.Linear(D, D)
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.map = linear
        elif kind == "mlp":
            self.map = _Residual(D)

    def forward(self, features_BD: Tensor) -> Tensor:
        centred_BD = features_BD - cast(Tensor, self.mean)
        parts = [F.normalize(part, dim=1) for part in centred_BD.split(self.widths, dim=1)]
        mapped: Tensor = self.map(torch.cat(parts, dim=1))
        return mapped


class _Residual(nn.Module):
    """x + W2 · relu(W1 · x), where W2 starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
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


def each_encoder(settings: EncoderSettings) -> list[EncoderSettings]:
    """Return the settings of each frozen encoder."""
    return [
        settings.model_copy(update={"further": ()}),
        *(EncoderSettings(**other.model_dump()) for other in settings.further),
    ]


def build_frozen(recipe: Recipe) -> FrozenEncoder:
    """Build a recipe's frozen encoders, with random weights. Raises UserError."""
    parts = each_encoder(recipe.encoder)
    normalised = recipe.data.mean is not None
    return FrozenEncoder(
        [build_encoder(part, recipe.data.channels) for part in parts],
        [None if normalised else libraries.input_of(part.name).statistics for part in parts],
    )


def load_frozen(recipe: Recipe) -> tuple[FrozenEncoder, list[Imported]]:
    """Build a recipe's frozen encoders with their weights. Raises UserError."""
    frozen = build_frozen(recipe)
    found = [
        start_encoder(settings, part)
        for settings, part in zip(each_encoder(recipe.encoder), frozen.parts, strict=True)
    ]
    return frozen, found
