from __future__ import annotations

import math
from typing import Any

import pytest

from snscc_ray.sweep import verdicts as sv
from tests.test_sweep_results import ACC, trials
from tune_spaces.space import Claim

CLAIM = Claim("5", "train", "ε = 5 is the best of 2, 5 and 10", "Fig. 9")
T_2, T_3 = 12.706204736, 4.302652730  # 97.5 % quantiles of Student's t, 1 and 2 degrees


def test_a_claim_that_holds() -> None:
    # Paired differences to 10: .10, .12, .14; to 2: .30 each. The spread of the seeds is far
    # larger and does not matter.
    rows = trials({"2": [0.2, 0.4, 0.6], "5": [0.5, 0.7, 0.9], "10": [0.4, 0.58, 0.76]})
    verdict = sv.judge(CLAIM, rows, ACC)
    assert verdict.outcome == "holds" and verdict.rival == "10" and verdict.seeds == 3
    assert verdict.difference == pytest.approx(0.12)
    assert verdict.interval == pytest.approx(T_3 * 0.02 / math.sqrt(3))
    assert verdict.text == (
        "ε = 5 is the best of 2, 5 and 10 (Fig. 9): holds here: 5 is better than 10 by "
        "0.120 ± 0.050 (ACC after Train, 3 seeds)"
    )


def test_a_claim_that_does_not_hold() -> None:
    verdict = sv.judge(CLAIM, trials({"5": [0.5, 0.6], "2": [0.1, 0.1], "10": [0.6, 0.702]}), ACC)
    assert verdict.outcome == "does not hold" and verdict.rival == "10"
    assert verdict.difference == pytest.approx(-0.101)
    # Two differences d apart: their deviation over √2 is d / 2.
    assert verdict.interval == pytest.approx(T_2 * 0.002 / 2, rel=1e-6)
    assert "does not hold here: 10 is better than 5 by 0.101 ± 0.013" in verdict.text


def test_a_claim_that_cannot_be_told() -> None:
    wide = sv.judge(CLAIM, trials({"5": [0.5, 0.9], "10": [0.6, 0.2]}), ACC)
    assert wide.outcome == "cannot be told"
    assert "cannot be told here: 5 is better than 10 by 0.300 ± 5.082" in wide.text
    level = sv.judge(CLAIM, trials({"5": [0.5, 0.6], "10": [0.5, 0.6]}), ACC)
    assert level.outcome == "cannot be told" and "5 and 10 differ by 0.000 ± 0.000" in level.text


def test_one_seed_gives_no_interval() -> None:
    verdict = sv.judge(CLAIM, trials({"5": [0.9], "10": [0.2]}), ACC)
    assert (verdict.outcome, verdict.interval) == ("cannot be told", None)
    assert "one seed, which gives no interval" in verdict.text
    # Two trials each, and one seed in common.
    shifted = trials({"5": [0.9, 0.9, None], "10": [None, 0.2, 0.2]})
    assert sv.judge(CLAIM, shifted, ACC).seeds == 1


def test_failures_are_said_and_do_not_pass_for_agreement() -> None:
    rows = trials({"5": [0.9, 0.9, 0.9], "10": [0.2, 0.3, None], "2": [None, None, None]})
    verdict = sv.judge(CLAIM, rows, ACC)
    assert verdict.outcome == "cannot be told" and verdict.seeds == 2
    assert "no results for 2" in verdict.text
    assert "4 of 9 trials failed, were stopped early or are missing" in verdict.text
    # What is known suffices to refuse it.
    worse = trials({"5": [0.1, 0.1], "10": [0.9, 0.9], "2": [None, None]})
    assert sv.judge(CLAIM, worse, ACC).outcome == "does not hold"


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
    verdict = sv.judge(CLAIM, rows, metric)
    assert verdict.outcome == "cannot be told" and says in verdict.text
    assert "\n" not in verdict.text


# ------------------------------------------------------------------------------ the best, and trust


def test_the_best_setting_is_chosen_without_labels() -> None:
    rows = trials({"2": [0.7, 0.8], "5": [0.5, 0.5], "10": [0.99, None]})
    for trial in rows:
        if trial["point"] == "5":
            trial["train/health/score"] = 0.95  # the labels say otherwise
    best = sv.best_setting(rows)
    assert best is not None
    assert (best.label, best.seeds, best.left_out) == ("5", 2, ("10",))
    assert best.mean == pytest.approx(0.95) and best.interval == pytest.approx(0)
    oracle = sv.best_setting(rows, ACC)
    assert oracle is not None and oracle.label == "2"
    assert oracle.interval == pytest.approx(T_2 * 0.05)
    single = sv.best_setting(trials({"2": [0.7], "5": [0.8]}), ACC)
    assert single is not None and (single.label, single.interval) == ("5", None)
    assert sv.best_setting(trials({"2": [None]})) is None
    assert sv.best_setting([]) is None


def test_the_rank_correlation_by_hand() -> None:
    rows = trials({"a": [0.1, 0.1], "b": [0.2, 0.2], "c": [0.3, 0.3], "d": [0.4, None]})
    scores = {("a", 0): 1, ("b", 0): 2, ("c", 0): 4, ("d", 0): 3,
              ("a", 1): 3, ("b", 1): 2, ("c", 1): 1}  # fmt: skip
    for trial in rows:
        if trial["status"] == "finished":
            trial["train/health/score"] = scores[trial["point"], trial["seed"]]
    found = sv.rank_correlation(rows, "health/score")
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
    two = sv.rank_correlation(trials({"a": [0.1], "b": [0.2]}), "health/score")
    assert (two.per_seed, two.pooled, two.trials) == ({0: None}, None, 2)
    level = sv.rank_correlation(trials({"a": [0.1], "b": [0.1], "c": [0.1]}), "health/score")
    assert level.pooled is None
    assert sv.rank_correlation([], "health/score").trials == 0
