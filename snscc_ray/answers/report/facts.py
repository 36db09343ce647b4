"""Read the metrics, assignments and choices in a run folder, for the report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES, StageName
from snscc_ray.core import storage
from snscc_ray.core.tables import read_table

Model = TypeVar("Model", bound=BaseModel)


class NumberChosen(BaseModel):
    """clusters.json: how the number of clusters was chosen."""

    chosen: int
    runner_up: int | None = None
    tried: list[int] = Field(min_length=1)
    criteria: dict[str, list[float | None]]
    why: str = ""


class _Figures(BaseModel):
    """metrics.json: the final figures of the stages."""

    stages: dict[StageName, dict[str, Any]] = Field(min_length=1)
    notes: list[str] = []


class _Choice(BaseModel):
    what: str
    value: str | int | float | bool
    why: str = ""


class Picked(BaseModel):
    """fit.json: the settings that `snscc fit` chose."""

    picked: list[_Choice]


@dataclass(frozen=True)
class Facts:
    stages: dict[StageName, dict[str, float]]  # final figures of each stage that was run
    versions: dict[str, str]
    epochs: dict[StageName, list[dict[str, Any]]]  # lines of metrics.jsonl
    warnings: list[dict[str, Any]]
    clusters_N: Tensor
    confidence_N: Tensor
    # The second-choice cluster and its probability; None: the run is from before they were kept.
    second_N: Tensor | None
    second_confidence_N: Tensor | None
    number: NumberChosen | None
    picked: Picked | None
    notes: list[str]  # what was ignored or assumed

    def last_figures(self) -> dict[str, float]:
        """Return the last stage's figures, Train's forced balance and two last-epoch figures."""
        last = {"pretrain": "health/projection_spread", "boost": "health/selected_share"}
        found = dict(list(self.stages.values())[-1])
        forced = self.stages.get("train", {}).get("health/forced_balance")
        if forced is not None:
            found["health/forced_balance"] = forced
        for stage in STAGES:
            lines, name = self.epochs.get(stage), last.get(stage)
            if lines and name and lines[-1].get(name) is not None:
                found[name] = lines[-1][name]
        return found


def read_facts(folder: Path) -> Facts:
    """Read the facts of a run folder. Raises UserError if a file cannot be read."""
    figures = _read(folder / "metrics.json", _Figures)
    if figures is None:
        raise UserError(f"the run in {folder} is not finished")
    held = figures.stages
    lines = _lines(folder / "metrics.jsonl")
    path = folder / "assignments.parquet"
    table = read_table(path, ["cluster", "confidence"], ["second", "second_confidence"])
    kept = "second" in table.column_names
    return Facts(
        {stage: held[stage] for stage in STAGES if stage in held},
        storage.read_json(folder / "recipe.json").get("versions", {}),
        {
            stage: [line for line in lines if line["stage"] == stage and "warning" not in line]
            for stage in STAGES
            if stage in held
        },
        [line for line in lines if "warning" in line],
        _tensor(table["cluster"]).long(),
        _tensor(table["confidence"]).double(),
        _tensor(table["second"]).long() if kept else None,
        _tensor(table["second_confidence"]).double() if kept else None,
        _read(folder / "clusters.json", NumberChosen),
        _read(folder / "fit.json", Picked),
        figures.notes,
    )


def _tensor(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().copy())


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl; NaN and infinite figures become None."""
    found = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if not isinstance(line, dict) or not {"stage", "epoch"} <= line.keys():
            continue
        found.append({name: _finite(value) for name, value in line.items()})
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path, model: type[Model]) -> Model | None:
    if not path.exists():
        return None
    held = storage.read_json(path)
    try:
        return model.model_validate(held)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise UserError(
            f"{path} is damaged ({place}{first['msg']}): bring back a copy of it, or run the "
            "recipe again"
        ) from error
