"""What a finished stage leaves on disk, and what a finished run says of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from snscc_ray.config.settings import StageName
from snscc_ray.core import storage
from snscc_ray.core.tables import write_table
from snscc_ray.data.imageset import Catalog

# In the folder of a stage: its weights, its identity and figures, and Pretrain's neighbours.
FINAL, RECORD, NEIGHBORS = "final.pt", "stage.json", "neighbors.parquet"
ASSIGNMENTS = "assignments.parquet"
# Its columns that runs of older versions lack.
SECOND = ("second", "second_confidence")


def stage_folder(store: Path, stage: StageName, identity: str) -> Path:
    """Return the folder of one stage in a shared store, named by its identity."""
    return store / f"{stage}-{identity[:16]}"


def finished(place: Path, stage: StageName, identity: str) -> dict[str, Any] | None:
    """Return the figures of the stage in `place` if it is finished with that identity."""
    path = place / RECORD
    needed = [FINAL, NEIGHBORS] if stage == "pretrain" else [FINAL]
    if not path.exists() or not all((place / name).exists() for name in needed):
        return None
    record = storage.read_json(path)
    return dict(record["figures"]) if record["identity"] == identity else None


def final_figures(figures: dict[str, Any]) -> dict[str, float]:
    """Return the figures of the last stage, out of those of a run."""
    stages = list(figures["stages"].values())
    return {name: float(value) for name, value in stages[-1].items()} if stages else {}


def second_choice(p_NC: Tensor, clusters_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest cluster of each row besides its own, and the probability."""
    others_NC = p_NC.scatter(1, clusters_N[:, None], -1)
    second_confidence_N, second_N = others_NC.max(1)
    return second_N, second_confidence_N


def write_assignments(folder: Path, catalog: Catalog, p_NC: Tensor) -> None:
    """Write each image's likeliest and second-likeliest cluster with their probabilities.

    p_NC: cluster probabilities on the CPU. A known label is written, too.
    """
    confidence_N, clusters_N = p_NC.max(1)
    second_N, second_confidence_N = second_choice(p_NC, clusters_N)
    columns = {
        "id": catalog.ids.column,
        "cluster": pa.array(clusters_N.int().numpy()),
        "confidence": pa.array(confidence_N.numpy()),
        "second": pa.array(second_N.int().numpy()),
        "second_confidence": pa.array(second_confidence_N.numpy()),
    }
    if catalog.labels is not None:
        columns["label"] = pa.array(catalog.labels.int().numpy())
    write_table(folder / ASSIGNMENTS, pa.table(columns))
