"""Whether two images show the same picture: small grey copies, aligned and correlated.

One of two near-duplicates may be resized, compressed or cropped at its edges. Resizing leaves a
copy of fixed size as it is; a crop shifts and stretches it. So the second copy is shifted and
stretched, along each axis, to where it fits the first best (Lucas and Kanade, An iterative image
registration technique, 1981; coarse to fine), and then compared.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TINTS = 32
# Mean difference in Cb and Cr; recompressing and cropping change them by less.
_COLOURS = 4.0
SIDE = 64  # pixels of a grey copy, whatever the shape of the image
# Shifted by a few per cent, so small a copy stays nearly the same.
_ROUGH, _ROUGHLY = 8, 0.45  # side of copies that are not aligned, and least correlation to go on
_COARSE, _COARSELY = 24, 0.7  # the same for those that are aligned first
_STEPS = 5  # of the alignment, for each size
_MOST = 0.15  # stretch and shift, as a share of the side: no more than a crop at the edges
_PAIRS = 256  # aligned at a time: 4 MB per array
# Grey levels. Noise of compression is less than this; it keeps flat areas from counting as detail.
_NOISE = 1.5


def small_copies(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the grey copy (SIDE, SIDE) and the colours (TINTS,) of a whole RGB image, uint8.

    The colours are Cb and Cr of 4 × 4 parts.
    """
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    tints = np.asarray(small.convert("YCbCr").resize((4, 4), Image.Resampling.BOX))[..., 1:]
    return np.asarray(small.convert("L")), tints.reshape(-1)


def same_colours(a_BT: np.ndarray, b_BT: np.ndarray) -> np.ndarray:
    """Whether pairs of images differ little in colour, bool (B,): a grey copy is another image."""
    away = np.abs(a_BT.astype(np.int16) - b_BT.astype(np.int16)).mean(1)
    return np.asarray(away <= _COLOURS)


def similarity(a_BHW: Tensor, b_BHW: Tensor) -> Tensor:
    """Return how alike pairs of grey copies are, float32 (B,), at most 1.

    It is the lesser of two correlations after alignment: of the brightness, and of the detail (what
    differs from the surroundings). Different photographs of one scene have other details.
    a, b: uint8 (B, SIDE, SIDE).
    """
    parts = zip(a_BHW.split(_PAIRS), b_BHW.split(_PAIRS), strict=True)
    return torch.cat([_similarity(a.float(), b.float()) for a, b in parts])


def _similarity(a_BHW: Tensor, b_BHW: Tensor) -> Tensor:
    a, b = a_BHW[:, None], b_BHW[:, None]
    rough_a, rough_b = (F.interpolate(x, (_ROUGH, _ROUGH), mode="area") for x in (a, b))
    found_B = _correlation(rough_a, rough_b, torch.ones_like(rough_a), 0.0)
    # Most candidates are other pictures; only the rest is worth the work of the next size.
    rest = (found_B > _ROUGHLY).nonzero()[:, 0]
    if len(rest):
        found_B[rest] = _aligned_similarity(a[rest], b[rest])
    return found_B


def _aligned_similarity(a: Tensor, b: Tensor) -> Tensor:
    warp_B4 = a.new_tensor([1.0, 0.0, 1.0, 0.0]).repeat(len(a), 1)
    coarse_a, coarse_b = (F.interpolate(x, (_COARSE, _COARSE), mode="area") for x in (a, b))
    warp_B4 = _aligned(coarse_a, coarse_b, warp_B4, _STEPS)
    found_B = _correlation(coarse_a, *_warped(coarse_b, warp_B4), 0.0)
    rest = (found_B > _COARSELY).nonzero()[:, 0]
    if not len(rest):
        return found_B
    a, b, warp_B4 = a[rest], b[rest], warp_B4[rest]
    for side in (SIDE // 2, SIDE):
        fine_a, fine_b = (F.interpolate(x, (side, side), mode="area") for x in (a, b))
        warp_B4 = _aligned(fine_a, fine_b, warp_B4, _STEPS)
    moved, inside = _warped(b, warp_B4)
    whole_B = _correlation(a, moved, inside, 0.0)
    detail_B = _correlation(_detail(a), _detail(moved), _inner(inside), _NOISE)
    found_B[rest] = torch.minimum(torch.minimum(whole_B, detail_B), found_B[rest])
    return found_B


def _places(side: int, like: Tensor) -> Tensor:
    """Centres of the pixels, in [-1, 1]."""
    return (torch.arange(side, dtype=like.dtype, device=like.device) * 2 + 1) / side - 1


def _warped(b_B1HW: Tensor, warp_B4: Tensor) -> tuple[Tensor, Tensor]:
    """Return b at x·s + t along each axis, and where that is inside of b."""
    side = b_B1HW.shape[-1]
    u = _places(side, b_B1HW)
    x_BW = warp_B4[:, :1] * u + warp_B4[:, 1:2]
    y_BH = warp_B4[:, 2:3] * u + warp_B4[:, 3:]
    grid_BHW2 = torch.stack(
        [x_BW[:, None].expand(-1, side, -1), y_BH[:, :, None].expand(-1, -1, side)], dim=3
    )
    moved = F.grid_sample(b_B1HW, grid_BHW2, padding_mode="border", align_corners=False)
    inside_BHW = (grid_BHW2.abs() <= 1).all(3)
    return moved, inside_BHW[:, None].float()


def _aligned(a_B1HW: Tensor, b_B1HW: Tensor, warp_B4: Tensor, steps: int) -> Tensor:
    """Improve the warp by Gauss-Newton steps on the squared difference, gain and offset free."""
    side = a_B1HW.shape[-1]
    u = _places(side, a_B1HW)
    for _ in range(steps):
        moved, inside = _warped(b_B1HW, warp_B4)
        padded = F.pad(moved, (1, 1, 1, 1), mode="replicate")
        dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * (side / 4)
        dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * (side / 4)
        ones = torch.ones_like(moved)
        # Columns: the derivatives by the four of the warp, and by gain and offset.
        columns = [dx * u, dx, dy * u[:, None], dy, moved, ones]
        J_BP6 = torch.stack([c.flatten(1) for c in columns], dim=2)
        w_BP1 = inside.flatten(1)[:, :, None]
        r_BP1 = (a_B1HW - moved).flatten(1)[:, :, None]
        A_B66 = (J_BP6 * w_BP1).mT @ J_BP6
        # Flat images: a little of the diagonal keeps it solvable.
        A_B66 += torch.diag_embed(A_B66.diagonal(dim1=1, dim2=2) * 1e-3 + 1e-3)
        step_B6 = torch.linalg.solve(A_B66, (J_BP6 * w_BP1).mT @ r_BP1)[:, :, 0]
        warp_B4 = warp_B4 + step_B6[:, :4].clamp(-0.1, 0.1)
        start = warp_B4.new_tensor([1.0, 0.0, 1.0, 0.0])
        warp_B4 = start + (warp_B4 - start).clamp(-_MOST, _MOST)
    return warp_B4


def _detail(x_B1HW: Tensor) -> Tensor:
    padded = F.pad(x_B1HW, (3, 3, 3, 3), mode="replicate")
    return x_B1HW - F.avg_pool2d(padded, 7, stride=1)


def _inner(inside_B1HW: Tensor) -> Tensor:
    """Where the surroundings are inside, too."""
    return 1 - F.max_pool2d(1 - inside_B1HW, 7, stride=1, padding=3)


def _correlation(a_B1HW: Tensor, b_B1HW: Tensor, weight_B1HW: Tensor, noise: float) -> Tensor:
    a, b, w = (t.flatten(1) for t in (a_B1HW, b_B1HW, weight_B1HW))
    total = w.sum(1, keepdim=True).clamp(min=1)
    a = (a - (a * w).sum(1, keepdim=True) / total) * w
    b = (b - (b * w).sum(1, keepdim=True) / total) * w
    # The same noise in both adds to each variance, and as much to what they have in common.
    extra = noise**2 * total[:, 0] + 1e-6
    product = (a.square().sum(1) + extra) * (b.square().sum(1) + extra)
    return (((a * b).sum(1) + extra) / product.sqrt()).clamp(max=1)
