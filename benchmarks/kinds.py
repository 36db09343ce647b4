"""Pictures of several kinds: each kind is a colour and a pattern, the rest is random."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16
HUES = (0, 120, 240, 60, 300)  # degrees


def draw(kind: int, drawing: np.random.Generator) -> Image.Image:
    """Draw one picture of a kind below 15: disc, stripes or checks, in one of five colours."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    if kind < 5:
        down, right = SIDE / 2 + drawing.uniform(-2, 2, 2)
        on = (y - down) ** 2 + (x - right) ** 2 < (SIDE * drawing.uniform(0.25, 0.4)) ** 2
    elif kind < 10:
        period = drawing.uniform(4, 5.5)
        slant = drawing.uniform(-0.3, 0.3)
        on = (x + y * slant + drawing.uniform(0, SIDE)) % period < period / 2
    else:
        side = drawing.uniform(3, 4.5)
        right, down = drawing.uniform(0, SIDE, 2)
        on = ((x + right) // side + (y + down) // side) % 2 == 0
    hue = (HUES[kind % 5] + drawing.normal(0, 5)) % 360 / 360
    colour = colorsys.hsv_to_rgb(hue, drawing.uniform(0.75, 1), drawing.uniform(0.7, 1))
    ground = np.full(3, drawing.uniform(0.15, 0.2))
    pixels = np.where(on[..., None], colour, ground) + drawing.normal(0, 0.04, (SIDE, SIDE, 3))
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def make(folder: Path, kinds: int, each: int, seed: int) -> Path:
    """Write `each` pictures per kind, in a subfolder per kind."""
    drawing = np.random.default_rng(seed)
    for kind in range(kinds):
        place = folder / f"kind{kind:02}"
        place.mkdir(parents=True)
        for number in range(each):
            draw(kind, drawing).save(place / f"{number:04}.png")
    return folder
