"""A decoder from features to images, for the methods that reconstruct."""

from __future__ import annotations

from torch import Tensor, nn

_FIRST_SIDE = 4
_WIDEST, _NARROWEST = 256, 16


class Decoder(nn.Module):
    """Map (B, features) to (B, channels, size, size).

    A linear layer gives at most 4 pixels a side; then doublings, each with a convolution, up to the
    size.
    """

    def __init__(self, features: int, channels: int, size: int) -> None:
        super().__init__()
        sides = [size]
        while sides[-1] > _FIRST_SIDE:
            sides.append((sides[-1] + 1) // 2)
        self.shape = (min(features, _WIDEST), sides[-1], sides[-1])
        width = self.shape[0]
        self.start = nn.Linear(features, width * sides[-1] ** 2)
        layers: list[nn.Module] = []
        for side in reversed(sides[:-1]):
            narrower = max(width // 2, _NARROWEST)
            layers += [
                nn.Upsample(size=(side, side)),
                nn.Conv2d(width, narrower, 3, padding=1, bias=False),
                nn.BatchNorm2d(narrower),
                nn.ReLU(inplace=True),
            ]
            width = narrower
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, h_BD: Tensor) -> Tensor:
        x_BCHW: Tensor = self.layers(self.start(h_BD).unflatten(1, self.shape))
        return x_BCHW
