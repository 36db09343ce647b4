"""Every operation against Pillow or torchvision, and what a view promises about its draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from snscc_ray.config.settings import OPERATIONS, SimclrView, StrongView
from snscc_ray.core.view_ops import BATCH_OPERATIONS, MOTIONS, affine, crop_resize, motion_matrices
from snscc_ray.core.views import Normalize, apply_view, clean_view, draw_view, make_view

HEIGHT, WIDTH = 18, 24
BATCH = 40
PLAIN = {1: Normalize((0.0,), (1.0,)), 3: Normalize((0.0,) * 3, (1.0,) * 3)}
PilOperation = Callable[[Image.Image, float], Image.Image]


def shear(matrix: Callable[[float], tuple[float, ...]]) -> PilOperation:
    return lambda image, value: image.transform(
        image.size, Image.Transform.AFFINE, matrix(value), Image.Resampling.NEAREST
    )


PIL_OPERATIONS: dict[str, PilOperation] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    "color": lambda image, value: ImageEnhance.Color(image).enhance(value),
    "contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    "sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
    "posterize": lambda image, value: ImageOps.posterize(image, int(value)),
    "solarize": lambda image, value: ImageOps.solarize(image, value),
    "grayscale": lambda image, _: image.convert("L").convert(image.mode),
    "rotate": lambda image, value: image.rotate(value, Image.Resampling.NEAREST),
    "shear_x": shear(lambda value: (1, value, 0, 0, 1, 0)),
    "shear_y": shear(lambda value: (1, 0, 0, value, 1, 0)),
    "translate_x": shear(lambda value: (1, 0, value * WIDTH, 0, 1, 0)),
    "translate_y": shear(lambda value: (1, 0, 0, 0, 1, value * HEIGHT)),
}
RANGES = {"posterize": (1, 9), "solarize": (0, 256.5)} | {
    name: (-40, 40) if name == "rotate" else (-0.4, 0.4) for name in MOTIONS
}


def to_pil(image_CHW: Tensor) -> Image.Image:
    return reference.to_pil_image(image_CHW)


def from_pil(image: Image.Image) -> Tensor:
    array = np.atleast_3d(np.asarray(image)).copy()
    return torch.from_numpy(array).permute(2, 0, 1)


def some_images(
    channels: int, batch: int = BATCH, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Tensor:
    """uint8: random ones, flat ones (black, white, grey), dim ones, a ramp, two-valued ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, channels, *size), generator=generator).byte()
    images[1], images[2], images[3] = 0, 255, 77
    images[4:8] = images[4:8] // 16 + 100
    images[8] = torch.arange(size[1]).byte() * (255 // size[1])
    images[9:12] = (images[9:12] > 200).byte() * 255
    images[12, 0] = 9  # one flat channel
    return images


def some_values(name: str, batch: int = BATCH) -> Tensor:
    low, high = RANGES.get(name, (0, 2))
    generator = torch.Generator().manual_seed(1)
    return low + (high - low) * torch.rand(batch, generator=generator)


def by_pil(operation: PilOperation, images: Tensor, values: Tensor) -> Tensor:
    pairs = zip(images, values.tolist(), strict=True)
    return torch.stack([from_pil(operation(to_pil(image), value)) for image, value in pairs])


def difference(ours: Tensor, theirs: Tensor) -> Tensor:
    assert ours.dtype == theirs.dtype == torch.uint8 and ours.shape == theirs.shape
    return (ours.int() - theirs.int()).abs()


def motions_of(name: str, values: Tensor) -> Tensor:
    motions = torch.zeros(len(values), len(MOTIONS))
    motions[:, MOTIONS.index(name)] = values
    return motions


# Operations


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(set(PIL_OPERATIONS) - set(MOTIONS) - {"identity"}))
def test_pointwise_equals_pillow(name: str, channels: int) -> None:
    images, values = some_images(channels), some_values(name)
    before = images.clone()
    error = difference(BATCH_OPERATIONS[name](images, values), by_pil(
        PIL_OPERATIONS[name], images, values
    ))  # fmt: skip
    # Pillow's autocontrast lands below a whole number where the exact value is that number.
    assert error.max() <= (1 if name == "autocontrast" else 0)
    assert (error > 0).float().mean() < 0.01
    assert torch.equal(images, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_hue_is_torchvisions_within_a_level(channels: int) -> None:
    images = some_images(channels)
    turns = some_values("hue") / 2 - 0.5
    theirs = torch.stack(
        [reference.adjust_hue(i, t) for i, t in zip(images, turns.tolist(), strict=True)]
    )
    assert difference(BATCH_OPERATIONS["hue"](images, turns), theirs).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MOTIONS)
def test_motion_is_pillows_nearest(name: str, channels: int) -> None:
    images, values = some_images(channels), some_values(name)
    ours = affine(images, motion_matrices(motions_of(name, values), HEIGHT, WIDTH))
    error = difference(ours, by_pil(PIL_OPERATIONS[name], images, values))
    assert (error > 0).float().mean() < 1e-3  # a position halfway between two pixels
    moved = (ours != images).flatten(1).any(1)
    assert moved[13:].float().mean() > 0.8  # some are too small to move a pixel


def test_no_motion_changes_nothing() -> None:
    images = some_images(3)
    matrices = motion_matrices(torch.zeros(BATCH, len(MOTIONS)), HEIGHT, WIDTH)
    assert torch.equal(affine(images, matrices), images)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8), (31, 17)])
@pytest.mark.parametrize("name", sorted(BATCH_OPERATIONS))
def test_any_size(name: str, size: tuple[int, int]) -> None:
    for channels in (1, 3):
        images = some_images(channels, 16, size)
        values = some_values(name, 16)
        if name == "affine":
            values = motion_matrices(motions_of("rotate", values), *size)
        assert BATCH_OPERATIONS[name](images, values).shape == images.shape


def some_boxes() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sizes = 1 + torch.rand(BATCH, 2, generator=generator) * torch.tensor((WIDTH, HEIGHT))
    sizes = sizes.floor()
    room = torch.tensor((WIDTH, HEIGHT)) - sizes + 1
    corners = (torch.rand(BATCH, 2, generator=generator) * room).floor()
    return torch.cat((corners, sizes), 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_pillows_and_torchvisions_within_a_level(channels: int) -> None:
    images, boxes = some_images(channels), some_boxes()
    flips = torch.arange(BATCH) % 3 == 0
    ours = crop_resize(images, boxes, flips, None)
    for image, view, box, flip in zip(images, ours, boxes.int().tolist(), flips, strict=True):
        left, top, width, height = box
        cropped = to_pil(image).crop((left, top, left + width, top + height))
        pillow = from_pil(cropped.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
        torchvision = reference.resized_crop(image, top, left, height, width, [HEIGHT, WIDTH])
        for theirs in (pillow, torchvision):
            assert difference(view, theirs.flip(2) if flip else theirs).max() <= 1


def test_whole_box_changes_nothing() -> None:
    images = some_images(3)
    boxes = torch.tensor([0.0, 0.0, WIDTH, HEIGHT]).expand(BATCH, 4)
    assert torch.equal(crop_resize(images, boxes, torch.zeros(BATCH).bool(), None), images)


def test_rotation_before_a_crop_is_torchvisions_bilinear() -> None:
    images, degrees = some_images(3), some_values("rotate")
    boxes = torch.tensor([0.0, 0.0, WIDTH, HEIGHT]).expand(BATCH, 4)
    ours = crop_resize(images, boxes, torch.zeros(BATCH).bool(), degrees)
    theirs = torch.stack([
        reference.rotate(image, angle, v2.InterpolationMode.BILINEAR)
        for image, angle in zip(images, degrees.tolist(), strict=True)
    ])  # fmt: skip
    assert difference(ours, theirs).max() <= 1


# Whole views


def test_strong_chain_is_pillows() -> None:
    view = StrongView(cutout=0, num_operations=4)
    images = torch.randint(0, 256, (200, 3, HEIGHT, WIDTH)).byte()
    draws = draw_view(torch.arange(200), 5, view, HEIGHT, WIDTH)
    ours = (apply_view(images, draws, PLAIN[3]) * 255).round()
    theirs = []
    for row, image in enumerate(images):
        pil = ImageOps.mirror(to_pil(image)) if draws.flip_B[row] else to_pil(image)
        for code, value in zip(draws.codes_BS[row], draws.values_BS[row].tolist(), strict=True):
            pil = PIL_OPERATIONS[draws.names[code]](pil, value)
        theirs.append(from_pil(pil))
    same = (ours == torch.stack(theirs)).float().flatten(1).mean(1)
    assert (same > 0.99).float().mean() > 0.97  # a level's difference may grow in a later step
    assert same.mean() > 0.99


def test_simclr_steps_are_applied_in_the_drawn_order() -> None:
    images = some_images(3)
    view = SimclrView(crop_scale=(1, 1), flip=0, jitter=1, hue=0)
    draws = draw_view(torch.arange(BATCH), 3, view, HEIGHT, WIDTH)
    ours = (apply_view(images, draws, PLAIN[3]) * 255).round().byte()
    for row, image in enumerate(images):
        pil = to_pil(image)
        for code, value in zip(draws.codes_BS[row], draws.values_BS[row].tolist(), strict=True):
            pil = PIL_OPERATIONS[draws.names[code]](pil, value)
        assert torch.equal(ours[row], from_pil(pil))


VIEWS = {
    "simclr": SimclrView(),
    "turned": SimclrView(rotate_degrees=20),
    "strong": StrongView(cutout=5),
    "cropped": StrongView(cutout=5, crop_scale=(0.3, 1)),
    "still": SimclrView(crop_scale=(1, 1), jitter=0, grayscale=0, flip=0),
    "no chain": StrongView(cutout=3, num_operations=0),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("channels", [1, 3])
def test_view_depends_on_row_and_key_alone(view: SimclrView | StrongView, channels: int) -> None:
    images, rows = some_images(channels), torch.arange(BATCH) * 1009
    normalize = Normalize((0.4,) * channels, (0.2,) * channels)
    whole = make_view(images, rows, view, 11, normalize)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    shuffled = make_view(images[order], rows[order], view, 11, normalize)
    assert torch.equal(shuffled, whole[order])
    for part in (slice(0, 1), slice(13, 14), slice(20, 37)):
        assert torch.equal(make_view(images[part], rows[part], view, 11, normalize), whole[part])
    if view is not VIEWS["still"]:
        assert not torch.equal(make_view(images, rows, view, 12, normalize), whole)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_memory_format_of_the_input_does_not_matter(view: SimclrView | StrongView) -> None:
    images, rows = some_images(3), torch.arange(BATCH)
    other = images.contiguous(memory_format=torch.channels_last)
    ours = make_view(other, rows, view, 1, PLAIN[3])
    assert torch.equal(ours, make_view(images, rows, view, 1, PLAIN[3]))


@pytest.mark.parametrize("view", [VIEWS["simclr"], VIEWS["strong"]])
def test_each_image_has_its_own_view(view: SimclrView | StrongView) -> None:
    image = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH)).byte()
    views = make_view(image.expand(BATCH, -1, -1, -1), torch.arange(BATCH), view, 1, PLAIN[3])
    assert len({tuple(v.flatten().tolist()) for v in views}) == BATCH


@pytest.mark.parametrize("size", [(8, 8), (HEIGHT, WIDTH), (224, 100)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("view", [None, *VIEWS.values()])
def test_output_form(
    view: SimclrView | StrongView | None, channels: int, size: tuple[int, int]
) -> None:
    images = some_images(channels, 13, size)
    before = images.clone()
    views = make_view(images, torch.arange(13), view, 0, PLAIN[channels])
    assert views.shape == images.shape and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert views.min() >= 0 and views.max() <= 1 and views.isfinite().all()
    assert torch.equal(images, before)


def test_clean_view_normalises_each_channel() -> None:
    images = some_images(3)
    normalize = Normalize((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    theirs = reference.normalize(images / 255, list(normalize.mean), list(normalize.std))
    torch.testing.assert_close(clean_view(images, normalize), theirs, rtol=1e-5, atol=1e-5)
    still = make_view(images, torch.arange(BATCH), VIEWS["still"], 0, normalize)
    assert torch.equal(still, clean_view(images, normalize))


def test_cutout_is_a_clipped_square_of_the_mean() -> None:
    side = 6
    view = StrongView(cutout=side, num_operations=0, flip=0)
    images = torch.full((2000, 3, HEIGHT, WIDTH), 200).byte()
    normalize = Normalize((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    views = make_view(images, torch.arange(2000), view, 4, normalize)
    cut = (views == 0).all(1)
    assert torch.equal(views == 0, cut[:, None].expand_as(views))
    heights, widths = cut.any(2).sum(1), cut.any(1).sum(1)
    assert torch.equal(cut.sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == side
    assert heights.min() == widths.min() == side // 2  # centred on a border pixel
    # The centre is uniform: a share (side of 18 or 24) touches each border.
    clipped = (heights < side).float().mean().item()
    assert clipped == pytest.approx((side - 1) / HEIGHT, abs=0.04)
    assert cut.any(0).all()


# Draws

MANY = torch.arange(20000)


def test_simclr_probabilities() -> None:
    view = SimclrView(flip=0.5, jitter=0.8, grayscale=0.2)
    draws = draw_view(MANY, 1, view, HEIGHT, WIDTH)
    names = draws.names
    assert draws.flip_B.float().mean().item() == pytest.approx(0.5, abs=0.02)
    jittered = draws.codes_BS[:, :4] != names.index("identity")
    assert jittered.all(1).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(jittered.all(1), jittered.any(1))
    gray = draws.codes_BS[:, 4] == names.index("grayscale")
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    orders = draws.codes_BS[jittered.all(1), :4]
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand_as(orders))
    assert len(orders.unique(dim=0)) == 24
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("hue", -0.1, 0.1)):
        values = draws.values_BS[draws.codes_BS == names.index(name)]
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high


def test_strong_draws_are_uniform_over_operations_and_ranges() -> None:
    draws = draw_view(MANY, 1, StrongView(cutout=4), HEIGHT, WIDTH)
    shares = torch.bincount(draws.codes_BS.flatten(), minlength=14) / draws.codes_BS.numel()
    torch.testing.assert_close(shares, torch.full((14,), 1 / 14), rtol=0.06, atol=0)
    assert (draws.codes_BS[:, 0] == draws.codes_BS[:, 1]).float().mean().item() == pytest.approx(
        1 / 14, abs=0.01
    )
    expected = {
        "brightness": (0.05, 0.95), "sharpness": (0.05, 0.95), "solarize": (0, 256),
        "rotate": (-30, 30), "shear_x": (-0.1, 0.1), "translate_y": (-0.1, 0.1),
    }  # fmt: skip
    for name, (low, high) in expected.items():
        values = draws.values_BS[draws.codes_BS == OPERATIONS.index(name)]
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    bits = draws.values_BS[draws.codes_BS == OPERATIONS.index("posterize")].long()
    counts = torch.bincount(bits, minlength=10)
    assert counts[:4].sum() == 0 and counts[9] == 0
    assert counts[4:9].min() > 0.85 * counts.sum() / 5


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (2.0, 3.0)])
def test_crop_boxes_have_torchvisions_distribution(ratio: tuple[float, float]) -> None:
    view = SimclrView(crop_ratio=ratio)
    boxes = draw_view(MANY, 1, view, HEIGHT, WIDTH).boxes_B4
    assert boxes is not None
    left, top, width, height = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert min(left.min(), top.min()) >= 0 and min(width.min(), height.min()) >= 1
    assert (left + width).max() <= WIDTH and (top + height).max() <= HEIGHT
    image = torch.zeros(1, HEIGHT, WIDTH)
    theirs = torch.tensor([
        v2.RandomResizedCrop.make_params(
            v2.RandomResizedCrop((HEIGHT, WIDTH), view.crop_scale, ratio), [image]
        )[name]
        for _ in range(3000) for name in ("left", "top", "width", "height")
    ]).view(-1, 4).float()  # fmt: skip
    torch.testing.assert_close(boxes.mean(0), theirs.mean(0), rtol=0.05, atol=0.15)
    torch.testing.assert_close(boxes.std(0), theirs.std(0), rtol=0.08, atol=0.1)


def test_a_box_that_never_fits_is_torchvisions_central_crop() -> None:
    view = SimclrView(crop_scale=(0.999, 1.0), crop_ratio=(0.5, 0.5))
    boxes = draw_view(torch.arange(50), 1, view, 20, 40).boxes_B4
    assert boxes is not None
    assert torch.equal(boxes, torch.tensor([15.0, 0.0, 10.0, 20.0]).expand(50, 4))


def test_what_a_view_leaves_out_is_not_drawn() -> None:
    draws = draw_view(torch.arange(5), 1, VIEWS["still"], HEIGHT, WIDTH)
    assert draws.boxes_B4 is None and draws.degrees_B is None and draws.corners_B2 is None
    assert draws.codes_BS.shape == draws.values_BS.shape == (5, 0)
    assert not draws.flip_B.any()


def test_rotation_range() -> None:
    degrees = draw_view(MANY, 1, SimclrView(rotate_degrees=20), HEIGHT, WIDTH).degrees_B
    assert degrees is not None
    assert -20 <= degrees.min() < -19.5 and 19.5 < degrees.max() <= 20


def test_flip_mirrors_exactly() -> None:
    images = some_images(3)
    view = SimclrView(crop_scale=(1, 1), jitter=0, grayscale=0, flip=1)
    views = make_view(images, torch.arange(BATCH), view, 0, PLAIN[3])
    assert torch.equal(views, clean_view(images.flip(3), PLAIN[3]))
