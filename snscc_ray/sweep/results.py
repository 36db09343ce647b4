"""The results of a sweep as tables. All are functions of rows.

A row is one trial: `space`, `recipe`, `point` (its label), `seed`, `status` (finished, stopped or
failed), `reason`, `stopped_at` ("boost epoch 4"), the overridden fields by name, and the figures
of its stages: `train/oracle/acc`, `boost/seconds`. If a trial was stopped early in a stage, the
table keeps that stage's figures, but nothing else uses them.

A `metric` is a figure's name within its stage: `oracle/acc`, `health/score`. Larger is better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from snscc_ray.config.settings import STAGES, StageName
from snscc_ray.core import tables
from snscc_ray.core.storage import write_whole
from snscc_ray.texts import counted, in_markdown
from tune_spaces.paper import DATA_SETS
from tune_spaces.space import Figures, Space

Row = Mapping[str, Any]

ORACLE = ("oracle/acc", "oracle/nmi", "oracle/ari")  # in the order of `space.Figures`
HEALTH = ("health/score", "health/neighbor_agreement", "health/balance")
METRIC_NAMES = {
    "oracle/acc": "ACC",
    "oracle/nmi": "NMI",
    "oracle/ari": "ARI",
    "health/score": "score",
    "health/neighbor_agreement": "agreement",
    "health/balance": "balance",
}
STAGE_NAMES: dict[StageName, str] = {"pretrain": "Pretrain", "train": "Train", "boost": "Boost"}
_TRIAL = ("space", "recipe", "point", "seed", "status", "reason", "stopped_at")
_LISTED = 8  # most trials listed by name below a table


# ------------------------------------------------------------------------------ figures of trials


def figure(row: Row, stage: StageName, metric: str) -> float | None:
    """Return a trial's figure after a stage, or after its last one if a finished trial has fewer.

    Returns None if there is no such figure: not finished, not measured, or not a number.
    """
    if _stopped_in(row) == stage:
        return None
    if row.get("status") == "finished":
        reached = STAGES[: STAGES.index(stage) + 1]
        stage = next((s for s in reversed(reached) if _has_stage(row, s)), stage)
    value = row.get(f"{stage}/{metric}")
    return float(value) if value is not None and math.isfinite(value) else None


def _stopped_in(row: Row) -> str | None:
    stopped_at = row.get("stopped_at")
    return stopped_at.split()[0] if stopped_at else None


def _has_stage(row: Row, stage: str) -> bool:
    # A table read from disk has every column in every row; missing figures are None.
    return any(key.startswith(f"{stage}/") and value is not None for key, value in row.items())


def by_seed(rows: Iterable[Row], label: str, stage: StageName, metric: str) -> dict[int, float]:
    """Return the figures of one point by seed; seeds without one are left out."""
    found = {row["seed"]: figure(row, stage, metric) for row in rows if row["point"] == label}
    return {seed: value for seed, value in found.items() if value is not None}


def shown_metrics(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return ACC, NMI and ARI if any trial has labels, else the label-free figures."""
    keys = {key for row in rows for key, value in row.items() if value is not None}
    labelled = any(key.endswith(ORACLE[0]) for key in keys)
    return ORACLE if labelled else HEALTH


def paper_sets(space: Space, rows: Sequence[Row]) -> list[str]:
    """Return the paper's datasets to compare with: the recipe's own if printed, else all."""
    own = DATA_SETS.get(str(rows[0]["recipe"])) if rows else None
    return [own] if own is not None and own in space.paper else list(space.paper)


def labels_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["point"] for row in rows))


def seeds_of(rows: Iterable[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


# ------------------------------------------------------------------------------------ the table


def write_table(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write results.parquet and results.csv: a row per trial, with the columns of all trials.

    Columns: the trial first, then the overridden fields, then the figures stage by stage.
    """
    columns = sorted({key for row in rows for key in row} | set(_TRIAL), key=_place)
    table = pa.table({name: _column([row.get(name) for row in rows], name) for name in columns})
    parquet, csv = folder / "results.parquet", folder / "results.csv"
    tables.write_table(parquet, table)
    write_whole(csv, lambda file: pyarrow.csv.write_csv(table, file))
    return [parquet, csv]


def _place(column: str) -> tuple[int, int, str]:
    if column in _TRIAL:
        return 0, _TRIAL.index(column), column
    stage, slash, name = column.partition("/")
    if not slash or stage not in STAGES:
        return 1, 0, column
    groups = ("oracle", "health", "loss")
    group = name.partition("/")[0]
    return 2 + STAGES.index(stage), groups.index(group) if group in groups else 3, name


def _column(values: list[Any], name: str) -> pa.Array:
    """Make a column of one type: mixed ints and floats become floats, other mixtures JSON."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds and name in _TRIAL:
        return pa.array(values, pa.int64() if name == "seed" else pa.string())
    if kinds == {int, float}:
        return pa.array(values, pa.float64())
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        return pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.array(values)


# ---------------------------------------------------------------------------------- the Markdown


def markdown(space: Space, rows: Sequence[Row]) -> str:
    """Format as a table in the paper's form: a row per point, mean ± standard deviation over seeds.

    The paper's values are beside ours; failed, stopped and missing trials are listed below. Among
    the points with figures for the most seeds, the best of each column is bold.
    """
    metrics = shown_metrics(rows)
    columns = [(stage, metric) for stage in space.stages for metric in metrics]
    found = {
        column: {point.label: by_seed(rows, point.label, *column) for point in space.points}
        for column in columns
    }
    ours = {column: _formatted(found[column]) for column in columns}
    sets = paper_sets(space, rows) if metrics == ORACLE else []
    beside = [
        (name, stage, cells)
        for name in sets
        for stage, cells in space.paper[name].items()
        if len(cells) > 1
    ]
    head = [
        space.axis,
        "seeds",
        *(f"{STAGE_NAMES[stage]} {METRIC_NAMES[metric]}" for stage, metric in columns),
        *(f"{name}, {STAGE_NAMES[stage]} (paper)" for name, stage, _ in beside),
    ]
    lines = [
        f"**{space.title}** ({space.where})" if space.where else f"**{space.title}**",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    theirs = [_formatted_paper(cells) for _, _, cells in beside]
    for point in space.points:
        label = point.label
        counts = list(dict.fromkeys(len(found[stage, metrics[0]][label]) for stage in space.stages))
        if space.form == "grid" and counts == [0]:
            continue  # random search tries few points of a grid; their number is given below
        lines.append(
            _line(
                [
                    in_markdown(label),
                    " / ".join(map(str, counts)),
                    *(ours[column].get(label, "–") for column in columns),
                    *(cells.get(label, "–") for cells in theirs),
                ]
            )
        )
    said = [
        f"Mean ± standard deviation over {len(seeds_of(rows))} seeds."
        if len(seeds_of(rows)) > 1
        else "One seed: there is no spread to show.",
        "Paper's cells: ACC / NMI / ARI." if beside else "",
        *([] if metrics == ORACLE else ["Without labels: figures that need none."]),
        only_printed(space, sets),
        *shortfalls(space, rows),
    ]
    return "\n".join([*lines, "", *(f"- {text}" for text in said if text)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _formatted(found: Mapping[str, Mapping[int, float]]) -> dict[str, str]:
    """Format one column's cells by label; the best of those with the most seeds is bold."""
    means = {label: f"{np.mean(list(of.values())):.3f}" for label, of in found.items() if of}
    most = max((len(of) for of in found.values()), default=0)
    best = max((mean for label, mean in means.items() if len(found[label]) == most), default="")
    cells = {}
    for label, mean in means.items():
        values = list(found[label].values())
        text = f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean
        is_best = mean == best and len(values) == most and len(means) > 1
        cells[label] = f"**{text}**" if is_best else text
    return cells


def _formatted_paper(cells: Mapping[str, Figures]) -> dict[str, str]:
    """Format "ACC / NMI / ARI" by label, the best of each in bold; missing figures are omitted."""
    printed = [
        [value for value in column if value is not None]
        for column in zip(*cells.values(), strict=True)
    ]

    def show(figures: Figures) -> str:
        texts = []
        for value, others in zip(figures, printed, strict=True):
            if value is not None:
                is_best = value == max(others) and len(others) > 1
                texts.append(f"**{value:.3f}**" if is_best else f"{value:.3f}")
        return " / ".join(texts)

    return {label: show(figures) for label, figures in cells.items()}


def only_printed(space: Space, sets: Sequence[str]) -> str:
    """Describe the paper's value in words if it prints a single point, instead of a column."""
    found: dict[str, list[str]] = {}
    for name in sets:
        for stage, cells in space.paper[name].items():
            if len(cells) == 1:
                [(label, text)] = _formatted_paper(cells).items()
                found.setdefault(label, []).append(f"{name}, {STAGE_NAMES[stage]} {text}")
    return " ".join(
        f"The paper prints only {label} (ACC / NMI / ARI): {'; '.join(texts)}."
        for label, texts in found.items()
    )


def shortfalls(space: Space, rows: Sequence[Row]) -> list[str]:
    """List what failed, was stopped early, is missing or was never tried, in a sentence each."""
    labels = [point.label for point in space.points]
    tried = {(row["point"], row["seed"]) for row in rows}
    untried = [label for label in labels if all(label != point for point, _ in tried)]
    missing = [
        f"{in_markdown(label)}, seed {seed}"
        for label in labels
        for seed in seeds_of(rows)
        if label not in untried and (label, seed) not in tried
    ]
    failed = [_ended(row, "reason") for row in rows if row["status"] == "failed"]
    stopped = [_ended(row, "stopped_at") for row in rows if row["status"] == "stopped"]
    said = []
    if failed:
        said.append(f"{counted(len(failed), 'trial')} failed: {_listed(failed)}.")
    if stopped:
        said.append(
            f"{counted(len(stopped), 'trial')} stopped early, not counted in that stage: "
            f"{_listed(stopped)}."
        )
    if missing:
        said.append(f"{counted(len(missing), 'trial')} missing: {_listed(missing)}.")
    if untried:
        # Random search skips most of a grid: a long list of names would not help.
        names = (
            f": {_listed([in_markdown(label) for label in untried])}"
            if len(untried) <= _LISTED
            else ""
        )
        said.append(f"{len(untried)} of {len(labels)} points not tried{names}.")
    return said


def _ended(row: Row, why: str) -> str:
    text = f"{in_markdown(row['point'])}, seed {row['seed']}"
    return f"{text} ({in_markdown(str(row[why]))})" if row.get(why) else text


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _LISTED
    return "; ".join(texts[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
