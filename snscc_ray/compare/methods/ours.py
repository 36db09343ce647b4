"""The recipe's own stages: Pretrain, from which other methods also start, and the whole run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.config.settings import STAGES, StageName
from snscc_ray.core import checkpoints
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.neighbors import MinedNeighbors
from snscc_ray.core.tables import read_table
from snscc_ray.models.encoders import PretextNet, build_encoder
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.run import execute
from snscc_ray.training.stages.pretrain import pretext_features
from snscc_ray.training.workers import LocalWorker

FOLDER = "snscc"


@dataclass(frozen=True)
class Pretext:
    """The results of Pretrain."""

    network: PretextNet
    mined: MinedNeighbors


def pretext(study: Study) -> Pretext:
    """Return our Pretrain, trained once for all methods that start from it."""
    _run(study, ("pretrain",))
    recipe, place = study.context.recipe, study.folder / FOLDER / "pretrain"
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    network = study.context.to_device(PretextNet(encoder, recipe.pretrain))
    path = place / "final.pt"
    saved = checkpoints.load(path, study.context.device)
    checkpoints.load_weights(network, saved["network"], path)
    return Pretext(network, MinedNeighbors.load(place / "neighbors.parquet"))


def pretext_kmeans(study: Study) -> MethodResult:
    """K-Means on the features of SimCLR (Chen et al., ICML 2020) or the recipe's pretext method."""
    network = pretext(study).network
    features_ND = pretext_features(study.context, network)
    _, clusters_N = study.timed(lambda: kmeans(features_ND, study.clusters, study.key("kmeans")))
    settings = study.context.recipe.pretrain
    return MethodResult(clusters_N, str(settings.epochs), settings.method)


def cluster(study: Study) -> MethodResult:
    """Pretrain, Train and Boost (Duan et al., IEEE TIP 2025), as an ordinary run."""
    _run(study, STAGES)
    found = read_table(study.folder / FOLDER / "assignments.parquet", ["cluster"])
    recipe = study.context.recipe
    epochs = " + ".join(str(getattr(recipe, stage).epochs) for stage in STAGES)
    return MethodResult(torch.tensor(found["cluster"].to_pylist()), epochs, "its run is in snscc/")


def _run(study: Study, stages: tuple[StageName, ...]) -> None:
    folder = study.folder / FOLDER
    monitor = RunMonitor(Journal(folder), study.display)
    worker = LocalWorker(folder, study.context.device)
    context = study.context
    try:
        result = execute(
            context.recipe, study.catalog, context.data, folder, worker, monitor, stages
        )
    finally:
        monitor.finish()
    study.seconds.extend(result.figures["stages"][stage]["seconds"] for stage in stages)
