"""The paper's parameter studies (Section IV-E), one short function each. Copy one to make yours."""

from __future__ import annotations

from itertools import product

from snscc_ray.config.settings import Recipe
from tune_spaces.paper import TABLE_VI, default_point
from tune_spaces.space import Claim, Point, Space

EPSILONS = (2.0, 5.0, 10.0)
GAMMAS = (0.9, 0.95, 0.99)
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
NEIGHBORS = (1, 5, 10, 20)


def epsilon(recipe: Recipe) -> Space:
    """Fig. 9: the entropy weight ε of Train."""
    return Space(
        name="epsilon",
        title="Entropy weight",
        points=tuple(
            Point(f"{value:g}", {"train.entropy_weight": value}, last_stage="train")
            for value in EPSILONS
        ),
        axis="ε",
        stages=("train",),
        claims=(Claim("5", "train", "ε = 5 is the best of 2, 5 and 10", "Fig. 9, Section IV-E-1"),),
        paper=default_point("5", "train"),
        where="Fig. 9",
    )


def gamma(recipe: Recipe) -> Space:
    """Table VI: the confidence γ from which Boost uses a prediction as a pseudo-label."""
    return Space(
        name="gamma",
        title="Confidence threshold of the pseudo-labels",
        points=tuple(
            Point(f"{value:g}", {"boost.confidence_threshold": value}) for value in GAMMAS
        ),
        axis="γ",
        stages=("boost",),
        claims=(Claim("0.99", "boost", "γ = 0.99 is the best of 0.9, 0.95 and 0.99", "Table VI"),),
        paper={name: {"boost": figures} for name, figures in TABLE_VI.items()},
        where="Table VI",
    )


def sigma(recipe: Recipe) -> Space:
    """Fig. 10: the share σ of each cluster's confident rows that Boost learns from."""
    return Space(
        name="sigma",
        title="Share of the confident rows",
        points=tuple(Point(f"{value:g}", {"boost.top_fraction": value}) for value in SIGMAS),
        axis="σ",
        stages=("boost",),
        claims=(
            Claim(
                "0.7",
                "boost",
                "σ = 0.7 is the best of 0.1, 0.3, 0.5, 0.7 and 0.9",
                "Fig. 10, Section IV-E-2",
            ),
        ),
        paper=default_point("0.7", "boost"),
        where="Fig. 10",
    )


def neighbors(recipe: Recipe) -> Space:
    """Figs. 11 and 12: the number K of neighbours, in Train and in Boost.

    A recipe that mines fewer than 20 neighbours (pretrain.mined_neighbors) is refused, not changed.
    """
    return Space(
        name="neighbors",
        title="Number of neighbours",
        points=tuple(
            Point(f"{value}", {"train.num_neighbors": value, "boost.num_neighbors": value})
            for value in NEIGHBORS
        ),
        axis="K",
        stages=("train", "boost"),
        claims=tuple(
            Claim(
                "10",
                stage,
                f"K = 10 is the best of 1, 5, 10 and 20 in {stage.title()}",
                "Figs. 11 and 12, Section IV-E-3",
            )
            for stage in ("train", "boost")
        ),
        paper=default_point("10", "train", "boost"),
        where="Figs. 11 and 12",
    )


def grid(recipe: Recipe) -> Space:
    """Every combination of the values above, 180 points. The paper varies one at a time."""
    return Space(
        name="grid",
        title="All combinations of ε, γ, σ and K",
        points=tuple(
            Point(
                f"ε {e:g}, γ {g:g}, σ {s:g}, K {k}",
                {
                    "train.entropy_weight": e,
                    "boost.confidence_threshold": g,
                    "boost.top_fraction": s,
                    "train.num_neighbors": k,
                    "boost.num_neighbors": k,
                },
            )
            for e, g, s, k in product(EPSILONS, GAMMAS, SIGMAS, NEIGHBORS)
        ),
        axis="setting",
        stages=("boost",),
        form="grid",
        paper=default_point("ε 5, γ 0.99, σ 0.7, K 10", "boost"),
        where="Section IV-E",
    )
