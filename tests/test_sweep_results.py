from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tune_spaces
from snscc_ray import recipes
from snscc_ray import sweep_results as sr
from tune_spaces.space import Claim, Point, Space

CLAIM = Claim("5", "train", "ε = 5 is the best of 2, 5 and 10", "Fig. 9")
ACC = "oracle/acc"
T_2, T_3 = 12.706204736, 4.302652730  # 97.5 % quantiles of Student's t, 1 and 2 degrees


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


# ----------------------------------------------------------------------------------------- claims


def test_a_claim_that_holds() -> None:
    # Paired differences to 10: .10, .12, .14; to 2: .30 each. The spread of the seeds is far
    # larger and does not matter.
    rows = trials({"2": [0.2, 0.4, 0.6], "5": [0.5, 0.7, 0.9], "10": [0.4, 0.58, 0.76]})
    verdict = sr.judge(CLAIM, rows, ACC)
    assert verdict.outcome == "holds" and verdict.rival == "10" and verdict.seeds == 3
    assert verdict.difference == pytest.approx(0.12)
    assert verdict.interval == pytest.approx(T_3 * 0.02 / math.sqrt(3))
    assert verdict.text == (
        "ε = 5 is the best of 2, 5 and 10 (Fig. 9): holds here: 5 is better than 10 by "
        "0.120 ± 0.050 (ACC after Train, 3 seeds)"
    )


def test_a_claim_that_does_not_hold() -> None:
    verdict = sr.judge(CLAIM, trials({"5": [0.5, 0.6], "2": [0.1, 0.1], "10": [0.6, 0.702]}), ACC)
    assert verdict.outcome == "does not hold" and verdict.rival == "10"
    assert verdict.difference == pytest.approx(-0.101)
    # Two differences d apart: their deviation over √2 is d / 2.
    assert verdict.interval == pytest.approx(T_2 * 0.002 / 2, rel=1e-6)
    assert "does not hold here: 10 is better than 5 by 0.101 ± 0.013" in verdict.text


def test_a_claim_that_cannot_be_told() -> None:
    wide = sr.judge(CLAIM, trials({"5": [0.5, 0.9], "10": [0.6, 0.2]}), ACC)
    assert wide.outcome == "cannot be told"
    assert "cannot be told here: 5 is better than 10 by 0.300 ± 5.082" in wide.text
    level = sr.judge(CLAIM, trials({"5": [0.5, 0.6], "10": [0.5, 0.6]}), ACC)
    assert level.outcome == "cannot be told" and "5 and 10 differ by 0.000 ± 0.000" in level.text


def test_one_seed_gives_no_interval() -> None:
    verdict = sr.judge(CLAIM, trials({"5": [0.9], "10": [0.2]}), ACC)
    assert (verdict.outcome, verdict.interval) == ("cannot be told", None)
    assert "one seed, which gives no interval" in verdict.text
    # Two trials each, and one seed in common.
    shifted = trials({"5": [0.9, 0.9, None], "10": [None, 0.2, 0.2]})
    assert sr.judge(CLAIM, shifted, ACC).seeds == 1


def test_failures_are_said_and_do_not_pass_for_agreement() -> None:
    rows = trials({"5": [0.9, 0.9, 0.9], "10": [0.2, 0.3, None], "2": [None, None, None]})
    verdict = sr.judge(CLAIM, rows, ACC)
    assert verdict.outcome == "cannot be told" and verdict.seeds == 2
    assert "nothing is known of 2" in verdict.text
    assert "4 of 9 trials failed, were stopped early or are missing" in verdict.text
    # What is known suffices to refuse it.
    worse = trials({"5": [0.1, 0.1], "10": [0.9, 0.9], "2": [None, None]})
    assert sr.judge(CLAIM, worse, ACC).outcome == "does not hold"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no trial of 5 has ACC after Train"),
        (trials({"5": [None], "10": [0.5]}), "no trial of 5 has ACC after Train"),
        (trials({"5": [0.5], "10": [None]}), "no other point has ACC after Train"),
        (trials({"5": [0.5], "10": [0.5]}), "no trial of 5 has health/none after Train"),
    ],
)
def test_a_claim_with_nothing_to_go_by(rows: list[dict[str, Any]], says: str) -> None:
    metric = "health/none" if "none" in says else ACC
    verdict = sr.judge(CLAIM, rows, metric)
    assert verdict.outcome == "cannot be told" and says in verdict.text
    assert "\n" not in verdict.text


# ------------------------------------------------------------------------------ the best, and trust


def test_the_best_setting_is_chosen_without_labels() -> None:
    rows = trials({"2": [0.7, 0.8], "5": [0.5, 0.5], "10": [0.99, None]})
    for trial in rows:
        if trial["point"] == "5":
            trial["train/health/score"] = 0.95  # the labels say otherwise
    best = sr.best_setting(rows)
    assert best is not None
    assert (best.label, best.seeds, best.left_out) == ("5", 2, ("10",))
    assert best.mean == pytest.approx(0.95) and best.interval == pytest.approx(0)
    oracle = sr.best_setting(rows, ACC)
    assert oracle is not None and oracle.label == "2"
    assert oracle.interval == pytest.approx(T_2 * 0.05)
    single = sr.best_setting(trials({"2": [0.7], "5": [0.8]}), ACC)
    assert single is not None and (single.label, single.interval) == ("5", None)
    assert sr.best_setting(trials({"2": [None]})) is None
    assert sr.best_setting([]) is None


def test_the_rank_correlation_by_hand() -> None:
    rows = trials({"a": [0.1, 0.1], "b": [0.2, 0.2], "c": [0.3, 0.3], "d": [0.4, None]})
    scores = {("a", 0): 1, ("b", 0): 2, ("c", 0): 4, ("d", 0): 3,
              ("a", 1): 3, ("b", 1): 2, ("c", 1): 1}  # fmt: skip
    for trial in rows:
        if trial["status"] == "finished":
            trial["train/health/score"] = scores[trial["point"], trial["seed"]]
    found = sr.rank_correlation(rows, "health/score")
    # 1 - 6 Σd² / (n (n² - 1)): one swap of neighbours among four, and three reversed.
    assert found.per_seed == {0: pytest.approx(0.8), 1: pytest.approx(-1)}
    assert found.trials == 7
    # Pooled: Pearson's correlation of the ranks, ties sharing theirs (their mean is 4).
    truth = [1.5, 1.5, 3.5, 3.5, 5.5, 5.5, 7]
    score = [1.5, 5.5, 3.5, 3.5, 7, 1.5, 5.5]
    top = sum((a - 4) * (b - 4) for a, b in zip(truth, score, strict=True))
    below = math.sqrt(sum((a - 4) ** 2 for a in truth) * sum((b - 4) ** 2 for b in score))
    assert found.pooled == pytest.approx(top / below)


def test_no_correlation_where_there_is_none_to_tell() -> None:
    two = sr.rank_correlation(trials({"a": [0.1], "b": [0.2]}), "health/score")
    assert (two.per_seed, two.pooled, two.trials) == ({0: None}, None, 2)
    level = sr.rank_correlation(trials({"a": [0.1], "b": [0.1], "c": [0.1]}), "health/score")
    assert level.pooled is None
    assert sr.rank_correlation([], "health/score").trials == 0
