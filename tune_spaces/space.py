"""The points that a sweep runs, and the paper's results to compare them with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import StageName

# ACC, NMI and ARI of one stage of a run in the paper; None where it prints none.
Figures = tuple[float | None, float | None, float | None]

# The paper's symbol for a field.
SYMBOLS = {
    "train.entropy_weight": "ε",
    "boost.confidence_threshold": "γ",
    "boost.top_fraction": "σ",
    "train.num_neighbors": "K",
    "boost.num_neighbors": "K",
}


@dataclass(frozen=True)
class Point:
    """One setting: its label in tables and figures, and the fields of the recipe it overrides."""

    label: str
    overrides: Mapping[str, Any]
    # Last stage of a point that has fewer stages than the others. Its last figures are then
    # compared with the later stages of the others.
    last_stage: StageName | None = None


@dataclass(frozen=True)
class Claim:
    """The paper's claim that one point is the best of all in a stage."""

    best: str  # label of that point
    stage: StageName
    text: str  # the claim in a few words: "ε = 5 is the best of 2, 5 and 10"
    where: str  # its place in the paper: "Fig. 9, Section IV-E-1"


@dataclass(frozen=True)
class Space:
    """Points to run, how to draw them, and what the paper says about them.

    Raises UserError for a name that cannot be a file name, no points or stages, a repeated label,
    or a claim about a missing point or stage.
    """

    name: str
    title: str
    points: tuple[Point, ...]
    axis: str  # what differs between the points: "entropy weight ε"
    stages: tuple[StageName, ...]  # stages whose figures are shown
    # line and bar: each point; grid: the mean along each field; curves: over the epochs.
    form: Literal["line", "bar", "grid", "curves"] = "line"
    claims: tuple[Claim, ...] = ()
    # The paper's printed values: dataset -> stage -> label -> figures.
    paper: Mapping[str, Mapping[StageName, Mapping[str, Figures]]] = field(default_factory=dict)
    where: str = ""  # "Fig. 9"

    def __post_init__(self) -> None:
        labels = [point.label for point in self.points]
        if not re.fullmatch(r"[\w.-]*\w", self.name):
            raise UserError(f"space {self.name!r}: its name is also a file's; use letters and -")
        if not labels or not self.stages:
            raise UserError(f"space {self.name!r} needs at least one point and one stage")
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"space {self.name!r} has two points {label!r}; rename one")
        for claim in self.claims:
            if claim.best not in labels or claim.stage not in self.stages:
                raise UserError(
                    f"space {self.name!r} claims something of {claim.best!r} in {claim.stage}, "
                    "which is not among its points and stages; correct `best` or `stage`"
                )
