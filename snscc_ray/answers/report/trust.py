"""Judge whether a run can be trusted: label-free figures as sentences and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from snscc_ray.core.clustering.imbalance import enough_entropy, forced_warning

# Warnings that a figure of the finished run also covers.
TOLD_BY_FIGURES = ("forced-balance", "boost-worse")

Level = Literal["good", "note", "caution", "bad"]

# Thresholds between good, caution and bad, from experience with runs of this tool, not theory.
_AGREE_GOOD, _AGREE_BAD = 0.8, 0.5
_EVEN_GOOD, _EVEN_BAD = 0.8, 0.4
_SURE_GOOD, _SURE_BAD = 0.5, 0.1
_ABOVE_CHANCE_BAD = 0.2
# As in `metrics`: networks that learn stayed above .4; below .05 they have collapsed.
_SPREAD_GOOD, _SPREAD_BAD = 0.4, 0.05


@dataclass(frozen=True)
class Sentence:
    """One finding: what a figure says, and what to do about it ("" for nothing)."""

    level: Level
    text: str
    todo: str
    figure: str
    value: float | None


@dataclass(frozen=True)
class Trust:
    verdict: Literal["likely good", "mixed", "doubtful"]
    summary: str
    sentences: tuple[Sentence, ...]


_SUMMARIES = {
    "likely good": "No metric gives a warning. None of them knows which kinds you have in mind, "
    "and confidence is not accuracy: look at the random and the least sure images of each cluster.",
    "mixed": "Some metrics are good, and some give a warning. "
    "Look at the images of each cluster before you rely on it.",
    "doubtful": "At least one metric says that these clusters are not useful. "
    "Follow the advice below and run again before you rely on them.",
}


def judge(
    figures: Mapping[str, float],
    num_clusters: int,
    warnings: Sequence[str] = (),
    *,
    max_imbalance: float = 1.0,
) -> Trust:
    """Judge the label-free figures of a run's last stage.

    figures: `health/...` by name; missing figures are not mentioned.
    warnings: those given during training; each is listed, but none changes the verdict, because
    its cause may have passed.
    max_imbalance: how uneven the clusters were allowed to be.
    """
    sentences = (
        *_in_use(figures, num_clusters),
        *_agreement(figures, num_clusters),
        *_balance(figures, num_clusters, max_imbalance),
        *_forced(figures),
        *_confidence(figures, num_clusters),
        *_training(figures),
        *(
            Sentence("note", f"Warning during training: {text}.", "", "warning", None)
            for text in warnings
        ),
    )
    levels = {sentence.level for sentence in sentences}
    verdict: Literal["likely good", "mixed", "doubtful"] = "likely good"
    if "bad" in levels:
        verdict = "doubtful"
    elif "caution" in levels:
        verdict = "mixed"
    return Trust(verdict, _SUMMARIES[verdict], sentences)


def _collapsed(figures: Mapping[str, float], num_clusters: int) -> bool:
    return figures.get("health/clusters_in_use", num_clusters) * 2 < num_clusters


def _in_use(figures: Mapping[str, float], num_clusters: int) -> Iterator[Sentence]:
    name = "health/clusters_in_use"
    if name not in figures:
        return
    used = int(figures[name])
    if _collapsed(figures, num_clusters):
        text = f"Only {used} of the {num_clusters} clusters are in use: the others collapsed."
        todo = "Raise train.entropy_weight and run again, or ask for fewer clusters."
        yield Sentence("bad", text, todo, name, used)
    elif used < num_clusters:
        text = f"{used} of the {num_clusters} clusters are in use; the others are almost empty."
        todo = f"If the clusters look right, ask for {used} clusters next time."
        yield Sentence("caution", text, todo, name, used)
    else:
        yield Sentence("good", f"All {num_clusters} clusters are in use.", "", name, used)


def _agreement(figures: Mapping[str, float], num_clusters: int) -> Iterator[Sentence]:
    name = "health/neighbor_agreement"
    if name not in figures:
        return
    value = figures[name]
    text = f"{_percent(value)} of the images that look most alike share a cluster"
    if _collapsed(figures, num_clusters):
        text += ", which means nothing here: almost all images are in the same few clusters."
        yield Sentence("note", text, "", name, value)
    elif value >= _AGREE_GOOD:
        yield Sentence("good", f"{text}: clusters keep look-alikes together.", "", name, value)
    else:
        bad = value < _AGREE_BAD
        text += (
            ": clusters split groups of look-alikes."
            if bad
            else ": most look-alikes stay together, but some groups are split."
        )
        todo = (
            "Train longer (pretrain.epochs above all), use a larger encoder, or try another "
            "number of clusters."
        )
        yield Sentence("bad" if bad else "caution", text, todo, name, value)


def _balance(
    figures: Mapping[str, float], num_clusters: int, max_imbalance: float
) -> Iterator[Sentence]:
    name = "health/balance"
    if name not in figures:
        return
    value = figures[name]
    equal = math.exp(value * math.log(num_clusters))
    # As in health/score: imbalance that the settings allow does not count against a run.
    of_allowed = value * math.log(num_clusters) / enough_entropy(num_clusters, max_imbalance)
    if of_allowed >= _EVEN_GOOD:
        kind = "of similar sizes" if max_imbalance == 1 else "no more uneven than allowed"
        text = f"The clusters are {kind} (like {equal:.1f} clusters of equal size)."
        yield Sentence("good", text, "", name, value)
        return
    text = f"Sizes are very uneven (like only {equal:.1f} clusters of equal size)."
    todo = (
        "This is right if some kinds of image are rare in your dataset; otherwise raise "
        "train.entropy_weight."
    )
    yield Sentence("bad" if of_allowed < _EVEN_BAD else "caution", text, todo, name, value)


def _forced(figures: Mapping[str, float]) -> Iterator[Sentence]:
    name = "health/forced_balance"
    value = figures.get(name)
    if value is None:
        return
    if forced_warning(value) is None:
        text = (
            "The cluster sizes fit the images: nothing suggests that they were forced to be even."
        )
        yield Sentence("good", text, "", name, value)
        return
    text = (
        "The cluster sizes are more even than the images suggest: large groups may be split and "
        "small ones merged."
    )
    todo = (
        "If some kinds are much more frequent than others, run again with "
        "--max-cluster-imbalance 10 (`snscc fit`) or train.max_imbalance=10 (`snscc run`)."
    )
    yield Sentence("caution", text, todo, name, value)


def _confidence(figures: Mapping[str, float], num_clusters: int) -> Iterator[Sentence]:
    name, mean = "health/confident_share", figures.get("health/confidence")
    if mean is not None and (mean - 1 / num_clusters) / (1 - 1 / num_clusters) < _ABOVE_CHANCE_BAD:
        text = (
            f"The mean confidence is {_percent(mean)}, where guessing would give "
            f"{_percent(1 / num_clusters)}: the network hardly tells the clusters apart."
        )
        todo = "Train longer: train.epochs, and pretrain.epochs before it."
        yield Sentence("bad", text, todo, "health/confidence", mean)
    if name not in figures:
        return
    value = figures[name]
    text = f"{_percent(value)} of the images are in their cluster with 99% confidence or more"
    if value >= _SURE_GOOD:
        yield Sentence("good", f"{text}.", "", name, value)
        return
    # Clusters that keep look-alikes together may be right even if the network is not confident.
    together = figures.get("health/neighbor_agreement", 0) >= _AGREE_GOOD and _spread_enough(
        figures
    )
    bad = value < _SURE_BAD and not together
    text += ": almost no answer is confident." if bad else ": most answers are less confident."
    todo = (
        "Train longer (train.epochs, boost.epochs). Until then, use only the rows of "
        "assignments.parquet with a high confidence."
    )
    yield Sentence("bad" if bad else "caution", text, todo, name, value)


def _training(figures: Mapping[str, float]) -> Iterator[Sentence]:
    if not _spread_enough(figures):
        spread = figures["health/projection_spread"]
        if bad := spread < _SPREAD_BAD:
            text = "Pretrain ended with all images at almost one point: it cannot tell them apart."
            todo = "Lower pretrain.learning_rate, or use pretrain.method=simclr."
        else:
            text = "Pretrain hardly tells the images apart, so its look-alikes mean little."
            todo = "Train longer: pretrain.epochs."
        level: Level = "bad" if bad else "caution"
        yield Sentence(level, text, todo, "health/projection_spread", spread)
    selected = figures.get("health/selected_share", 1.0)
    if selected == 0:
        text = "Boost found no image confident enough to learn from, so it changed little."
        todo = "Lower boost.confidence_threshold, or train longer before Boost."
        yield Sentence("caution", text, todo, "health/selected_share", selected)
    if figures.get("health/restored"):
        text = "Boost made the label-free score worse, so the best earlier state was kept."
        todo = "Nothing needs to be done; a higher boost.confidence_threshold may help."
        yield Sentence("note", text, todo, "health/restored", 1.0)


def _spread_enough(figures: Mapping[str, float]) -> bool:
    return figures.get("health/projection_spread", 1.0) >= _SPREAD_GOOD


def _percent(share: float) -> str:
    """Format as whole percent; 0% and 100% only if exact."""
    if 0 < share < 0.01:
        return "under 1%"
    if 0.995 <= share < 1:
        return "over 99%"
    return f"{share:.0%}"
