"""Random views of a whole batch of uint8 images at once, on the device of the images.

An image's draws depend on its row number and the key only (see `rng`), so a row's view is the same
in any batch, order or worker. Parameters are drawn on the device of the row numbers. With row
numbers on the CPU, images on a GPU are transformed without waiting for the GPU; with row numbers on
the GPU, each call waits once, for the sizes of the groups below.

Each image has a short chain of operations. At every step the batch is sorted by operation, so each
operation is one call on one contiguous slice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snscc_ray.config.settings import Range, SimclrView, StrongView
from snscc_ray.core.rng import uniform
from snscc_ray.core.transfer import send
from snscc_ray.core.view_ops import BATCH_OPERATIONS, MOTIONS, crop_resize, motion_matrices

CROP_TRIES = 10
STRONG_CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Normalize:
    """Mean and std per channel, for values in [0, 1]: pixels become (value / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Draws:
    """All random parameters of a batch's views; None where the view has no such step."""

    flip_B: Tensor
    """bool: mirror left to right, after the crop."""
    names: tuple[str, ...]
    """The operations that `codes_BS` indexes."""
    codes_BS: Tensor
    """int64: the operation at each of S steps."""
    values_BS: Tensor
    """float32: the parameter of that operation."""
    boxes_B4: Tensor | None = None
    """Crop: left, top, width, height; whole pixels, float32."""
    degrees_B: Tensor | None = None
    """Rotation before the crop, counter-clockwise."""
    corners_B2: Tensor | None = None
    """Left and top pixel of the cut-out square, float32; may lie outside the image."""
    cutout: int = 0
    """Side of the square, in pixels."""


def clean_view(images_BCHW: Tensor, normalize: Normalize) -> Tensor:
    """Normalise uint8 images; returns float32, channels_last."""
    return _normalized(images_BCHW, normalize)


def make_view(
    images_BCHW: Tensor,
    rows_B: Tensor,
    view: SimclrView | StrongView | None,
    key: int,
    normalize: Normalize,
) -> Tensor:
    """Make one random view of each image, normalised: float32, channels_last, same shape.

    images_BCHW: uint8, 1 or 3 channels. rows_B: int64 row numbers; on the CPU they avoid a wait for
    a GPU. key: from `rng.fold`, whatever else the view depends on. view None: `clean_view`.
    """
    if view is None:
        return clean_view(images_BCHW, normalize)
    height, width = images_BCHW.shape[2:]
    return apply_view(images_BCHW, draw_view(rows_B, key, view, height, width), normalize)


def make_views(
    images_BCHW: Tensor,
    rows_B: Tensor,
    views: tuple[SimclrView | StrongView | None, ...],
    keys: tuple[int, ...],
    normalize: Normalize,
) -> tuple[Tensor, ...]:
    """Make several views of the same images, each by `make_view`."""
    return tuple(
        make_view(images_BCHW, rows_B, view, key, normalize)
        for view, key in zip(views, keys, strict=True)
    )


def draw_view(
    rows_B: Tensor, key: int, view: SimclrView | StrongView, height: int, width: int
) -> Draws:
    """Draw the parameters of every row's view, on the device of `rows_B`."""
    if isinstance(view, SimclrView):
        return _draw_simclr(rows_B, key, view, height, width)
    return _draw_strong(rows_B, key, view, height, width)


def _draw_simclr(rows_B: Tensor, key: int, view: SimclrView, height: int, width: int) -> Draws:
    """Draw as torchvision's transforms do: the four jitters in random order, then grayscale."""
    numbers = uniform(rows_B, key, 2 * CROP_TRIES + 14)
    flip, turn, jitter, gray, order, strength, crop = numbers.split(
        [1, 1, 1, 1, 4, 4, 2 * CROP_TRIES + 2], dim=1
    )
    spreads = {"brightness": view.brightness, "contrast": view.contrast, "color": view.saturation}
    ranges = {name: (max(0.0, 1 - s), 1 + s) for name, s in spreads.items() if s > 0}
    if view.hue > 0:
        ranges["hue"] = (-view.hue, view.hue)
    names = (*ranges, "identity", "grayscale")
    codes, values = [], []
    if view.jitter > 0 and ranges:
        low, high = ([ends[i] for ends in ranges.values()] for i in (0, 1))
        which = order[:, : len(ranges)].argsort(dim=1)
        codes.append(which.masked_fill(jitter >= view.jitter, names.index("identity")))
        values.append(_between(strength[:, : len(ranges)], low, high, which))
    if view.grayscale > 0:
        codes.append(names.index("grayscale") - (gray >= view.grayscale).long())
        values.append(gray)
    empty = numbers[:, :0]
    crops = view.crop_scale != (1, 1) or view.rotate_degrees > 0
    return Draws(
        flip_B=flip[:, 0] < view.flip,
        names=names,
        codes_BS=torch.cat(codes or [empty.long()], dim=1),
        values_BS=torch.cat(values or [empty], dim=1),
        boxes_B4=_draw_boxes(crop, view.crop_scale, view.crop_ratio, height, width)
        if crops
        else None,
        degrees_B=(2 * turn[:, 0] - 1) * view.rotate_degrees if view.rotate_degrees > 0 else None,
    )


def _draw_strong(rows_B: Tensor, key: int, view: StrongView, height: int, width: int) -> Draws:
    """Draw operations with replacement, and each parameter uniformly in its range."""
    steps = view.num_operations
    numbers = uniform(rows_B, key, 2 * CROP_TRIES + 5 + 2 * steps)
    flip, cutout, which, strength, crop = numbers.split(
        [1, 2, steps, steps, 2 * CROP_TRIES + 2], dim=1
    )
    codes_BS = (which * len(view.operations)).long()
    low, high = zip(*(_strong_range(view, name) for name in view.operations), strict=True)
    values_BS = _between(strength, list(low), list(high), codes_BS)
    corners_B2 = None
    if view.cutout > 0:
        centre_B2 = (cutout * cutout.new_tensor((width, height))).floor_()
        corners_B2 = centre_B2 - view.cutout // 2
    crops = view.crop_scale != (1, 1)
    return Draws(
        flip_B=flip[:, 0] < view.flip,
        names=view.operations,
        codes_BS=codes_BS,
        values_BS=values_BS,
        boxes_B4=_draw_boxes(crop, view.crop_scale, STRONG_CROP_RATIO, height, width)
        if crops
        else None,
        corners_B2=corners_B2,
        cutout=view.cutout,
    )


def _strong_range(view: StrongView, name: str) -> Range:
    ranges: dict[str, Range] = {
        "posterize": (view.posterize_bits[0], view.posterize_bits[1] + 1),
        "solarize": view.solarize_threshold,
        "rotate": (-view.rotate_degrees, view.rotate_degrees),
        "shear_x": (-view.shear, view.shear),
        "shear_y": (-view.shear, view.shear),
        "translate_x": (-view.translate, view.translate),
        "translate_y": (-view.translate, view.translate),
    }
    return ranges.get(name, view.enhance)


def _between(numbers_BS: Tensor, low: list[float], high: list[float], codes_BS: Tensor) -> Tensor:
    """Scale numbers in [0, 1) to the range of their code."""
    low_K = numbers_BS.new_tensor(low)
    span_K = numbers_BS.new_tensor(high) - low_K
    return low_K[codes_BS] + numbers_BS * span_K[codes_BS]


def _draw_boxes(numbers: Tensor, scale: Range, ratio: Range, height: int, width: int) -> Tensor:
    """torchvision's RandomResizedCrop: the first of ten tries that fits, else a central crop."""
    areas, ratios, position = numbers.split([CROP_TRIES, CROP_TRIES, 2], dim=1)
    areas = height * width * (scale[0] + areas * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = (low + ratios * (high - low)).exp_()
    # The last column is torchvision's central crop: the largest that the ratio allows.
    widths = _with_column((areas * ratios).sqrt_().round_(), min(width, height * ratio[1]))
    heights = _with_column((areas / ratios).sqrt_().round_(), min(height, width / ratio[0]))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    sizes_B2 = torch.cat((widths.gather(1, first), heights.gather(1, first)), dim=1)
    room_B2 = position.new_tensor((width, height)) - sizes_B2
    anywhere_B2 = (position * (room_B2 + 1)).floor_()
    corners_B2 = torch.where(first < CROP_TRIES, anywhere_B2, (room_B2 / 2).round_())
    return torch.cat((corners_B2, sizes_B2), dim=1)


def _with_column(columns: Tensor, last: float) -> Tensor:
    return torch.nn.functional.pad(columns, (0, 1), value=max(1, round(last)))


def apply_view(images_BCHW: Tensor, draws: Draws, normalize: Normalize) -> Tensor:
    """Make the drawn views: crop and flip, apply the chain, normalise, cut out."""
    images_BCHW = _apply_chain(_crop_and_flip(images_BCHW, draws), draws)
    corners_B2 = draws.corners_B2
    if corners_B2 is not None:
        corners_B2 = send(corners_B2, images_BCHW.device)
    return _normalized(images_BCHW, normalize, corners_B2, draws.cutout)


def _crop_and_flip(images_BCHW: Tensor, draws: Draws) -> Tensor:
    device = images_BCHW.device
    flip_B = send(draws.flip_B, device)
    if draws.boxes_B4 is None:
        both = torch.cat((images_BCHW, images_BCHW.flip(3)))
        pick_B = torch.arange(len(flip_B), device=device) + len(flip_B) * flip_B
        return both.index_select(0, pick_B)
    boxes_B4 = send(draws.boxes_B4, device)
    degrees_B = draws.degrees_B
    if degrees_B is not None:
        degrees_B = send(degrees_B, device)
    views = torch.empty(images_BCHW.shape, dtype=torch.uint8, device=device)
    for part in _parts(images_BCHW):
        turn_B = None if degrees_B is None else degrees_B[part]
        views[part] = crop_resize(images_BCHW[part], boxes_B4[part], flip_B[part], turn_B)
    return views


def _apply_chain(images_BCHW: Tensor, draws: Draws) -> Tensor:
    """Apply every image's operations step by step, in groups of the same operation."""
    steps = draws.codes_BS.shape[1]
    if steps == 0:
        return images_BCHW
    device = images_BCHW.device
    operations = ["affine" if name in MOTIONS else name for name in draws.names]
    motions = [MOTIONS.index(name) if name in MOTIONS else -1 for name in draws.names]
    groups = tuple(dict.fromkeys(operations))
    codes_SB = draws.codes_BS.T.contiguous()
    group_K = codes_SB.new_tensor([groups.index(name) for name in operations])
    sorted_SB, order_SB = group_K[codes_SB].sort(dim=1, stable=True)
    edges = torch.arange(len(groups) + 1, device=codes_SB.device).repeat(steps, 1)
    bounds = torch.searchsorted(sorted_SB, edges).tolist()
    # Step s needs the images in the order order[s]; the step before it left them in its own order.
    place_SB = order_SB.argsort(dim=1)
    from_SB = torch.cat((order_SB[:1], place_SB[:-1].gather(1, order_SB[1:]), place_SB[-1:]))
    from_SB = send(from_SB, device)
    values_SB = draws.values_BS.T.gather(1, order_SB)
    motion_SB = codes_SB.new_tensor(motions)[codes_SB.gather(1, order_SB)]
    motions_SB5 = values_SB[..., None] * (motion_SB[..., None] == edges.new_tensor(range(5)))
    matrices_SB23 = motion_matrices(motions_SB5, *images_BCHW.shape[2:])
    matrices_SB23 = send(matrices_SB23, device)
    values_SB = send(values_SB, device)

    for step, bound in enumerate(bounds):
        images_BCHW = images_BCHW.index_select(0, from_SB[step])
        for name, start, stop in zip(groups, bound, bound[1:], strict=False):
            if stop > start and name != "identity":
                parameters = matrices_SB23 if name == "affine" else values_SB
                group = images_BCHW[start:stop]
                group.copy_(BATCH_OPERATIONS[name](group, parameters[step, start:stop]))
    return images_BCHW.index_select(0, from_SB[-1])


def _normalized(
    images_BCHW: Tensor, normalize: Normalize, corners_B2: Tensor | None = None, cutout: int = 0
) -> Tensor:
    scale, shift = _scale_and_shift(normalize, images_BCHW.device)
    views = torch.empty(
        images_BCHW.shape, device=images_BCHW.device, memory_format=torch.channels_last
    )
    for part in _parts(images_BCHW):
        values = (images_BCHW[part] * scale).add_(shift)
        if corners_B2 is not None:
            values.mul_(_outside_square(corners_B2[part], cutout, values.shape[2:]))
        views[part] = values
    return views


def _parts(images_BCHW: Tensor) -> Iterator[slice]:
    """Slices of a batch; on a CPU, small enough that float32 copies stay in its cache."""
    batch, _, height, width = images_BCHW.shape
    pixels = 2**16 if images_BCHW.device.type == "cpu" else 2**24
    size = max(8, pixels // (height * width))
    return (slice(start, start + size) for start in range(0, batch, size))


def _outside_square(corners_B2: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Mask of shape (B, 1, H, W): 1 outside the square, 0 inside."""
    left_B1, top_B1 = corners_B2.unsqueeze(2).unbind(1)
    x = torch.arange(shape[1], device=corners_B2.device)
    y = torch.arange(shape[0], device=corners_B2.device)
    columns_BW = ((x >= left_B1) & (x < left_B1 + side)).float()
    rows_BH = ((y >= top_B1) & (y < top_B1 + side)).float()
    return (1 - rows_BH[:, :, None] * columns_BW[:, None, :]).unsqueeze_(1)


@functools.lru_cache(maxsize=16)
def _scale_and_shift(normalize: Normalize, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, (C, 1, 1) each; cached, because copying them waits for the GPU."""
    mean = torch.tensor(normalize.mean, device=device)[:, None, None]
    std = torch.tensor(normalize.std, device=device)[:, None, None]
    return 1 / (255 * std), -mean / std
