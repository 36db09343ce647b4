"""Estimate the number of clusters from pretext features, by three criteria.

stability    mean adjusted Rand index of k-means on pairs of subsamples (Ben-Hur, Elisseeff &
             Guyon, "A stability based method for discovering structure in clustered data", 2002)
silhouette   mean silhouette of k-means (Rousseeuw 1987)
eigengap     λ(k+1) - λ(k) of the normalised Laplacian, affinities scaled locally (Zelnik-Manor &
             Perona, "Self-tuning spectral clustering", NIPS 2004; von Luxburg 2007)

The number with the highest product of stability and silhouette is chosen. A product, because
stability alone favours few clusters and silhouette alone many. The eigengap ignores cluster sizes
and is only shown beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score, pairwise_distances_argmin, silhouette_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from snscc_ray.answers.features import RunImages, stage_features
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core import distributed, storage
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.resident import Images
from snscc_ray.runs.folder import COUNT_FILE
from snscc_ray.runs.run import Result, execute, normalisation
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Monitor
from snscc_ray.training.stages.pretrain import measure_features
from snscc_ray.training.workers import Worker

_ROWS = 2000  # sample size: enough for a few dozen clusters; bounds the N×N matrices
_MOST = 30
_PAIRS = 8
_SHARE = 0.8  # share of the rows in each subsample


def expected_seconds(rows: int, features: int) -> float:
    """Estimate the seconds that `estimate` will take here, by timing one k-means of its size."""
    sample = np.random.default_rng(0).normal(size=(min(rows, _ROWS), features)).astype(np.float32)
    count = len(_numbers(len(sample)))
    began = time.monotonic()
    _kmeans(sample, 2 + count // 2, 0)
    return (time.monotonic() - began) * count * (2 * _PAIRS * _SHARE + 1)


@dataclass(frozen=True)
class Estimate:
    """The number chosen, the second best, and the value of each criterion for each number."""

    chosen: int
    runner_up: int
    tried: list[int]
    criteria: dict[str, list[float]]
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def execute_counted(
    recipe: Recipe,
    catalog: Catalog,
    data: Images,
    folder: Path,
    worker: Worker,
    monitor: Monitor,
    stages: tuple[StageName, ...] = STAGES,
    *,
    overwrite: bool = False,
    store: Path | None = None,
) -> Result:
    """Run the stages as `execute` does, with the number of clusters estimated after Pretrain.

    All workers of a group call it together. The estimate is kept in the run folder.
    """

    def run(recipe: Recipe, stages: tuple[StageName, ...], overwrite: bool) -> Result:
        return execute(
            recipe, catalog, data, folder, worker, monitor, stages,
            overwrite=overwrite, store=store,
        )  # fmt: skip

    chosen = distributed.from_first(lambda: _kept(folder, overwrite))
    if chosen is None:
        run(recipe, ("pretrain",), overwrite)
        own = RunImages(folder, recipe, catalog, data, worker.device)
        chosen = _count(own, monitor)
    return run(override(recipe, [f"data.num_clusters={chosen}"]), stages, False)


def _kept(folder: Path, overwrite: bool) -> int | None:
    """Return the number of clusters that was estimated for this run before, or None."""
    path = folder / COUNT_FILE
    return None if overwrite or not path.exists() else int(storage.read_json(path)["chosen"])


def _count(own: RunImages, monitor: Monitor) -> int:
    """Estimate the number of clusters from Pretrain's features, and note it in the run folder."""
    features_ND = stage_features(own, "pretrain")
    recipe, place = own.recipe, own.folder / "pretrain"
    tell = partial(monitor.count, "counting", unit="numbers tried")
    found = distributed.from_first(lambda: estimate(features_ND, recipe.seed, tell))
    monitor.line(found.why)
    # Pretrain's figures were for the provisional number of clusters: measure them again.
    recipe = override(recipe, [f"data.num_clusters={found.chosen}"])
    context = Context(
        recipe, own.data, own.catalog.labels, normalisation(recipe, own.catalog), own.device
    )
    figures = measure_features(
        context, features_ND, MinedNeighbors.load(place / "neighbors.parquet")
    )
    if distributed.rank() == 0:
        record = storage.read_json(place / "stage.json")
        record["figures"] |= figures
        storage.write_json(place / "stage.json", record)
        storage.write_json(own.folder / COUNT_FILE, found.as_dict())
    distributed.barrier()
    return found.chosen


def estimate(
    features_ND: Tensor, seed: int, progress: Callable[[int, int], None] | None = None
) -> Estimate:
    """Try 2 to 30 clusters (fewer if there are not ten images for each).

    Raises UserError if the features are all the same.
    """
    rows_ND = _sample(features_ND, seed)
    tried = _numbers(len(rows_ND))
    stability, silhouette = [], []
    with threadpool_limits(1):  # same order of summation on any machine
        for done, k in enumerate(tried, 1):
            stability.append(_stability(rows_ND, k, seed))
            _, found_N = _kmeans(rows_ND, k, seed)
            apart = 2 <= len(np.unique(found_N)) < len(rows_ND)
            silhouette.append(float(silhouette_score(rows_ND, found_N)) if apart else -1.0)
            if progress is not None:
                progress(done, len(tried))
        gaps = _eigengaps(rows_ND, tried)
    if max(silhouette) == -1:
        raise UserError(
            "after Pretrain all images look the same to the network, so clusters cannot be "
            "counted; check the images, or give a number with --clusters"
        )
    merit = np.array(stability) * np.maximum(silhouette, 0)
    best, second = (tried[place] for place in np.argsort(-merit, kind="stable")[:2])
    return Estimate(
        chosen=best,
        runner_up=second,
        tried=tried,
        criteria={"stability": stability, "silhouette": silhouette, "eigengap": gaps},
        why=_why(best, second, tried, merit, gaps),
    )


def _numbers(rows: int) -> list[int]:
    return list(range(2, max(3, min(_MOST, rows // 10)) + 1))


def _sample(features_ND: Tensor, seed: int) -> np.ndarray:
    rows = features_ND.detach().cpu().float().numpy()
    if len(rows) <= _ROWS:
        return rows
    drawing = np.random.default_rng(seed % 2**32)
    return rows[np.sort(drawing.choice(len(rows), _ROWS, replace=False))]


def _kmeans(rows_ND: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres (k, D) and the assignment (N,) of the best of three starts."""
    centres_KD, assignment_N = kmeans(torch.from_numpy(rows_ND), k, seed, starts=3)
    return centres_KD.numpy(), assignment_N.numpy()


def _stability(rows_ND: np.ndarray, k: int, seed: int) -> float:
    drawing = np.random.default_rng((seed + k) % 2**32)
    agreed = []
    for _ in range(_PAIRS):
        parts = [
            drawing.choice(len(rows_ND), int(_SHARE * len(rows_ND)), replace=False) for _ in "ab"
        ]
        one, two = (
            pairwise_distances_argmin(
                rows_ND, _kmeans(rows_ND[part], k, int(drawing.integers(2**31)))[0]
            )
            for part in parts
        )
        agreed.append(adjusted_rand_score(one, two))
    return float(np.mean(agreed))


def _eigengaps(rows_ND: np.ndarray, tried: list[int]) -> list[float]:
    rows = torch.from_numpy(rows_ND).double()
    distance_NN = torch.cdist(rows, rows).numpy()
    near = min(len(rows_ND) - 1, round(len(rows_ND) ** 0.5))
    scale_N = np.partition(distance_NN, near, axis=1)[:, near].clip(1e-12)
    weight_NN = np.exp(-(distance_NN**2) / np.outer(scale_N, scale_N))
    np.fill_diagonal(weight_NN, 0)
    degree_N = weight_NN.sum(1).clip(1e-12) ** -0.5
    falling = np.linalg.eigvalsh(weight_NN * np.outer(degree_N, degree_N))[::-1]
    return [float(falling[k - 1] - falling[k]) for k in tried]


def _why(best: int, second: int, tried: list[int], merit: np.ndarray, gaps: list[float]) -> str:
    ratio = merit[tried.index(second)] / max(merit[tried.index(best)], 1e-12)
    by_gap = tried[int(np.argmax(gaps))]
    sure = (
        "clearly ahead of"
        if ratio < 0.9
        else "a little ahead of"
        if ratio < 0.98
        else "hardly better than"
    )
    agrees = "the eigengap agrees" if by_gap == best else f"the eigengap says {by_gap}"
    return f"{best} clusters have the highest stability × separation, {sure} {second}; {agrees}"
