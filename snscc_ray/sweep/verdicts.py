"""Evaluate the trials of a sweep: the paper's claims, the best setting, and the metric itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from snscc_ray.config.settings import StageName
from snscc_ray.sweep.results import (
    METRIC_NAMES,
    STAGE_NAMES,
    Row,
    by_seed,
    figure,
    labels_of,
    seeds_of,
)
from tune_spaces.space import Claim

_CONFIDENCE = 0.95  # of every interval


@dataclass(frozen=True)
class Verdict:
    """The outcome for a claim; `text` is one line."""

    outcome: Literal["holds", "does not hold", "cannot be told"]
    text: str
    rival: str | None = None  # the best of the other points
    difference: float | None = None  # claimed best minus rival, mean over seeds
    interval: float | None = None  # half of its 95 % interval; None with fewer than two seeds
    seeds: int = 0  # for which both points have a figure


def judge(claim: Claim, rows: Sequence[Row], metric: str) -> Verdict:
    """Judge whether the claimed point is best, by its paired differences over seeds to the rival.

    The rival is the other point that does best against it, by the mean difference over the seeds
    that both have. The claim holds if the 95 % t-interval lies above 0, fails if it lies below,
    and cannot be told otherwise. It cannot hold while some other point has no figure at all. The
    interval is for this pair alone: it is not widened for choosing the rival among several.
    """
    best = by_seed(rows, claim.best, claim.stage, metric)
    differences: dict[str, list[float]] = {}
    for label in labels_of(rows):
        other = by_seed(rows, label, claim.stage, metric)
        both = sorted(best.keys() & other.keys())
        if label != claim.best:
            differences[label] = [best[seed] - other[seed] for seed in both]
    compared = {label: paired for label, paired in differences.items() if paired}
    after = f"{_metric_name(metric)} after {STAGE_NAMES[claim.stage]}"
    unheard = [label for label in differences if label not in compared]
    head = f"{claim.text} ({claim.where})"
    tail = _uncounted(claim, rows, metric)
    if not compared:
        why = f"no trial of {claim.best} has {after}"
        if best:
            why = f"no other point has {after} for a seed of {claim.best}"
        return Verdict("cannot be told", f"{head}: cannot be told here: {why}{tail}")
    rival = min(compared, key=lambda label: float(np.mean(compared[label])))
    paired = compared[rival]
    difference, half = mean_interval(paired)
    outcome: Literal["holds", "does not hold", "cannot be told"] = "cannot be told"
    if half is not None and difference > half and not unheard:
        outcome = "holds"
    elif half is not None and difference < -half:
        outcome = "does not hold"
    spread = f" ± {half:.3f}" if half is not None else ""
    how = f"{len(paired)} seeds" if half is not None else "one seed, which gives no interval"
    better, worse = (claim.best, rival) if difference >= 0 else (rival, claim.best)
    said = f"{better} is better than {worse} by {abs(difference):.3f}"
    if said.endswith("0.000"):
        said = f"{claim.best} and {rival} differ by 0.000"
    detail = f"{said}{spread} ({after}, {how})"
    if unheard:
        detail += f"; no results for {', '.join(unheard)}"
    text = f"{head}: {outcome} here: {detail}{tail}"
    return Verdict(outcome, text, rival, difference, half, len(paired))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half its 95 % t-interval, which is None with fewer than two values."""
    mean, number = float(np.mean(values)), len(values)
    if number < 2:
        return mean, None
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, number - 1))
    return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(number)


def _metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)


def _uncounted(claim: Claim, rows: Sequence[Row], metric: str) -> str:
    labels, seeds = labels_of(rows), seeds_of(rows)
    wanted = len(labels) * len(seeds)
    have = sum(len(by_seed(rows, label, claim.stage, metric)) for label in labels)
    if have == wanted:
        return ""
    return f"; {wanted - have} of {wanted} trials failed, were stopped early or are missing"


# ----------------------------------------------------------------------------- the best, and trust


@dataclass(frozen=True)
class Best:
    """The point with the highest mean."""

    label: str
    mean: float
    interval: float | None  # half of the 95 % interval; None with fewer than two seeds
    seeds: int
    left_out: tuple[str, ...]  # points with figures for fewer seeds, or none


def best_setting(
    rows: Sequence[Row], metric: str = "health/score", stage: StageName = "boost"
) -> Best | None:
    """Return the point with the highest mean of a metric after a stage; None if no trial has it.

    Only points with figures for the most seeds compete: a single lucky seed would win too easily.
    The first of equal points is taken.
    """
    found = {label: by_seed(rows, label, stage, metric) for label in labels_of(rows)}
    most = max((len(of) for of in found.values()), default=0)
    if not most:
        return None
    full = {label: list(of.values()) for label, of in found.items() if len(of) == most}
    label = max(full, key=lambda name: float(np.mean(full[name])))
    mean, half = mean_interval(full[label])
    return Best(label, mean, half, most, tuple(name for name in found if name not in full))


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ; None if undefined: fewer than three trials, or a constant."""

    per_seed: dict[int, float | None]
    pooled: float | None
    trials: int


def rank_correlation(
    rows: Sequence[Row], metric: str, truth: str = "oracle/acc", stage: StageName = "boost"
) -> RankCorrelation:
    """Measure how well a label-free metric orders the trials as the truth does."""
    pairs = [(row["seed"], figure(row, stage, metric), figure(row, stage, truth)) for row in rows]
    known = [(seed, a, b) for seed, a, b in pairs if a is not None and b is not None]
    per_seed = {
        seed: _spearman([(a, b) for of, a, b in known if of == seed]) for seed in seeds_of(rows)
    }
    return RankCorrelation(per_seed, _spearman([(a, b) for _, a, b in known]), len(known))


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    first, second = zip(*pairs, strict=True)
    return float(stats.spearmanr(first, second).statistic)
