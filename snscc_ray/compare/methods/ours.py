"""The recipe's own stages: Pretrain, from which other methods also start, and the whole run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.config.settings import STAGES, StageName
from snscc_ray.core import checkpoints
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.tables import read_table
from snscc_ray.data.loading.bank import has_all_shards, open_bank
from snscc_ray.models.encoders import PretextNet, build_encoder
from snscc_ray.models.frozen import Adapter, FrozenNet, components_of
from snscc_ray.runs.banks import BANK
from snscc_ray.runs.finished import finished
from snscc_ray.runs.identity import stage_identity
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.run import execute
from snscc_ray.training.context import Context
from snscc_ray.training.stages.pretrain import pretext_features
from snscc_ray.training.workers import LocalWorker

FOLDER = "snscc"


@dataclass(frozen=True)
class Pretext:
    """The results of Pretrain."""

    context: Context
    """Of what starts from it: a frozen encoder's features stand for the images."""
    network: nn.Module
    """Its `encoder` maps what the context holds to features."""
    mined: MinedNeighbors


def pretext(study: Study) -> Pretext:
    """Return our Pretrain, trained once for all methods that start from it.

    Once it is trained, it is only read: other methods may read it, or run, at the same time.
    """
    context, place = study.context, study.folder / FOLDER / "pretrain"
    if (figures := _trained(study, place)) is None:
        _run(study, ("pretrain",))
    else:
        study.seconds.append(figures["seconds"])
    recipe, path = context.recipe, place / "final.pt"
    weights = checkpoints.load(path, context.device)["network"]
    mined = MinedNeighbors.load(place / "neighbors.parquet")
    if study.frozen:
        bank = open_bank(place / BANK, context.device)
        components = components_of(recipe, bank.width, len(bank))
        adapter = study.build(
            "adapter", lambda: Adapter(bank.width, components, recipe.train.adapter)
        )
        adapter.project_on(weights["encoder.mean"], weights["encoder.basis"])
        return Pretext(replace(context, data=bank), FrozenNet(None, adapter), mined)
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    network = context.to_device(PretextNet(encoder, recipe.pretrain))
    checkpoints.load_weights(network, weights, path)
    return Pretext(context, network, mined)


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
    trained = STAGES[1:] if study.frozen else STAGES
    epochs = " + ".join(str(getattr(recipe, stage).epochs) for stage in trained)
    return MethodResult(torch.tensor(found["cluster"].to_pylist()), epochs, "its run is in snscc/")


def _trained(study: Study, place: Path) -> dict[str, Any] | None:
    """Return the figures of Pretrain if it is finished in `place`."""
    if study.frozen and not has_all_shards(place / BANK):
        return None
    recipe, data = study.context.recipe, study.context.data
    identity = stage_identity(recipe, "pretrain", study.catalog.fingerprint, data.order_name)
    return finished(place, "pretrain", identity)


def _run(study: Study, stages: tuple[StageName, ...]) -> None:
    folder = study.folder / FOLDER
    monitor = RunMonitor(Journal(folder), study.display)
    worker = LocalWorker(folder, study.context.device)
    try:
        result = execute(
            study.context.recipe,
            study.catalog,
            study.context.data,
            folder,
            worker,
            monitor,
            stages,
            beside=study.folder.parent,  # other comparisons and runs
        )
    finally:
        monitor.finish()
    study.seconds.extend(result.figures["stages"][stage]["seconds"] for stage in stages)
