"""Encoders of other libraries, as `LIBRARY:MODEL`, and the weights that these offer for them.

A library is a class here, a line in `LIBRARIES`, and its name in `config.settings.LIBRARIES`.
"""

from __future__ import annotations

import difflib
from typing import Any, Protocol, cast

from torch import Tensor, nn

from snscc_ray.config.errors import UserError


class Library(Protocol):
    """What a library of models is asked for. Every `model` is one that it has."""

    def models(self) -> list[str]:
        """The names of its models for images."""
        ...

    def has(self, model: str) -> bool: ...

    def build(self, model: str, channels: int) -> nn.Module:
        """The model with random weights, without its classifier; `out_features` is its width.

        Raises UserError for a model that ends in no linear classifier.
        """
        ...

    def weights_name(self, model: str) -> str | None:
        """What the library calls its weights for the model; None: it offers none."""
        ...

    def weights(self, model: str) -> dict[str, Tensor]:
        """The weights themselves, downloaded unless they have been."""
        ...

    def like_weights(self, model: str) -> dict[str, Tensor]:
        """Tensors with the names and shapes of the weights, without a download."""
        ...


class Torchvision:
    def models(self) -> list[str]:
        return list(self._library().list_models(module=self._library()))

    def has(self, model: str) -> bool:
        return model in self.models()

    def build(self, model: str, channels: int) -> nn.Module:
        net = self._library().get_model(model, weights=None)
        linear = [(place, part) for place, part in net.named_modules() if type(part) is nn.Linear]
        if not linear:
            raise UserError(
                f"encoder.name=torchvision:{model}: it ends in no linear layer that could be left "
                "out; use another model"
            )
        place, classifier = linear[-1]
        net.set_submodule(place, nn.Identity())
        net.out_features = classifier.in_features
        if channels != 3:
            _take_channels(net, channels)
        return cast(nn.Module, net)

    def weights_name(self, model: str) -> str:
        return f"torchvision {self._library().get_model_weights(model).DEFAULT}"

    def weights(self, model: str) -> dict[str, Tensor]:
        weights = self._library().get_model_weights(model).DEFAULT
        return dict(weights.get_state_dict(progress=False, check_hash=True))

    def like_weights(self, model: str) -> dict[str, Tensor]:
        return dict(self._library().get_model(model, weights=None).state_dict())

    def _library(self) -> Any:
        # Imported here: it takes a second, and the small ConvNet needs none of it.
        from torchvision import models

        return models


class Timm:
    def models(self) -> list[str]:
        return list(self._library().list_models())

    def has(self, model: str) -> bool:
        return bool(self._library().is_model(model))

    def build(self, model: str, channels: int) -> nn.Module:
        net = self._library().create_model(model, num_classes=0, in_chans=channels)
        # What comes out may be wider than the last feature map.
        net.out_features = getattr(net, "head_hidden_size", None) or net.num_features
        return cast(nn.Module, net)

    def weights_name(self, model: str) -> str | None:
        config = self._library().get_pretrained_cfg(model)
        if not self._library().is_model_pretrained(model) or config is None:
            return None
        return f"timm {config.architecture}.{config.tag}"

    def weights(self, model: str) -> dict[str, Tensor]:
        return dict(self._library().create_model(model, pretrained=True).state_dict())

    def like_weights(self, model: str) -> dict[str, Tensor]:
        return dict(self._library().create_model(model).state_dict())

    def _library(self) -> Any:
        try:
            import timm
        except ImportError as error:
            raise UserError("encoder.name=timm:… needs timm; pip install timm") from error
        return timm


LIBRARIES: dict[str, Library] = {"torchvision": Torchvision(), "timm": Timm()}


def build(name: str, channels: int) -> nn.Module:
    """`LIBRARY:MODEL` with random weights and without its classifier.

    Raises UserError for a model that is not there, or that ends in no linear classifier.
    """
    library, model = split(name)
    return library.build(model, channels)


def split(name: str) -> tuple[Library, str]:
    """Library and model of `LIBRARY:MODEL`, or of a ResNet by its bare name.

    Raises UserError naming the models that are nearest to one that is not there.
    """
    kind, colon, model = name.partition(":")
    if not colon:
        kind, model = "torchvision", name
    library = LIBRARIES[kind]
    if not library.has(model):
        near = difflib.get_close_matches(model, library.models(), 3)
        hint = f"{kind} lists what it has by list_models()"
        if near:
            hint = f"did you mean {' or '.join(f'{kind}:{n}' for n in near)}?"
        raise UserError(f"encoder.name={name}: {kind} has no such model; {hint}")
    return library, model


def default_name(name: str) -> str:
    """What the library calls the weights that it offers. Raises UserError if it offers none."""
    library, model = split(name)
    found = library.weights_name(model)
    if found is None:
        raise UserError(f"encoder.name={name}: its library has no weights for it; leave them out")
    return found


def default_state(name: str) -> dict[str, Tensor]:
    """The weights themselves, downloaded unless they have been. Raises UserError if they cannot."""
    library, model = split(name)
    try:
        return library.weights(model)
    except Exception as error:  # what a client raises for want of a network is open-ended
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"encoder.weights=default: {default_name(name)} could not be downloaded ({reason}); "
            "give a file with encoder.weights=PATH"
        ) from error


def like_default(name: str) -> dict[str, Tensor]:
    """Names and shapes of the default weights, without a download."""
    library, model = split(name)
    return library.like_weights(model)


def _take_channels(net: nn.Module, channels: int) -> None:
    """Put a stem for so many channels in the place of that for RGB."""
    place, stem = next(
        (place, part) for place, part in net.named_modules() if isinstance(part, nn.Conv2d)
    )
    new = nn.Conv2d(
        channels,
        stem.out_channels,
        cast(Any, stem.kernel_size),
        cast(Any, stem.stride),
        cast(Any, stem.padding),
        bias=stem.bias is not None,
    )
    net.set_submodule(place, new)
