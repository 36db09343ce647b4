"""Image operations on a batch, each image with its own parameter.

Every operation has the form `operation(images_BCHW, values_B)`: it writes its result over
`images_BCHW`, a contiguous float32 tensor of whole numbers in 0..255 (1 or 3 channels), and leaves
whole numbers there, so a chain of operations means what it means on 8-bit PIL images. Sums of such
numbers are exact in float32 (up to 256×256 pixels), so an image's result is the same in any batch.

The operations follow Pillow (`ImageEnhance`, `ImageOps`, `Image.transform`); hue follows
torchvision's `adjust_hue` on tensors, which has no 8-bit HSV in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

BatchOperation = Callable[[Tensor, Tensor], None]


def brightness(images_BCHW: Tensor, factors_B: Tensor) -> None:
    """`ImageEnhance.Brightness`: 0 is black, 1 changes nothing."""
    images_BCHW.mul_(_per_image(factors_B)).clamp_(0, 255).floor_()


def contrast(images_BCHW: Tensor, factors_B: Tensor) -> None:
    """`ImageEnhance.Contrast`: 0 is the mean grey (rounded), 1 changes nothing."""
    mean_B = _gray(images_BCHW).mean((1, 2, 3))
    _blend(images_BCHW, _per_image(mean_B.add_(0.5).floor_()), factors_B)


def color(images_BCHW: Tensor, factors_B: Tensor) -> None:
    """`ImageEnhance.Color` (saturation): 0 is grey, 1 changes nothing; nothing on one channel."""
    if images_BCHW.shape[1] == 3:
        _blend(images_BCHW, _gray(images_BCHW), factors_B)


def sharpness(images_BCHW: Tensor, factors_B: Tensor) -> None:
    """`ImageEnhance.Sharpness`: 0 is smoothed, 1 changes nothing; the border row is kept."""
    if min(images_BCHW.shape[2:]) < 3:
        return
    columns = images_BCHW[..., :-2] + images_BCHW[..., 1:-1]
    columns += images_BCHW[..., 2:]
    smooth = columns[..., :-2, :] + columns[..., 1:-1, :]
    smooth += columns[..., 2:, :]
    inner = images_BCHW[..., 1:-1, 1:-1]
    smooth.add_(inner, alpha=4).div_(13).add_(0.5).floor_()
    _blend(inner, smooth, factors_B)


def posterize(images_BCHW: Tensor, bits_B: Tensor) -> None:
    """`ImageOps.posterize`: keep the highest `bits` (whole numbers, 1 to 8) of each value."""
    step_B = _per_image(torch.exp2(8 - bits_B))
    images_BCHW.div_(step_B).floor_().mul_(step_B)


def solarize(images_BCHW: Tensor, thresholds_B: Tensor) -> None:
    """`ImageOps.solarize`: invert every value at or above the threshold."""
    inverted = (images_BCHW - _per_image(thresholds_B.ceil() - 1)).clamp_(0, 1)  # 0 or 1
    images_BCHW.addcmul_(inverted, 255 - 2 * images_BCHW)


def autocontrast(images_BCHW: Tensor, _unused_B: Tensor) -> None:
    """`ImageOps.autocontrast`: stretch every channel to 0..255; a constant one stays."""
    low = images_BCHW.amin((2, 3), keepdim=True)
    span = images_BCHW.amax((2, 3), keepdim=True).sub_(low)
    constant = span.eq(0)
    low.masked_fill_(constant, 0)
    span.masked_fill_(constant, 255)
    images_BCHW.sub_(low).mul_(255).div_(span).floor_()


def equalize(images_BCHW: Tensor, _unused_B: Tensor) -> None:
    """`ImageOps.equalize`: flatten every channel's histogram."""
    values_NP = images_BCHW.flatten(0, 1).flatten(1).long()
    ones = images_BCHW.new_ones(()).expand_as(values_NP)
    count_NV = images_BCHW.new_zeros(len(values_NP), 256).scatter_add_(1, values_NP, ones)
    below_NV = count_NV.cumsum(1).sub_(count_NV)
    brightest_N1 = values_NP.amax(1, keepdim=True)
    step_N1 = below_NV.gather(1, brightest_N1).div_(255).floor_()
    table_NV = below_NV.add_(step_N1.div(2).floor_()).div_(step_N1).floor_().clamp_(max=255)
    unchanged = torch.arange(256.0, device=table_NV.device)
    table_NV = torch.where(step_N1 > 0, table_NV, unchanged)
    images_BCHW.copy_(table_NV.gather(1, values_NP).view_as(images_BCHW))


def grayscale(images_BCHW: Tensor, _unused_B: Tensor) -> None:
    """Pillow's "L" in every channel; nothing on one channel."""
    if images_BCHW.shape[1] == 3:
        images_BCHW.copy_(_gray(images_BCHW))


def hue(images_BCHW: Tensor, turns_B: Tensor) -> None:
    """torchvision's `adjust_hue`: turn the hue by -0.5..0.5 turns; nothing on one channel."""
    if images_BCHW.shape[1] == 1:
        return
    red, green, blue = images_BCHW.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # With channels scaled to 0..1, the hue in sextants is ±(1 - red + green + blue), and positive
    # where green >= blue.
    sextant = green - red
    sextant.add_(blue).add_(high).sub_(low, alpha=2)
    sextant = sextant.copysign_(green - blue).div_(chroma.clamp(min=1)).add_(6 * turns_B[:, None, None])
    sextant.sub_(sextant.div(6).floor_().mul_(6))
    # Each channel is a trapezoid in the hue: high for two sextants, low for two, linear between.
    low.add_(0.5)
    _trapezoid(red, (sextant - 3).abs_().sub_(1), chroma, low)
    _trapezoid(green, (sextant - 2).abs_().neg_().add_(2), chroma, low)
    _trapezoid(blue, (sextant - 4).abs_().neg_().add_(2), chroma, low)


def rotate(images_BCHW: Tensor, degrees_B: Tensor) -> None:
    """`Image.rotate` about the centre, counter-clockwise; nearest pixel, black outside."""
    height, width = images_BCHW.shape[2:]
    angles_B = degrees_B * (math.pi / 180)
    cos, sin, zero = angles_B.cos(), angles_B.sin(), torch.zeros_like(angles_B)
    _warp(images_BCHW, (cos, -sin * (height / width), zero), (sin * (width / height), cos, zero))


def shear_x(images_BCHW: Tensor, slopes_B: Tensor) -> None:
    """Read row y at x + slope × y, y from the top edge; nearest pixel, black outside."""
    height, width = images_BCHW.shape[2:]
    zero, one = torch.zeros_like(slopes_B), torch.ones_like(slopes_B)
    slope = slopes_B * (height / width)
    _warp(images_BCHW, (one, slope, slope), (zero, one, zero))


def shear_y(images_BCHW: Tensor, slopes_B: Tensor) -> None:
    """Read column x at y + slope × x, x from the left edge; nearest pixel, black outside."""
    height, width = images_BCHW.shape[2:]
    zero, one = torch.zeros_like(slopes_B), torch.ones_like(slopes_B)
    slope = slopes_B * (width / height)
    _warp(images_BCHW, (one, zero, zero), (slope, one, slope))


def translate_x(images_BCHW: Tensor, fractions_B: Tensor) -> None:
    """Read at x + fraction × width; nearest pixel, black outside."""
    zero, one = torch.zeros_like(fractions_B), torch.ones_like(fractions_B)
    _warp(images_BCHW, (one, zero, 2 * fractions_B), (zero, one, zero))


def translate_y(images_BCHW: Tensor, fractions_B: Tensor) -> None:
    """Read at y + fraction × height; nearest pixel, black outside."""
    zero, one = torch.zeros_like(fractions_B), torch.ones_like(fractions_B)
    _warp(images_BCHW, (one, zero, zero), (zero, one, 2 * fractions_B))


# By the name a view gives them; "identity" has no entry.
BATCH_OPERATIONS: dict[str, BatchOperation] = {
    operation.__name__: operation
    for operation in (
        autocontrast, equalize, brightness, color, contrast, sharpness, posterize, solarize,
        rotate, shear_x, shear_y, translate_x, translate_y, hue, grayscale,
    )
}  # fmt: skip


def crop_resize(
    images_BCHW: Tensor, boxes_B4: Tensor, flip_B: Tensor, degrees_B: Tensor | None
) -> Tensor:
    """Rotate, crop, resize to the input size and flip, in one bilinear sampling.

    boxes_B4: left, top, width, height in pixels. flip_B: bool, mirrored left to right after the
    crop. degrees_B: counter-clockwise about the image's centre, black outside (None: no rotation).
    Sampling never reads beyond the box, as if the crop were cut out first (without rotation).
    Returns whole numbers in 0..255, float32.
    """
    height, width = images_BCHW.shape[2:]
    left, top, box_width, box_height = boxes_B4.unsqueeze(2).unbind(1)
    x_BW = _sample_positions(left, box_width, width)
    y_BH = _sample_positions(top, box_height, height)
    x_BW = torch.where(flip_B[:, None], x_BW.flip(1), x_BW)
    x_BHW, y_BHW = x_BW[:, None, :], y_BH[:, :, None]
    if degrees_B is not None:
        angles = (degrees_B * (math.pi / 180))[:, None, None]
        cos, sin, aspect = angles.cos(), angles.sin(), height / width
        x_BHW, y_BHW = cos * x_BHW - sin * aspect * y_BHW, sin / aspect * x_BHW + cos * y_BHW
    grid = images_BCHW.new_empty(len(images_BCHW), height, width, 2)
    grid[..., 0] = x_BHW
    grid[..., 1] = y_BHW
    return _sample(images_BCHW, grid, "bilinear").add_(0.5).floor_()


def _sample_positions(start_B1: Tensor, length_B1: Tensor, side: int) -> Tensor:
    """Where the `side` output pixels read within [start, start + length), in -1..1 of the image."""
    steps = (torch.arange(side, device=start_B1.device) + 0.5) / side
    offsets = torch.minimum((steps * length_B1).clamp_(min=0.5), length_B1 - 0.5)
    return (offsets + start_B1) * (2 / side) - 1


def _per_image(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]


def _gray(images_BCHW: Tensor) -> Tensor:
    """Pillow's integer luma, shape (B, 1, H, W): every product and sum is exact in float32."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    gray = images_BCHW[:, :1] * 19595
    gray.add_(images_BCHW[:, 1:2], alpha=38470).add_(images_BCHW[:, 2:], alpha=7471)
    return gray.add_(32768).div_(65536).floor_()


def _blend(images_BCHW: Tensor, origin: Tensor, factors_B: Tensor) -> None:
    """Pillow's `Image.blend(origin, images, factor)`."""
    images_BCHW.sub_(origin).mul_(_per_image(factors_B)).add_(origin).clamp_(0, 255).floor_()


def _trapezoid(channel: Tensor, height: Tensor, chroma: Tensor, low: Tensor) -> None:
    torch.add(height.clamp_(0, 1).mul_(chroma), low, out=channel).floor_()


def _warp(images_BCHW: Tensor, x_row: tuple[Tensor, ...], y_row: tuple[Tensor, ...]) -> None:
    """Read every pixel at an affine position, given by three numbers per image and axis.

    Positions run from -1 to 1 between the image's edges, so the numbers do too.
    """
    height, width = images_BCHW.shape[2:]
    x_W = _pixel_centres(width, images_BCHW.device)
    y_H1 = _pixel_centres(height, images_BCHW.device)[:, None]
    grid = images_BCHW.new_empty(len(images_BCHW), height, width, 2)
    for axis, row in enumerate((x_row, y_row)):
        along_x, along_y, start = (number[:, None, None] for number in row)
        torch.add(along_x * x_W + start, along_y * y_H1, out=grid[..., axis])
    images_BCHW.copy_(_sample(images_BCHW, grid, "nearest"))


def _sample(images_BCHW: Tensor, grid: Tensor, mode: str) -> Tensor:
    return functional.grid_sample(images_BCHW, grid, mode, "zeros", align_corners=False)


def _pixel_centres(side: int, device: torch.device) -> Tensor:
    return (torch.arange(side, device=device) * 2 + 1) / side - 1
