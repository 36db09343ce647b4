"""Encoders of other libraries, named `LIBRARY:MODEL`, and the libraries' weights for them.

To add one, write a class here and list it in `LIBRARIES` here and in `config.settings`.
"""

from __future__ import annotations

import difflib
from typing import Any, Protocol, cast

from torch import Tensor, nn

from snscc_ray.config.errors import UserError


class Library(Protocol):
    """Interface to a library of models. `model` is always one that the library has."""

    def models(self) -> list[str]:
        """Names of the library's image models."""
        ...

    def has(self, model: str) -> bool: ...

    def build(self, model: str, channels: int) -> nn.Module:
        """Build the model with random weights, without its classifier; `out_features` is its width.

        Raises UserError if the model has no linear classifier at its end.
        """
        ...

    def weights_name(self, model: str) -> str | None:
        """The library's name for its weights of the model, or None if it has none."""
        ...

    def weights(self, model: str) -> dict[str, Tensor]:
        """Return the weights; download them if they are not there yet."""
        ...

    def like_weights(self, model: str) -> dict[str, Tensor]:
        """Return tensors with the weights' names and shapes, without a download."""
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
                f"encoder.name=torchvision:{model}: it has no linear layer at its end to remove; "
                "use another model"
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
        # Imported here because it takes a second and ConvNet does not need it.
        from torchvision import models

        return models


class Timm:
    def models(self) -> list[str]:
        return list(self._library().list_models())

    def has(self, model: str) -> bool:
        return bool(self._library().is_model(model))

    def build(self, model: str, channels: int) -> nn.Module:
        net = self._library().create_model(model, num_classes=0, in_chans=channels)
        # The output may be wider than the last feature map.
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
    """Build `LIBRARY:MODEL` with random weights and without its classifier.

    Raises UserError if the library lacks the model, or it has no linear classifier at its end.
    """
    library, model = split(name)
    return library.build(model, channels)


def split(name: str) -> tuple[Library, str]:
    """Return the library and model of `LIBRARY:MODEL`, or of a ResNet by its bare name.

    Raises UserError for an unknown model, with the names nearest to it.
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
    """Return the library's name for its weights. Raises UserError if it has none."""
    library, model = split(name)
    found = library.weights_name(model)
    if found is None:
        raise UserError(f"encoder.name={name}: its library has no weights for it; leave them out")
    return found


def default_state(name: str) -> dict[str, Tensor]:
    """Return the weights, downloaded if needed. Raises UserError if the download fails."""
    library, model = split(name)
    try:
        return library.weights(model)
    except Exception as error:  # a client without a network may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"encoder.weights=default: {default_name(name)} could not be downloaded ({reason}); "
            "give a file with encoder.weights=PATH"
        ) from error


def like_default(name: str) -> dict[str, Tensor]:
    """Return tensors with the default weights' names and shapes, without a download."""
    library, model = split(name)
    return library.like_weights(model)


def _take_channels(net: nn.Module, channels: int) -> None:
    """Replace the RGB stem by one for `channels` channels."""
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
