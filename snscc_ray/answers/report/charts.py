"""Small line charts: the geometry that the page's template draws as SVG."""

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
    dots: list[tuple[float, float]]  # where a line would not be seen
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
    """A line through the points that have a value, broken where one has none.

    from_zero: the scale begins there and reaches 1 at least, so that charts compare.
    marks: positions on the first axis, with what to write there.
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
