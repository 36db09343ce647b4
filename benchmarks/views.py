"""Views per second: a whole batch at once, against the usual PIL pipeline image by image.

    python -m benchmarks.views [--out views.json]

Both run in this process on one thread, in turns. They are timed in CPU seconds (the same as seconds
on an idle machine), so that other programs do not count. The PIL pipeline starts from decoded PIL
images and ends with normalised tensors, not yet stacked; ours starts from one uint8 tensor.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from benchmarks.report import describe_machine, print_table, save
from snscc_ray.config.settings import SimclrView, StrongView
from snscc_ray.core.views import Normalize, make_view

REPEATS = 9
CASES = ((32, 3, 512, 16), (16, 1, 256, 6), (8, 1, 256, 3))  # side, channels, batch, cutout
PilView = Callable[[Image.Image], Tensor]


def pil_simclr(view: SimclrView, side: int, normalize: Normalize) -> PilView:
    jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    view_of: PilView = transforms.Compose([
        transforms.RandomResizedCrop(side, view.crop_scale, view.crop_ratio),
        transforms.RandomHorizontalFlip(view.flip),
        transforms.RandomApply([jitter], view.jitter),
        transforms.RandomGrayscale(view.grayscale),
        transforms.ToTensor(),
        transforms.Normalize(normalize.mean, normalize.std),
    ])  # fmt: skip
    return view_of


def pil_strong(view: StrongView, side: int, normalize: Normalize) -> PilView:
    start = transforms.RandomHorizontalFlip(view.flip)
    end = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(normalize.mean, normalize.std)]
    )

    def apply(image: Image.Image) -> Tensor:
        image = start(image)
        for name in random.choices(view.operations, k=view.num_operations):
            image = pil_operation(name, image, view)
        values: Tensor = end(image)
        top = random.randrange(side) - view.cutout // 2
        left = random.randrange(side) - view.cutout // 2
        rows = slice(max(top, 0), top + view.cutout)
        values[:, rows, max(left, 0) : left + view.cutout] = 0
        return values

    return apply


def pil_operation(name: str, image: Image.Image, view: StrongView) -> Image.Image:
    def moved(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    shear = random.uniform(-view.shear, view.shear)
    shift = random.uniform(-view.translate, view.translate) * image.width
    match name:
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "brightness" | "color" | "contrast" | "sharpness":
            enhancer = getattr(ImageEnhance, name.capitalize())
            enhanced: Image.Image = enhancer(image).enhance(random.uniform(*view.enhance))
            return enhanced
        case "posterize":
            return ImageOps.posterize(image, random.randint(*view.posterize_bits))
        case "solarize":
            return ImageOps.solarize(image, int(random.uniform(*view.solarize_threshold)))
        case "rotate":
            return image.rotate(random.uniform(-view.rotate_degrees, view.rotate_degrees))
        case "shear_x":
            return moved(1, shear, 0, 0, 1, 0)
        case "shear_y":
            return moved(1, 0, 0, shear, 1, 0)
        case "translate_x":
            return moved(1, 0, shift, 0, 1, 0)
        case "translate_y":
            return moved(1, 0, 0, 0, 1, shift)
    return image


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def summary(name: str, rates: list[float]) -> dict[str, float]:
    return {name: statistics.median(rates), f"{name}_min": min(rates), f"{name}_max": max(rates)}


def measure(
    view: SimclrView | StrongView, side: int, channels: int, batch: int
) -> dict[str, object]:
    """Measure images per CPU second, ours and PIL's, over REPEATS turns.

    A turn is one batch for PIL and five for ours.
    """
    normalize = Normalize((0.5,) * channels, (0.25,) * channels)
    images = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)
    pil_images = [to_pil_image(image) for image in images]
    rows = torch.arange(batch)
    if isinstance(view, SimclrView):
        pil_view = pil_simclr(view, side, normalize)
    else:
        pil_view = pil_strong(view, side, normalize)

    def ours() -> None:
        for key in range(5):
            make_view(images, rows, view, key, normalize)

    def theirs() -> None:
        for image in pil_images:
            pil_view(image)

    ours()
    theirs()
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        rates[0].append(5 * batch / cpu_seconds(ours))
        rates[1].append(batch / cpu_seconds(theirs))
    ratio = statistics.median(rates[0]) / statistics.median(rates[1])
    return {
        "view": view.kind, "side": side, "channels": channels, "batch": batch,
        **summary("ours", rates[0]), **summary("pil", rates[1]), "ratio": ratio,
        "ours_ms_per_batch": 1000 * batch / statistics.median(rates[0]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    out: Path | None = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    rows = [
        measure(view, side, channels, batch)
        for side, channels, batch, cutout in CASES
        for view in (SimclrView(), StrongView(cutout=cutout))
    ]
    print_table(rows)
    if out is not None:
        save(out, describe_machine(threads=1), rows)


if __name__ == "__main__":
    main()
