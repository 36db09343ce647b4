"""What moved between two runs on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from snscc_ray.answers.names import Naming, read_naming
from snscc_ray.answers.predict import check_finished
from snscc_ray.config.errors import UserError
from snscc_ray.core import rng
from snscc_ray.core.clustering import metrics
from snscc_ray.core.tables import read_table
from snscc_ray.data.names import Names
from snscc_ray.runs.folder import read_recipe, reading

PART = 0.2  # least share of a cluster that counts as a part of it
_MOVES, _EXAMPLES = 8, 12  # most moves shown, and images of each


@dataclass(frozen=True)
class Common:
    """The images that two runs have in common, and their clusters in both."""

    run: str  # the name of the other run
    naming: Naming  # of the other run's clusters
    rows_M: Tensor  # of this run's images
    here_M: Tensor
    there_M: Tensor
    only_here: int
    only_there: int


def common_images(folder: Path, ids: Names, clusters_N: Tensor) -> Common:
    """Match a run's images with those of the run in `folder`, by id.

    Raises UserError if that run is not finished, is being written, or has none of these images.
    """
    check_finished(folder)
    with reading(folder):
        table = read_table(folder / "assignments.parquet", ["id", "cluster"])
        naming = read_naming(folder, read_recipe(folder).data.num_clusters)
    there = Names(table["id"])
    place_N = pc.index_in(ids.array, value_set=there.array)
    rows = np.flatnonzero(place_N.is_valid().to_numpy(zero_copy_only=False))
    if not len(rows):
        raise UserError(
            f"--against {folder}: none of its {len(there):,} images has the id of one of these "
            f"{len(ids):,}; give a run on the same images"
        )
    places = place_N.drop_null().to_numpy()
    rows_M = torch.from_numpy(rows)
    return Common(
        folder.name or folder.resolve().name,
        naming,
        rows_M,
        clusters_N[rows_M],
        torch.from_numpy(table["cluster"].to_numpy()[places]).long(),
        len(ids) - len(rows),
        len(there) - len(rows),
    )


def moved(common: Common, seed: int, most_in_table: int) -> dict[str, Any]:
    """Describe the moves from the clusters there to those here.

    Each cluster there is matched with one here such that as many images as possible stay (Kuhn
    1955). most_in_table: clusters, beyond which there is no table of counts.
    """
    counts, matched = metrics.confusion(common.there_M, common.here_M)
    stayed = sum(int(counts[b, a]) for b, a in enumerate(matched) if a is not None)
    total = len(common.rows_M)
    return {
        "run": common.run,
        "names": [common.naming.title(cluster) for cluster in range(len(counts))],
        "common": total,
        "only_here": common.only_here,
        "only_there": common.only_there,
        "stayed": stayed,
        "share": stayed / total,
        "matched": [
            {
                "there": b,
                "here": a,
                "images": int(counts[b].sum()),
                "stayed": 0 if a is None else int(counts[b, a]),
            }
            for b, a in enumerate(matched)
        ],
        "counts": counts.tolist() if max(counts.shape) <= most_in_table else None,
        "part": PART,
        "splits": _parts(counts),
        "merges": _parts(counts.T),
        "moves": _moves(common, counts, matched, seed),
    }


def _parts(counts: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows of a table with two or more cells of at least `PART` of the row."""
    found = []
    for cluster, line in enumerate(counts):
        share = line / max(line.sum(), 1)
        parts = [int(part) for part in np.argsort(-share, kind="stable") if share[part] >= PART]
        if len(parts) > 1:
            lines = [
                {"cluster": part, "images": int(line[part]), "share": float(share[part])}
                for part in parts
            ]
            found.append({"cluster": cluster, "images": int(line.sum()), "parts": lines})
    return found


def _moves(
    common: Common, counts: np.ndarray, matched: list[int | None], seed: int
) -> list[dict[str, Any]]:
    """Return the largest moves between clusters that are not matched, with random images."""
    left = counts.copy()
    for b, a in enumerate(matched):
        if a is not None:
            left[b, a] = 0
    found = []
    for cell in np.argsort(-left, axis=None, kind="stable")[:_MOVES]:
        b, a = (int(place) for place in np.unravel_index(cell, left.shape))
        if not left[b, a]:
            break
        rows = common.rows_M[(common.there_M == b) & (common.here_M == a)]
        order = torch.randperm(len(rows), generator=rng.generator(seed, "moved", b, a))
        found.append(
            {
                "there": b,
                "here": a,
                "images": int(left[b, a]),
                "rows": rows[order[:_EXAMPLES]].tolist(),
            }
        )
    return found
