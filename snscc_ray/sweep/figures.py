"""Plot a sweep in the form of the paper's figures, with matplotlib and without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from snscc_ray.config.settings import StageName
from snscc_ray.core.storage import write_whole
from snscc_ray.sweep.results import (
    METRIC_NAMES,
    ORACLE,
    STAGE_NAMES,
    Row,
    by_seed,
    only_printed,
    paper_sets,
    shortfalls,
    shown_metrics,
)
from tune_spaces.paper import DATA_SETS
from tune_spaces.space import SYMBOLS, Figures, Space

# Lines of metrics.jsonl: point label -> seed -> lines.
Curves = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
# One series: label -> mean and standard deviation over seeds (0 with one seed).
Series = Mapping[str, tuple[float, float]]

# Okabe and Ito's colours, distinct for any colour vision; markers and dashes also differ.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^")
_DASHES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.markersize": 6,
    "errorbar.capsize": 3,
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.hashsalt": "snscc",  # the same rows give the same file
}
_WIDTH, _HEIGHT = 4.3, 3.3  # of a panel, in inches
_NARROWEST = 6.0  # least width of a figure, in inches, to fit the legend


@dataclass(frozen=True)
class _Panel:
    """Labels along an axis, and a series per metric; `paper` is drawn with hollow markers."""

    title: str
    axis: str
    labels: Sequence[str]
    ours: Sequence[Series] = ()
    paper: Sequence[Series] = ()


def draw(
    space: Space, rows: Sequence[Row], folder: Path, curves: Curves | None = None
) -> list[Path]:
    """Write NAME.png and NAME.svg of a space into the folder: mean and spread over seeds.

    The paper's values share a panel with ours if the recipe uses the same dataset; otherwise they
    get a panel beside it. A space of the form `curves` needs the curves; without them, it is drawn
    as bars.
    """
    metrics = shown_metrics(rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if space.form == "curves" and curves and any(curves.values()):
            handles = _draw_curves(figure, space, rows, metrics, curves)
        else:
            handles = _draw_panels(figure, space, rows, metrics)
        where = f" ({space.where})" if space.where else ""
        # The figure's title is the legend's title: two separate ones at the top would overlap.
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(len(handles), 4),
            frameon=False,
            title=f"{space.title}{where}",
            title_fontsize=12,
        )
        letters = int(15 * figure.get_figwidth())
        notes = [textwrap.fill(note, letters) for note in _notes(space, rows, metrics)]
        figure.supxlabel("\n".join(notes), fontsize=8, color="0.3")
        png, svg = folder / f"{space.name}.png", folder / f"{space.name}.svg"
        write_whole(png, lambda file: figure.savefig(file, format="png", dpi=150))
        # Without a date, so that the same figure gives the same file.
        write_whole(svg, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    return [png, svg]


def _subplots(figure: Figure, number: int, *, same_scale: bool = False) -> list[Axes]:
    columns = 2 if number == 4 else min(number, 3)
    lines = -(-number // columns)
    figure.set_size_inches(max(columns * _WIDTH, _NARROWEST), lines * _HEIGHT + 1.2)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=same_scale)
    places = list(grid.flatten())
    for unused in places[number:]:
        unused.remove()
    return places[:number]


def _notes(space: Space, rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    seeds = len({row["seed"] for row in rows})
    spread = f"Mean and standard deviation over {seeds} seeds." if seeds > 1 else "One seed."
    sets = paper_sets(space, rows)[:1] if tuple(metrics) == ORACLE else []
    together = bool(sets) and _is_of(rows, sets[0])
    printed = "" if together else only_printed(space, sets)
    return [note for note in (spread, printed, *shortfalls(space, rows)) if note]


def _is_of(rows: Sequence[Row], name: str) -> bool:
    return bool(rows) and DATA_SETS.get(str(rows[0]["recipe"])) == name


def _mean_spread(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _series(found: Mapping[str, Mapping[int, float]]) -> Series:
    return {label: _mean_spread(list(of.values())) for label, of in found.items() if of}


# ------------------------------------------------------------------------------ points and fields


def _draw_panels(
    figure: Figure, space: Space, rows: Sequence[Row], metrics: Sequence[str]
) -> list[Line2D]:
    """Draw the panels of a space; return the legend handles."""
    name = next(iter(paper_sets(space, rows)), None) if tuple(metrics) == ORACLE else None
    if space.form == "grid":
        panels = _field_panels(space, rows, metrics)
    else:
        panels = _point_panels(space, rows, metrics, name)
    paint = _lines if space.form in ("line", "grid") else _bars
    places = _subplots(figure, len(panels), same_scale=space.form == "grid")
    for axes, panel in zip(places, panels, strict=True):
        paint(axes, panel)
        axes.set_xlabel(panel.axis)
        axes.set_title(panel.title, fontsize=10)
    handles = [_key(number, METRIC_NAMES[metric]) for number, metric in enumerate(metrics)]
    if any(panel.paper for panel in panels):
        handles.append(_key(None, f"paper, {name}"))
    return handles


def _key(number: int | None, label: str) -> Line2D:
    color, marker = ("0.3", "o") if number is None else (_COLORS[number], _MARKERS[number])
    face = "white" if number is None else color
    return Line2D(
        [], [], color=color, marker=marker, markerfacecolor=face, linestyle="none", label=label
    )


def _point_panels(
    space: Space, rows: Sequence[Row], metrics: Sequence[str], name: str | None
) -> list[_Panel]:
    """Make one panel per stage, and one for the paper's values on another dataset."""
    labels = [point.label for point in space.points]
    panels = []
    for stage in space.stages:
        title = STAGE_NAMES[stage]
        ours = [
            _series({label: by_seed(rows, label, stage, metric) for label in labels})
            for metric in metrics
        ]
        paper = _printed(space, name, stage)
        if name is not None and _is_of(rows, name):
            panels.append(_Panel(title, space.axis, labels, ours, paper))
            continue
        panels.append(_Panel(title, space.axis, labels, ours))
        if paper and len(paper[0]) > 1:
            panels.append(_Panel(f"{title}: paper, {name}", space.axis, labels, paper=paper))
    return panels


def _printed(space: Space, name: str | None, stage: StageName) -> list[Series]:
    """Return the paper's ACC, NMI and ARI of a stage."""
    cells: Mapping[str, Figures] = space.paper.get(name or "", {}).get(stage, {})
    found = [
        {label: (value, 0.0) for label, of in cells.items() if (value := of[place]) is not None}
        for place in range(len(ORACLE))
    ]
    return list(found) if any(found) else []


def _field_panels(space: Space, rows: Sequence[Row], metrics: Sequence[str]) -> list[_Panel]:
    """Make one panel per field, with each seed's mean over the other fields."""
    stage = space.stages[-1]
    panels = []
    for name, values in _fields(space).items():
        ours = []
        for metric in metrics:
            found: dict[str, dict[int, list[float]]] = {}
            for label, value in values.items():
                for seed, figure in by_seed(rows, label, stage, metric).items():
                    found.setdefault(value, {}).setdefault(seed, []).append(figure)
            ours.append(
                _series(
                    {
                        value: {seed: float(np.mean(of)) for seed, of in seeds.items()}
                        for value, seeds in found.items()
                    }
                )
            )
        title = f"{STAGE_NAMES[stage]}, mean over the other fields"
        panels.append(_Panel(title, name, list(dict.fromkeys(values.values())), ours))
    return panels


def _fields(space: Space) -> dict[str, dict[str, str]]:
    """Return the fields in which the points differ: name -> point label -> value.

    Fields that always change together (K of Train and of Boost) are merged.
    """
    fields = dict.fromkeys(field for point in space.points for field in point.overrides)
    found: dict[tuple[str, ...], str] = {}
    for field in fields:
        values = tuple(_text(point.overrides.get(field)) for point in space.points)
        if len(set(values)) > 1:
            found.setdefault(values, SYMBOLS.get(field, field))
    labels = [point.label for point in space.points]
    return {name: dict(zip(labels, values, strict=True)) for values, name in found.items()}


def _text(value: object) -> str:
    if value is None:
        return "recipe's"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _lines(axes: Axes, panel: _Panel) -> None:
    """Draw a line with markers and error bars per series, over evenly spaced labels."""
    for hollow, group in ((False, panel.ours), (True, panel.paper)):
        for number, series in enumerate(group):
            # Shifted sideways: the error bars of close values would overlap.
            shift = 0.07 * (number - 1) + (0.21 if hollow and panel.ours else 0)
            there = [place for place, label in enumerate(panel.labels) if label in series]
            means, spreads = np.array([series[panel.labels[p]] for p in there]).reshape(-1, 2).T
            axes.errorbar(
                [place + shift for place in there],
                means,
                yerr=spreads if any(spreads) else None,
                color=_COLORS[number],
                marker=_MARKERS[number],
                markerfacecolor="white" if hollow else _COLORS[number],
                linestyle=":" if hollow else "-",
                elinewidth=1.2,
            )
    axes.set_xticks(range(len(panel.labels)), panel.labels)
    axes.set_xlim(-0.4, len(panel.labels) - 0.6)


def _bars(axes: Axes, panel: _Panel) -> None:
    """Draw bars side by side with their values; the paper's values as hollow markers."""
    everything = [value for series in (*panel.ours, *panel.paper) for value in series.values()]
    floor = _floor(everything) if panel.ours else min(everything)[0]
    top = max((mean + spread for mean, spread in everything), default=1.0)
    width = 0.8 / len(_MARKERS)
    for number, series in enumerate(panel.ours):
        for label, (mean, spread) in series.items():
            at = panel.labels.index(label) + (number - 1) * width
            color = _COLORS[number]
            axes.bar(at, mean - floor, 0.9 * width, floor, color=color, yerr=spread or None)
            _write(axes, mean, at, floor)  # at the foot of the bar, which is free
    for number, series in enumerate(panel.paper):
        for label, (mean, _) in series.items():
            at = panel.labels.index(label) + (number - 1) * width
            axes.plot(at, mean, _MARKERS[number], color="0.15", markerfacecolor="white")
            if not panel.ours:
                _write(axes, mean, at, mean)
    axes.set_xticks(range(len(panel.labels)), _broken(panel.labels))
    axes.set_xlim(-0.6, len(panel.labels) - 0.4)
    room = 0.25 * (top - floor)  # space for the numbers
    axes.set_ylim(floor if panel.ours else floor - room, top + room)
    axes.grid(visible=False, axis="x")
    if panel.ours and floor > 0:
        axes.set_ylabel(f"begins at {floor:g}")


def _write(axes: Axes, value: float, x: float, y: float) -> None:
    """Write the value as vertical text, starting at (x, y)."""
    axes.annotate(
        f"{value:.3f}",
        (x, y),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        rotation=90,
        fontsize=8,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
    )


def _floor(everything: Sequence[tuple[float, float]]) -> float:
    """Return where bars begin: 0, or higher if their differences would be too small to see."""
    if not everything:
        return 0.0
    lowest = min(mean - spread for mean, spread in everything)
    span = max(mean + spread for mean, spread in everything) - lowest
    if lowest <= 0 or span > 0.3 * lowest:
        return 0.0
    step = 0.05 if span > 0.05 else 0.01
    return round(step * float(np.floor((lowest - 0.5 * span) / step)), 2)


def _broken(labels: Sequence[str]) -> list[str]:
    """Wrap long labels, so that neighbours on the axis do not touch."""
    letters = max(8, 42 // len(labels))
    return [
        textwrap.fill(label, letters, break_long_words=False, break_on_hyphens=False)
        for label in labels
    ]


# ----------------------------------------------------------------------------------------- epochs


def _draw_curves(
    figure: Figure, space: Space, rows: Sequence[Row], metrics: Sequence[str], curves: Curves
) -> list[Line2D]:
    """Draw a panel per metric over the epochs of Train and Boost; return the legend handles."""
    name = next(iter(paper_sets(space, rows)), None)
    own = name if tuple(metrics) == ORACLE and name is not None and _is_of(rows, name) else None
    for place, axes in enumerate(_subplots(figure, len(metrics))):
        for number, point in enumerate(space.points):
            color, dashes = _COLORS[number % 4], _DASHES[number % 4]
            seeds = list(curves.get(point.label, {}).values())
            epochs, means, spreads = _over_epochs(seeds, metrics[place])
            axes.plot(epochs, means, color=color, linestyle=dashes)
            axes.fill_between(
                epochs, means - spreads, means + spreads, color=color, alpha=0.2, linewidth=0
            )
            train = max((_length(lines, "train") for lines in seeds), default=0)
            if any(_length(lines, "boost") for lines in seeds):
                axes.axvline(train + 0.5, color="0.5", linewidth=1, linestyle=":")
            printed = _printed(space, own, space.stages[-1])
            if printed and point.label in printed[place] and len(epochs):
                mean, _ = printed[place][point.label]
                axes.plot(epochs[-1], mean, "o", color=color, markerfacecolor="white")
        axes.set_xlabel("epoch of Train and Boost")
        axes.set_title(METRIC_NAMES[metrics[place]], fontsize=10)
    handles = [
        Line2D([], [], color=_COLORS[n % 4], linestyle=_DASHES[n % 4], label=point.label)
        for n, point in enumerate(space.points)
    ]
    handles.append(Line2D([], [], color="0.5", linewidth=1, linestyle=":", label="Boost begins"))
    return [*handles, _key(None, f"paper, {own}")] if own else handles


def _length(lines: Sequence[Mapping[str, Any]], stage: str) -> int:
    return max((line["epoch"] + 1 for line in lines if line["stage"] == stage), default=0)


def _over_epochs(
    seeds: Sequence[Sequence[Mapping[str, Any]]], metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return epochs, counted from 1 through Train and Boost, with mean and spread over seeds."""
    found: dict[int, dict[int, float]] = {}
    for seed, lines in enumerate(seeds):
        before = {"train": 0, "boost": _length(lines, "train")}
        for line in lines:
            if line["stage"] in before and line.get(metric) is not None:
                epoch = before[line["stage"]] + line["epoch"] + 1
                found.setdefault(epoch, {})[seed] = line[metric]
    epochs = sorted(found)
    pairs = np.array([_mean_spread(list(found[epoch].values())) for epoch in epochs])
    return np.array(epochs), *pairs.reshape(-1, 2).T
