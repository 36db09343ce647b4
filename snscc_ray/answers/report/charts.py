"""Small line charts: the geometry, which the page's template draws as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 300, 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 290, 10, 96

Point = tuple[float, float | None]  # None: no value there


@dataclass(frozen=True)
class Chart:
    """Coordinates within WIDTH × HEIGHT."""

    path: str
    dots: list[tuple[float, float]]  # isolated points, where a line would be invisible
    marks: list[tuple[float, float, str]]
    low: float
    high: float
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def draw(
    points: Sequence[Point], *, from_zero: bool, marks: Sequence[tuple[float, str]] = ()
) -> Chart:
    """Draw a line through the points that have a value, with gaps where there is none.

    from_zero: the scale covers at least [0, 1], so that charts can be compared.
    marks: positions on the first axis, with their labels.
    """
    values = [y for _, y in points if y is not None] or [0.0]
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 1.0)
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return (
            round(_LEFT + across * (_RIGHT - _LEFT), 1),
            round(_BOTTOM - up * (_BOTTOM - _TOP), 1),
        )

    path, pen, dots = [], "M", []
    for number, (x, y) in enumerate(points):
        if y is None:
            pen = "M"
            continue
        at = place(x, y)
        path.append(f"{pen}{at[0]} {at[1]}")
        after = points[number + 1][1] if number + 1 < len(points) else None
        if pen == "M" and after is None:
            dots.append(at)
        pen = "L"
    by_x = dict(points)
    marked = [(*place(x, y), text) for x, text in marks if (y := by_x.get(x)) is not None]
    return Chart("".join(path), dots, marked, low, high)
