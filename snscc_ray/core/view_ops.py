"""Image operations on a batch, each image with its own parameter.

Every operation has the form `operation(images_BCHW, values_B) -> images_BCHW`, from uint8 (1 or 3
channels) to uint8, so a chain of operations behaves as on PIL images. Fractions are truncated, as
in Pillow. Sums are over whole numbers and exact in float32 (up to 256×256 pixels), so an image's
result is the same in any batch.

The operations follow Pillow (`ImageEnhance`, `ImageOps`, `Image.transform`); hue follows
torchvision's `adjust_hue` on tensors, which does not go through 8-bit HSV.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

BatchOperation = Callable[[Tensor, Tensor], Tensor]


def brightness(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """`ImageEnhance.Brightness`: 0 is black, 1 changes nothing."""
    return _to_uint8((images_BCHW * _per_image(factors_B)).clamp_(max=255))


def contrast(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """`ImageEnhance.Contrast`: 0 is the mean grey (rounded), 1 changes nothing."""
    images = images_BCHW.float()
    mean_B111 = _gray(images).mean((1, 2, 3), keepdim=True).add_(0.5).floor_()
    return _to_uint8(_blend_(images, mean_B111, factors_B))


def color(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """`ImageEnhance.Color` (saturation): 0 is grey, 1 changes nothing; one channel stays as is."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    images = images_BCHW.float()
    return _to_uint8(_blend_(images, _gray(images), factors_B))


def sharpness(images_BCHW: Tensor, factors_B: Tensor) -> Tensor:
    """`ImageEnhance.Sharpness`: 0 is smoothed, 1 changes nothing; the outermost pixels are kept."""
    if min(images_BCHW.shape[2:]) < 3:
        return images_BCHW
    images = images_BCHW.float()
    columns = images[..., :-2] + images[..., 1:-1]
    columns += images[..., 2:]
    smooth = columns[..., :-2, :] + columns[..., 1:-1, :]
    smooth += columns[..., 2:, :]
    inner = images[..., 1:-1, 1:-1]
    smooth.add_(inner, alpha=4).div_(13).add_(0.5).floor_()
    _blend_(inner, smooth, factors_B)
    return _to_uint8(images)


def posterize(images_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """`ImageOps.posterize`: keep the highest `bits` of each value (0 to 8, truncated)."""
    return images_BCHW & _per_image(256 - torch.exp2(8 - bits_B.floor())).to(torch.uint8)


def solarize(images_BCHW: Tensor, thresholds_B: Tensor) -> Tensor:
    """`ImageOps.solarize`: invert every value at or above the threshold."""
    highest_kept = _per_image(thresholds_B.ceil() - 1).to(torch.int16)
    sign = (highest_kept - images_BCHW).bitwise_right_shift_(15)  # -1 where to invert, else 0
    return images_BCHW ^ sign.to(torch.uint8)


def autocontrast(images_BCHW: Tensor, _unused_B: Tensor) -> Tensor:
    """`ImageOps.autocontrast`: stretch every channel to 0..255; a constant channel stays as is."""
    low = images_BCHW.amin((2, 3), keepdim=True)
    span = images_BCHW.amax((2, 3), keepdim=True) - low
    constant = span == 0
    low.masked_fill_(constant, 0)
    span.masked_fill_(constant, 255)
    return _to_uint8((images_BCHW - low).float().mul_(255).div_(span))


def equalize(images_BCHW: Tensor, _unused_B: Tensor) -> Tensor:
    """`ImageOps.equalize`: flatten every channel's histogram."""
    values_NP = images_BCHW.flatten(0, 1).flatten(1).long()
    ones = torch.ones((), device=values_NP.device).expand_as(values_NP)
    count_NV = ones.new_zeros(len(values_NP), 256).scatter_add_(1, values_NP, ones)
    below_NV = count_NV.cumsum(1).sub_(count_NV)
    step_N1 = below_NV.gather(1, values_NP.amax(1, keepdim=True)).div_(255).floor_()
    table_NV = below_NV.add_((step_N1 / 2).floor_()).div_(step_N1.clamp(min=1)).clamp_(max=255)
    identity_V = torch.arange(256.0, device=table_NV.device)
    table_NV = _to_uint8(torch.where(step_N1 > 0, table_NV, identity_V))
    return table_NV.gather(1, values_NP).view(images_BCHW.shape)


def grayscale(images_BCHW: Tensor, _unused_B: Tensor) -> Tensor:
    """Pillow's "L" in every channel; one channel stays as is."""
    return _to_uint8(_gray(images_BCHW.float())).expand_as(images_BCHW)


def hue(images_BCHW: Tensor, turns_B: Tensor) -> Tensor:
    """torchvision's `adjust_hue`: turn the hue by -0.5..0.5 turns; one channel stays as is."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    images = images_BCHW.float()
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # With channels scaled to 0..1, the hue in sextants is ±(1 - red + green + blue), positive where
    # green >= blue.
    sextant = (green - red).add_(blue).add_(high).sub_(low, alpha=2)
    sextant.copysign_(green - blue).div_(chroma.clamp(min=1)).add_(6 * turns_B[:, None, None])
    sextant.sub_(sextant.div(6).floor_().mul_(6))
    # Each channel is a trapezoid in the hue: high for two sextants, low for two, linear between.
    low.add_(0.5)
    for channel, share in (
        (red, (sextant - 3).abs_().sub_(1)),
        (green, (sextant - 2).abs_().neg_().add_(2)),
        (blue, (sextant - 4).abs_().neg_().add_(2)),
    ):
        torch.add(share.clamp_(0, 1).mul_(chroma), low, out=channel)
    return _to_uint8(images)


def affine(images_BCHW: Tensor, matrices_B23: Tensor) -> Tensor:
    """Sample every pixel at an affine position: the nearest (Pillow's default), black outside.

    matrices_B23: from `motion_matrices`.
    """
    height, width = images_BCHW.shape[2:]
    matrices = matrices_B23[:, :, :, None]
    x_B2W = matrices[:, :, 0] * _pixel_centres(width, images_BCHW.device) + matrices[:, :, 2]
    y_B2H = matrices[:, :, 1] * _pixel_centres(height, images_BCHW.device)
    grid_B2HW = x_B2W[:, :, None, :] + y_B2H[:, :, :, None]
    return _to_uint8(_sample(images_BCHW.float(), grid_B2HW, "nearest"))


# The operations that `affine` performs, in the order that `motion_matrices` expects.
MOTIONS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def motion_matrices(motions: Tensor, height: int, width: int) -> Tensor:
    """Return matrices for `affine`, shape (..., 2, 3), from motions of shape (..., 5).

    motions: in the order of `MOTIONS`, 0 where an image does not have one. Degrees of
    `Image.rotate` (counter-clockwise about the centre); shear x (row y reads at x + shear × y, from
    the top-left corner) and y; translation x (reads at x + fraction × width) and y.
    Matrices use coordinates of -1..1 between the image's edges, as grid_sample does.
    """
    degrees, shear_x, shear_y, move_x, move_y = motions.unbind(-1)
    angles, aspect = degrees * (math.pi / 180), height / width
    cos, sin = angles.cos(), angles.sin()
    lean_x, lean_y = shear_x * aspect, shear_y / aspect
    x_row = torch.stack((cos, lean_x - sin * aspect, lean_x + 2 * move_x), -1)
    y_row = torch.stack((lean_y + sin / aspect, cos, lean_y + 2 * move_y), -1)
    return torch.stack((x_row, y_row), -2)


# Keyed by the name in a view; "identity" and the motions have no entry of their own.
BATCH_OPERATIONS: dict[str, BatchOperation] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "hue": hue,
    "grayscale": grayscale,
    "affine": affine,
}


def crop_resize(
    images_BCHW: Tensor, boxes_B4: Tensor, flip_B: Tensor, degrees_B: Tensor | None
) -> Tensor:
    """Rotate, crop, resize to the input size and flip, in one bilinear sampling, rounded.

    boxes_B4: left, top, width, height in pixels. flip_B: bool, mirror left to right after the
    crop. degrees_B: counter-clockwise about the image's centre, black outside (None: no rotation).
    Without rotation, sampling never reads outside the box, as if the crop were cut out first.
    """
    height, width = images_BCHW.shape[2:]
    left, top, box_width, box_height = boxes_B4.unsqueeze(2).unbind(1)
    x_BW = _sample_positions(left, box_width, width)
    y_BH = _sample_positions(top, box_height, height)
    x_B1W = torch.where(flip_B[:, None], x_BW.flip(1), x_BW)[:, None, :]
    y_BH1 = y_BH[:, :, None]
    grid_B2HW = boxes_B4.new_empty(len(images_BCHW), 2, height, width)
    if degrees_B is None:
        grid_B2HW[:, 0] = x_B1W
        grid_B2HW[:, 1] = y_BH1
    else:
        angles, aspect = (degrees_B * (math.pi / 180))[:, None, None], height / width
        cos, sin = angles.cos(), angles.sin()
        torch.sub(cos * x_B1W, sin * aspect * y_BH1, out=grid_B2HW[:, 0])
        torch.add(sin / aspect * x_B1W, cos * y_BH1, out=grid_B2HW[:, 1])
    return _to_uint8(_sample(images_BCHW.float(), grid_B2HW, "bilinear").add_(0.5))


def _sample_positions(start_B1: Tensor, length_B1: Tensor, side: int) -> Tensor:
    """Positions of `side` output pixels in [start, start + length), as -1..1 of the image."""
    steps = (torch.arange(side, device=start_B1.device) + 0.5) / side
    offsets = torch.minimum((steps * length_B1).clamp_(min=0.5), length_B1 - 0.5)
    return (offsets + start_B1) * (2 / side) - 1


def _pixel_centres(side: int, device: torch.device) -> Tensor:
    return (torch.arange(side, device=device) * 2 + 1) / side - 1


def _sample(images_BCHW: Tensor, grid_B2HW: Tensor, mode: str) -> Tensor:
    grid_BHW2 = grid_B2HW.permute(0, 2, 3, 1)
    return functional.grid_sample(images_BCHW, grid_BHW2, mode, "zeros", align_corners=False)


def _per_image(values_B: Tensor) -> Tensor:
    return values_B.reshape(-1, 1, 1, 1)


def _gray(images_BCHW: Tensor) -> Tensor:
    """Pillow's integer luma, shape (B, 1, H, W): every product and sum is exact in float32."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    gray = images_BCHW[:, :1] * 19595
    gray.add_(images_BCHW[:, 1:2], alpha=38470).add_(images_BCHW[:, 2:], alpha=7471)
    return gray.add_(32768).div_(65536).floor_()


def _blend_(images_BCHW: Tensor, origin: Tensor, factors_B: Tensor) -> Tensor:
    """Pillow's `Image.blend(origin, images, factor)`, in place on float32 `images_BCHW`."""
    return images_BCHW.sub_(origin).mul_(_per_image(factors_B)).add_(origin).clamp_(0, 255)


def _to_uint8(images_BCHW: Tensor) -> Tensor:
    """Truncate values of 0..255; through int16, as PyTorch has no vector code for uint8."""
    return images_BCHW.to(torch.int16).to(torch.uint8)
