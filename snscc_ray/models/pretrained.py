"""Trained encoders: which one a user's text means, whether it fits the images, and its weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path, is_url
from snscc_ray.config.settings import (
    BUILT_IN,
    LIBRARIES,
    DataSettings,
    EncoderSettings,
    FurtherEncoder,
    Recipe,
)
from snscc_ray.models import libraries
from snscc_ray.models.encoders import build_encoder, out_features
from snscc_ray.models.foreign import digest, read_checkpoint
from snscc_ray.models.transfer import Imported, Unusable, import_weights, infer_encoder

_ENDINGS = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors")


def encoder_settings(text: str) -> EncoderSettings:
    """Parse a user's name for an encoder: `resnet18`, `timm:NAME`, `timm:NAME=FILE` or a file.

    A library's model gets the library's weights, or those of the file. A checkpoint's shapes tell
    which built-in encoder it belongs to. An encoder with weights is frozen. Raises UserError; for
    an unknown name it lists similar ones.
    """
    if not text:
        raise UserError("--encoder has an empty name; give one, or leave --encoder out")
    if text in BUILT_IN:
        return EncoderSettings(name=text)
    if text.partition(":")[0] in LIBRARIES:
        name, equals, file = text.partition("=")
        if equals and not file:
            raise UserError(
                f"--encoder {text}: no file after the `=`; name one, or leave the `=` out for the "
                "weights of the library"
            )
        if not file:
            libraries.default_name(name)
        libraries.split(name)
        return EncoderSettings(name=name, weights=file or "default", frozen=True)
    if is_url(text) or text.endswith(_ENDINGS) or as_path(text).exists():
        held = read_checkpoint(text)
        try:
            found = infer_encoder(held)
        except Unusable as error:
            raise UserError(f"{text}: {error}; give another file") from error
        except UserError as error:
            raise UserError(
                f"{text}: {error}; name its encoder, with --set encoder.name=… and "
                f"--set encoder.weights={text}"
            ) from error
        return EncoderSettings.model_validate(
            found.model_dump() | {"weights": text, "frozen": True}
        )
    known = {name: name for name in BUILT_IN}
    known |= {
        name: f"torchvision:{name}" for name in libraries.LIBRARIES["torchvision"].models()
    } | known
    near = [known[name] for name in difflib.get_close_matches(text, known, 3)]
    hint = "use resnet18, torchvision:NAME, timm:NAME or the path of a checkpoint"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise UserError(f"there is no encoder and no file {text!r}; {hint}")


def together(encoders: Sequence[EncoderSettings]) -> EncoderSettings | None:
    """Return one encoder from several frozen ones, whose features are appended; None for none.

    Raises UserError if one of several has no weights.
    """
    if not encoders:
        return None
    first, *others = encoders
    if not others:
        return first
    for number, encoder in enumerate(encoders):
        if encoder in encoders[:number]:
            raise UserError(f"the encoder {encoder.name} is given twice; leave one out")
        if encoder.weights is None:
            raise UserError(
                f"several encoders must be trained ones, and {encoder.name} has no weights; leave "
                "it out"
            )
    further = tuple(
        FurtherEncoder(name=e.name, stem=e.stem, width=e.width, weights=str(e.weights))
        for e in others
    )
    return first.model_copy(update={"further": further})


def start_encoder(settings: EncoderSettings, encoder: nn.Module) -> Imported:
    """Load the weights that `settings` names into a new encoder. Raises UserError."""
    found = _fitting(settings, *_named(settings, fetch=True), encoder)
    encoder.load_state_dict(found.weights, strict=False)
    return found


def check_encoder(recipe: Recipe, world_size: int) -> None:
    """Check that the encoder can be built, takes the images and fits its weights.

    Raises UserError before anything is written. Default weights are not downloaded.
    """
    frozen, data = recipe.encoder.frozen, recipe.data
    for settings in recipe.encoder.each():
        if settings.name in BUILT_IN and settings.weights is None:
            continue
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(settings, data.channels)
            if settings.name not in BUILT_IN:
                _try(settings.name, encoder.train(not frozen), data)
                if world_size > 1 and not frozen:
                    _refuse_fused_norms(settings.name, encoder)
            if settings.weights is not None:
                _fitting(settings, *_named(settings, fetch=False), encoder)


def weights_identity(settings: EncoderSettings) -> str:
    """Identify the weights, wherever they are stored. Raises UserError if they cannot be read."""
    assert settings.weights is not None
    if settings.weights == "default":
        return libraries.default_name(settings.name)
    return digest(settings.weights)


# ----------------------------------------------------------------------------------- the weights


def _named(settings: EncoderSettings, *, fetch: bool) -> tuple[str, object]:
    """Return the name of the weights, and what is there (see `default_weights` for `fetch`)."""
    assert settings.weights is not None
    if settings.weights == "default":
        return libraries.default_weights(settings.name, fetch=fetch)
    return settings.weights, read_checkpoint(settings.weights)


def _fitting(settings: EncoderSettings, origin: str, held: object, encoder: nn.Module) -> Imported:
    try:
        return import_weights(held, encoder, origin)
    except UserError as error:
        raise UserError(f"encoder.weights: {error}; {_remedy(settings, held)}") from error


def _remedy(settings: EncoderSettings, held: object) -> str:
    try:
        right = infer_encoder(held)
    except Unusable:
        return "give another file"
    except UserError:
        return "set encoder.name to its encoder"
    changes = [
        f"--set encoder.{field}={getattr(right, field)}"
        for field in ("name", "stem", "width")
        if getattr(right, field) != getattr(settings, field)
        and (field != "stem" or right.name != "convnet")
        and (field != "width" or right.name == "convnet")
    ]
    if changes:
        return f"use {' '.join(changes)}"
    with torch.device("meta"):
        grey = build_encoder(settings, channels=1)
    try:
        import_weights(held, grey, "it")
    except UserError:
        return "use another checkpoint"
    return (
        "it was trained on grey images: use --set data.channels=1 --set data.mean=null --set "
        "data.std=null"
    )


def _try(name: str, encoder: nn.Module, data: DataSettings) -> None:
    """Run two images through the encoder. Raises UserError if that fails."""
    size = f"{data.image_size}×{data.image_size}"
    try:
        with torch.no_grad():
            h_BD = encoder(torch.zeros(2, data.channels, data.image_size, data.image_size))
    except Exception as error:  # each architecture raises its own error
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"encoder.name={name} does not take images of {size} ({reason}); use the size that it "
            "was made for, as in --set data.image_size=224"
        ) from error
    if not isinstance(h_BD, torch.Tensor) or h_BD.shape != (2, out_features(encoder)):
        raise UserError(
            f"encoder.name={name} does not give one vector per image of {size}; use another encoder"
        )


def _refuse_fused_norms(name: str, encoder: nn.Module) -> None:
    known = (nn.BatchNorm1d, nn.BatchNorm2d)
    for part in encoder.modules():
        if isinstance(part, known) and type(part) not in known:
            raise UserError(
                f"encoder.name={name} uses its own batch norm ({type(part).__name__}), which "
                "several workers cannot share; use one worker, or another encoder"
            )
