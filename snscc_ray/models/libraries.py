"""Encoders of torchvision and timm, and the weights that these libraries offer for them."""

from __future__ import annotations

import difflib
from typing import Any, cast

from torch import Tensor, nn

from snscc_ray.config.errors import UserError


def build(name: str, channels: int) -> nn.Module:
    """`torchvision:NAME` or `timm:NAME` with random weights and without its classifier.

    Raises UserError for a model that is not there, or that ends in no linear classifier.
    """
    library, model = split(name)
    if library == "timm":
        net = _timm().create_model(model, num_classes=0, in_chans=channels)
        # What comes out may be wider than the last feature map.
        net.out_features = getattr(net, "head_hidden_size", None) or net.num_features
        return cast(nn.Module, net)
    net = _torchvision().get_model(model, weights=None)
    linear = [(place, part) for place, part in net.named_modules() if type(part) is nn.Linear]
    if not linear:
        raise UserError(f"encoder.name={name}: it ends in no linear layer that could be left out")
    place, classifier = linear[-1]
    net.set_submodule(place, nn.Identity())
    net.out_features = classifier.in_features
    if channels != 3:
        _take_channels(net, channels)
    return cast(nn.Module, net)


def split(name: str) -> tuple[str, str]:
    """Library and model of `torchvision:NAME`, `timm:NAME`, or of a ResNet by its bare name.

    Raises UserError naming the models that are nearest to one that is not there.
    """
    library, colon, model = name.partition(":")
    if not colon:
        library, model = "torchvision", name
    there = _timm().is_model(model) if library == "timm" else model in names_of(library)
    if not there:
        near = difflib.get_close_matches(model, names_of(library), 3)
        hint = f"{library} lists what it has by list_models()"
        if near:
            hint = f"did you mean {' or '.join(f'{library}:{n}' for n in near)}?"
        raise UserError(f"encoder.name={name}: {library} has no such model; {hint}")
    return library, model


def names_of(library: str) -> list[str]:
    """The models for images that a library has, by name."""
    if library == "timm":
        return list(_timm().list_models())
    return list(_torchvision().list_models(module=_torchvision()))


def default_name(name: str) -> str:
    """What the library calls the weights that it offers. Raises UserError if it offers none."""
    library, model = split(name)
    if library == "torchvision":
        return f"torchvision {_torchvision().get_model_weights(model).DEFAULT}"
    config = _timm().get_pretrained_cfg(model)
    if not _timm().is_model_pretrained(model) or config is None:
        raise UserError(f"encoder.name={name}: timm has no weights for it; leave them out")
    return f"timm {config.architecture}.{config.tag}"


def default_state(name: str) -> dict[str, Tensor]:
    """The weights themselves, downloaded unless they have been. Raises UserError if they cannot."""
    library, model = split(name)
    try:
        if library == "torchvision":
            weights = _torchvision().get_model_weights(model).DEFAULT
            return dict(weights.get_state_dict(progress=False, check_hash=True))
        return dict(_timm().create_model(model, pretrained=True).state_dict())
    except Exception as error:  # what a client raises for want of a network is open-ended
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"encoder.weights=default: {default_name(name)} could not be downloaded ({reason}); "
            "give a file with encoder.weights=PATH"
        ) from error


def like_default(name: str) -> dict[str, Tensor]:
    """Names and shapes of the default weights, without a download."""
    library, model = split(name)
    if library == "torchvision":
        return dict(_torchvision().get_model(model, weights=None).state_dict())
    return dict(_timm().create_model(model).state_dict())


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


def _torchvision() -> Any:
    # Imported here: it takes a second, and the small ConvNet needs none of it.
    from torchvision import models

    return models


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("encoder.name=timm:… needs timm; pip install timm") from error
    return timm
