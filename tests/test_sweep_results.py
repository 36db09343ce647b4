from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import tune_spaces
from snscc_ray.config import recipes
from snscc_ray.sweep import results as sr
from tune_spaces.space import Point, Space

ACC = "oracle/acc"


def row(point: str, seed: int, acc: float | None = None, **more: Any) -> dict[str, Any]:
    """A trial whose NMI, ARI and score are .1, .2 and .3 below its ACC after Train."""
    figures: dict[str, Any] = {}
    if acc is not None:
        figures = {
            "train/oracle/acc": acc,
            "train/oracle/nmi": acc - 0.1,
            "train/oracle/ari": acc - 0.2,
            "train/health/score": acc - 0.3,
            "train/seconds": 2.5,
        }
    start = {
        "space": "epsilon", "recipe": "digits", "point": point, "seed": seed,
        "status": "finished", "reason": None, "stopped_at": None,
    }  # fmt: skip
    return start | figures | {name.replace("__", "/"): value for name, value in more.items()}


def trials(figures: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """None: the trial failed."""
    return [
        row(point, seed, acc)
        if acc is not None
        else row(point, seed) | {"status": "failed", "reason": "train: nan-loss"}
        for point, accs in figures.items()
        for seed, acc in enumerate(accs)
    ]


def epsilon() -> Space:
    return tune_spaces.load("epsilon")(recipes.get("digits"))


# ---------------------------------------------------------------------------------------- figures


def test_figures_count_only_for_stages_that_were_finished() -> None:
    stopped = row("5", 0, 0.9, boost__oracle__acc=0.2) | {
        "status": "stopped", "stopped_at": "boost epoch 4",
    }  # fmt: skip
    stopped["boost/oracle/acc"] = 0.2
    assert sr.figure(stopped, "train", ACC) == 0.9
    assert sr.figure(stopped, "boost", ACC) is None
    failed = row("5", 0, 0.9) | {"status": "failed", "reason": "boost: killed"}
    assert sr.figure(failed, "train", ACC) == 0.9
    assert sr.figure(failed, "boost", ACC) is None


def test_a_point_with_fewer_stages_stands_with_its_last_figures() -> None:
    alone = row("Train alone", 0, 0.9)
    assert sr.figure(alone, "boost", ACC) == 0.9
    # Read back from a table, it has the columns of the others.
    assert sr.figure(alone | {"boost/oracle/acc": None}, "boost", ACC) == 0.9
    # Boost without labels is not Train's figure in disguise.
    assert sr.figure(alone | {"boost/health/score": 0.7}, "boost", ACC) is None


def test_nan_is_no_figure() -> None:
    assert sr.figure(row("5", 0, math.nan), "train", ACC) is None


# ------------------------------------------------------------------------------------------ table


def test_the_table_is_read_back_from_both_files(tmp_path: Path) -> None:
    rows = [
        row("5", 0, 0.25) | {"train.entropy_weight": 5, "boost/oracle/acc": 0.5},
        row("10", 1) | {
            "status": "failed", "reason": 'said "no",\nthen died', "train.entropy_weight": 2.5,
            "train.view.crop_scale": [0.5, 1.0], "pretrain/seconds": 1,
        },
    ]  # fmt: skip
    parquet, text = sr.write_table(rows, tmp_path / "new")
    table = pq.read_table(parquet)
    assert table.column_names == [
        "space", "recipe", "point", "seed", "status", "reason", "stopped_at",
        "train.entropy_weight", "train.view.crop_scale",
        "pretrain/seconds",
        "train/oracle/acc", "train/oracle/ari", "train/oracle/nmi", "train/health/score",
        "train/seconds",
        "boost/oracle/acc",
    ]  # fmt: skip
    first, second = table.to_pylist()
    assert {key: value for key, value in first.items() if value is not None} == {
        key: value for key, value in rows[0].items() if value is not None
    }
    assert second["reason"] == 'said "no",\nthen died'
    assert second["train.entropy_weight"] == 2.5
    assert json.loads(second["train.view.crop_scale"]) == [0.5, 1.0]
    with text.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == table.column_names
    assert [line["reason"] for line in lines] == ["", 'said "no",\nthen died']
    assert float(lines[0]["train/oracle/nmi"]) == 0.25 - 0.1
    assert lines[1]["boost/oracle/acc"] == ""


def test_the_order_of_the_columns_does_not_hang_on_the_rows(tmp_path: Path) -> None:
    one, two = row("5", 0, 0.5), row("2", 0, 0.5) | {"boost/health/score": 0.5, "a.b": True}
    names = []
    for order in ([one, two], [two, one]):
        parquet, _ = sr.write_table(order, tmp_path)
        names.append(pq.read_table(parquet).column_names)
    assert names[0] == names[1]


def test_a_table_of_nothing(tmp_path: Path) -> None:
    parquet, _ = sr.write_table([], tmp_path)
    assert pq.read_table(parquet).num_rows == 0


# --------------------------------------------------------------------------------------- Markdown


def cells(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_has_means_spreads_and_the_best_in_bold() -> None:
    text = sr.markdown(epsilon(), trials({"2": [0.7, 0.8], "5": [0.8, 0.9], "10": [0.6, 0.6]}))
    assert cells(text, "ε")[:5] == ["ε", "seeds", "Train ACC", "Train NMI", "Train ARI"]
    # The sample deviation of two values 0.1 apart is 0.1 / √2.
    assert cells(text, "2") == ["2", "2", "0.750 ± 0.071", "0.650 ± 0.071", "0.550 ± 0.071"]
    assert cells(text, "5")[2:] == [f"**{n:.3f} ± 0.071**" for n in (0.85, 0.75, 0.65)]
    assert cells(text, "10")[2] == "0.600 ± 0.000"
    assert "The paper prints only 5 (ACC / NMI / ARI): CIFAR-10, Train 0.842 / 0.743" in text
    assert "failed" not in text and "missing" not in text and "not tried" not in text


def test_markdown_of_one_seed_shows_no_spread() -> None:
    text = sr.markdown(epsilon(), trials({"2": [0.7], "5": [0.8], "10": [0.6]}))
    assert cells(text, "5")[2] == "**0.800**"
    assert "±" not in text and "One seed" in text


def test_markdown_says_what_is_not_there() -> None:
    rows = trials({"2": [0.7, None, 0.9], "5": [0.8, 0.8, 0.8]})
    rows[4] = rows[4] | {"status": "stopped", "stopped_at": "train epoch 3"}
    del rows[5]
    text = sr.markdown(epsilon(), rows)
    assert cells(text, "2")[1:3] == ["2", "**0.800 ± 0.141**"]
    assert cells(text, "5")[1:3] == ["1", "0.800"]  # as good, of fewer seeds
    assert cells(text, "10")[1:3] == ["0", "–"]
    assert "1 trial failed: 2, seed 1 (train: nan-loss)." in text
    assert "1 trial stopped early, not counted in that stage: 5, seed 1 (train epoch 3)." in text
    assert "1 trial missing: 5, seed 2." in text
    assert "1 of 3 points not tried: 10." in text


def test_markdown_takes_a_label_and_a_reason_as_they_stand() -> None:
    rows = trials({"2": [0.7, None]})
    rows = [one | {"point": "a|`b`<c>", "reason": "d|e\nf *g*"} for one in rows]
    space = replace(epsilon(), claims=(), points=(Point("a|`b`<c>", {}),))
    text = sr.markdown(space, rows)
    assert r"| a\|\`b\`\<c> | 1 |" in text
    assert r"a\|\`b\`\<c>, seed 1 (d\|e f \*g\*)." in text


def test_markdown_when_everything_failed_or_nothing_ran() -> None:
    everything = sr.markdown(epsilon(), trials({"2": [None], "5": [None], "10": [None]}))
    assert "3 trials failed" in everything and "**0" not in everything
    assert "3 of 3 points not tried" in sr.markdown(epsilon(), [])


def test_markdown_without_labels_shows_what_needs_none() -> None:
    rows = [
        {key: value for key, value in trial.items() if "oracle" not in key}
        for trial in trials({"2": [0.7], "5": [0.8], "10": [0.6]})
    ]
    text = sr.markdown(epsilon(), rows)
    assert cells(text, "ε")[2:] == ["Train score", "Train agreement", "Train balance"]
    assert cells(text, "5")[2:] == ["**0.500**", "–", "–"]
    assert "paper" not in text and "Without labels" in text


def test_the_papers_values_stand_beside_those_of_the_same_data_set() -> None:
    space = tune_spaces.load("gamma")(recipes.get("cifar20"))
    rows = [
        row(point.label, seed, 0.5) | {"recipe": "cifar20"}
        for point in space.points
        for seed in (0, 1)
    ]
    text = sr.markdown(space, rows)
    assert cells(text, "γ")[5:] == ["CIFAR-100, Boost (paper)"]
    assert cells(text, "0.9")[5:] == ["0.492 / 0.489 / 0.330"]
    assert cells(text, "0.99")[5:] == ["**0.508** / **0.502** / **0.347**"]
    four = sr.markdown(space, [trial | {"recipe": "digits"} for trial in rows])
    assert len(cells(four, "γ")) == 5 + 4
    two = tune_spaces.load("ablation-train")(recipes.get("digits"))  # its table has no ARI
    assert cells(sr.markdown(two, [row("local", 0, 0.5)]), "cluster")[-3:] == [
        "0.816 / 0.713", "0.420 / 0.452", "0.905 / 0.826",
    ]  # fmt: skip


def test_a_grid_lists_what_was_tried() -> None:
    space = tune_spaces.load("grid")(recipes.get("digits"))
    text = sr.markdown(space, [row(space.points[7].label, 0, 0.5)])
    assert sum(line.startswith("| ε ") for line in text.splitlines()) == 1
    assert "179 of 180 points not tried." in text
    failed = [row(point.label, 0) | {"status": "failed"} for point in space.points]
    assert "180 trials failed: ε 2, γ 0.9" in (told := sr.markdown(space, failed))
    assert "; and 172 more." in told


def test_a_label_cannot_break_the_table() -> None:
    space = Space("s", "t", (Point("a|b", {}),), "x", ("train",))
    assert "| a\\|b |" in sr.markdown(space, [row("a|b", 0, 0.5)])
