"""A run: execute the stages of one recipe in order, into one folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import NO_ENCODER, STAGES, Recipe, StageName
from snscc_ray.core import checkpoints, distributed, rng, storage
from snscc_ray.core.clustering.imbalance import forced_balance, forced_warning
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.metrics import oracle
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.views import Normalize
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.bank import FeatureBank, has_all_shards, identity_of
from snscc_ray.data.loading.resident import Images, ResidentData
from snscc_ray.models.encoders import (
    ClusterHeads,
    ClusterNet,
    PretextNet,
    build_encoder,
    out_features,
)
from snscc_ray.models.frozen import FrozenNet
from snscc_ray.models.pretrained import start_encoder
from snscc_ray.runs.banks import BANK
from snscc_ray.runs.extraction import compute_features, new_adapter, on_features
from snscc_ray.runs.finished import (
    FINAL,
    NEIGHBORS,
    RECORD,
    finished,
    stage_folder,
    write_assignments,
)
from snscc_ray.runs.folder import (
    NAMES_FILE,
    check_images,
    note_images,
    read_recipe,
    remove_leftovers,
    remove_run,
    remove_tree,
    write_recipe,
)
from snscc_ray.runs.identity import stage_identity
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Monitor, fit
from snscc_ray.training.stages.boost import Boost
from snscc_ray.training.stages.pretrain import Pretrain
from snscc_ray.training.stages.train import Train, probabilities
from snscc_ray.training.workers import Worker

# Rows on which a bfloat16 run is compared with float32.
_COMPARED = 2048
# Most numbers that the baseline takes: 128 MB of pixels.
_BASELINE_NUMBERS = 2**25


@dataclass(frozen=True)
class Request:
    """A request to run a recipe, by name (None: the recipe in the folder), into a folder."""

    recipe_name: str | None
    overrides: list[str]
    folder: Path
    stages: tuple[StageName, ...] = STAGES
    resume: bool = False
    overwrite: bool = False
    budget: float | None = None  # seconds for the whole run; None: the recipe's epochs

    def recipe(self) -> Recipe:
        """Return the recipe with the overrides applied. Raises UserError."""
        name = self.recipe_name
        return override(recipes.get(name) if name else read_recipe(self.folder), self.overrides)


@dataclass(frozen=True)
class Result:
    """The result of a run. `figures` is the content of metrics.json."""

    folder: Path
    figures: dict[str, Any]


def execute(
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
    beside: Path | None = None,
) -> Result:
    """Run the stages, reusing finished stages in `folder` that have the same identity.

    With a `store` that several runs share, each stage has a folder there (see `stage_folder`).
    beside: the folder of runs whose frozen encoder's features may be shared; None: the one that
    holds the store, or this run.
    Raises UserError if a stage's parent is neither in `stages` nor finished in the folder.
    """
    normalize = normalisation(recipe, catalog)
    context = Context(recipe, data, catalog.labels, normalize, worker.device, monitor.count)
    beside = beside or (store or folder).parent
    run = _Run(recipe, catalog, context, folder, worker, monitor, store, beside)
    run.check_parents(stages, afresh=overwrite)
    if not overwrite:
        check_images(folder, catalog)
        distributed.barrier()
    if worker.rank == 0:
        remove_leftovers(folder)
        if overwrite:
            remove_run(folder)
            # A frozen encoder may use the features again, if they are the same.
            if not recipe.encoder.frozen and identity_of(folder / "pretrain" / BANK):
                remove_tree(folder / "pretrain" / BANK)
        write_recipe(folder, recipe)
        note_images(folder, catalog)
    distributed.barrier()
    # Before the stages: otherwise a kill here would leave a finished run without its figures.
    baselines = run.baselines()
    figures: dict[str, Any] = {}
    for stage in STAGES:
        if stage in stages:
            figures[stage] = run.stage(stage)
        elif finished := run.finished(stage):
            figures[stage] = finished
    result = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "rows": len(catalog),
        "skipped": len(catalog.skipped),
        "notes": list(catalog.notes),
        "baselines": baselines,
        "stages": figures,
    }
    if worker.rank == 0:
        storage.write_json(folder / "metrics.json", result)
    return Result(folder, result)


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    catalog: Catalog
    context: Context
    folder: Path
    worker: Worker
    monitor: Monitor
    store: Path | None
    beside: Path
    known: dict[StageName, Tensor] = field(default_factory=dict)
    """What a stage that was trained in this process found by its last clean pass, for the next."""

    def identity(self, stage: StageName) -> str:
        return stage_identity(
            self.recipe, stage, self.catalog.fingerprint, self.context.data.order_name
        )

    def stage_folder(self, stage: StageName) -> Path:
        """Return the folder of the stage's files."""
        if self.store is None:
            return self.folder / stage
        return stage_folder(self.store, stage, self.identity(stage)) / stage

    def finished(self, stage: StageName) -> dict[str, Any] | None:
        """Return the stage's figures if it is finished with this identity, else None."""
        place = self.stage_folder(stage)
        if stage == "pretrain" and self.recipe.encoder.frozen:
            given = isinstance(self.context.data, FeatureBank)
            if not given and not has_all_shards(place / BANK):
                return None
        return finished(place, stage, self.identity(stage))

    def check_parents(self, stages: tuple[StageName, ...], *, afresh: bool) -> None:
        """Raise UserError for a stage whose parent is neither requested nor finished."""
        for parent, stage in pairwise(STAGES):
            if stage not in stages or parent in stages:
                continue
            if afresh or (self.finished(stage) is None and self.finished(parent) is None):
                raise self._unfinished(parent, stage)

    def _unfinished(self, parent: StageName, wanted_by: StageName) -> UserError:
        return UserError(
            f"{wanted_by} needs a finished {parent} stage with these settings in {self.folder}; "
            f"add {parent} to --stages"
        )

    def stage(self, name: StageName) -> dict[str, Any]:
        # One process looks for all: on a shared file system others may see a file late.
        figures = distributed.from_first(lambda: self.finished(name))
        if figures is None:
            began = time.monotonic()
            figures = {"pretrain": self._pretrain, "train": self._train, "boost": self._boost}[
                name
            ]()
            # Seconds in this process: a resumed stage counts only its remaining part.
            figures["seconds"] = round(time.monotonic() - began, 3)
            if self.worker.rank == 0:
                record = {"identity": self.identity(name), "figures": figures}
                storage.write_json(self.stage_folder(name) / RECORD, record)
                (self.stage_folder(name) / "latest.pt").unlink(missing_ok=True)
            distributed.barrier()
        return figures

    def _pretrain(self) -> dict[str, Any]:
        folder = self.stage_folder("pretrain")
        network: nn.Module
        if self.recipe.encoder.frozen:
            network, mined, figures = compute_features(
                self.context, self.catalog.fingerprint, folder, self.beside, self.monitor
            )
        else:
            network, mined, figures = self._trained_encoder()
        if self.worker.rank == 0:
            mined.save(folder / NEIGHBORS)
            self._save("pretrain", network, {})
        return figures

    def _trained_encoder(self) -> tuple[nn.Module, MinedNeighbors, dict[str, Any]]:
        settings = self.recipe.encoder
        with _seeded(self.context.key("pretrain", "init")):
            encoder = build_encoder(settings, self.recipe.data.channels)
            if settings.weights is not None and not self._can_continue("pretrain"):
                self.monitor.line(str(start_encoder(settings, encoder)))
            stage = Pretrain(self.context, encoder)
        fit(stage, self.context, self.worker, self.monitor, self.identity("pretrain"))
        figures: dict[str, Any] = stage.finish()
        assert stage.mined is not None and stage.features_ND is not None
        self.known["pretrain"] = stage.features_ND
        return stage.network, stage.mined, figures

    @cached_property
    def _training(self) -> Context:
        return on_features(self.context, self.stage_folder("pretrain"))

    def _train(self) -> dict[str, Any]:
        pretext, mined = self._pretext(), self._mined()
        with _seeded(self.context.key("train", "init")):
            stage = Train(self._training, pretext, mined)
        features_ND = self.known.pop("pretrain", None)
        if not self._can_continue("train"):
            stage.prepare(features_ND)
        del features_ND  # as large as the images' features: not during training
        fit(stage, self._training, self.worker, self.monitor, self.identity("train"))
        figures: dict[str, Any] = stage.finish()
        self._note_forced_balance(figures)
        p_NC = probabilities(self._training, stage.network)[:, 0]
        self._save_clusters("train", stage.network, p_NC)
        self.known["train"] = p_NC
        return figures

    def _boost(self) -> dict[str, Any]:
        network, mined = self._clusters(), self._mined()
        stage = Boost(self._training, network, mined, self.known.pop("train", None))
        fit(stage, self._training, self.worker, self.monitor, self.identity("boost"))
        figures: dict[str, Any] = stage.finish()
        if stage.restored:
            self.monitor.warn(
                "boost",
                stage.settings.epochs,
                "boost-worse: the label-free score fell below that of Train, so the best state "
                "was restored; a higher boost.confidence_threshold may help",
            )
        assert stage.p_NC is not None
        self._save_clusters("boost", stage.network, stage.p_NC)
        return figures

    def _note_forced_balance(self, figures: dict[str, Any]) -> None:
        pretrain = distributed.from_first(lambda: self.finished("pretrain"))
        free = (pretrain or {}).get("health/free_balance")
        if free is None:
            return  # a frozen encoder, or a Pretrain stage from before this was measured
        forced = forced_balance(figures["health/balance"], free)
        figures["health/forced_balance"] = forced
        if warning := forced_warning(forced):
            self.monitor.warn("train", self.recipe.train.epochs, warning)

    def _can_continue(self, stage: StageName) -> bool:
        saved = self.worker.latest_checkpoint(stage)
        return saved is not None and saved["identity"] == self.identity(stage)

    def _save_clusters(self, stage: StageName, network: ClusterNet, p_NC: Tensor) -> None:
        in_float32 = self._in_float32(network, p_NC)
        if self.worker.rank == 0:
            self._save(stage, network, in_float32)
            if (
                self.folder / NAMES_FILE
            ).exists():  # of a finished run whose stage had to be repeated
                self.monitor.line(
                    f"{NAMES_FILE} has names of the former clusters, and these are new: look at "
                    "them, and edit it, or use `snscc name` with --overwrite"
                )
            write_assignments(self.folder, self.catalog, p_NC)

    def _in_float32(self, network: ClusterNet, p_NC: Tensor) -> dict[str, float]:
        """Compare predictions in float32 with those in this run's precision, on the first rows.

        A CPU predicts in float32 for a bfloat16 run, and then reports this difference.
        """
        if not self.context.mixed:
            return {}
        recipe = self.recipe.model_copy(update={"precision": "float32"})
        exact_NC = probabilities(replace(self._training, recipe=recipe), network, _COMPARED)[:, 0]
        own_NC = p_NC[: len(exact_NC)]
        same = (exact_NC.argmax(1) == own_NC.argmax(1)).double().mean()
        return {
            "rows": len(exact_NC),
            "same_cluster": float(same),
            "largest_difference": float((exact_NC - own_NC).abs().max()),
        }

    def _save(self, stage: StageName, network: nn.Module, in_float32: dict[str, float]) -> None:
        normalize = self.context.normalize  # saved: prediction has no images to measure it on
        checkpoints.save(
            self.stage_folder(stage) / FINAL,
            {
                "identity": self.identity(stage),
                "network": network.state_dict(),
                "normalize": {"mean": list(normalize.mean), "std": list(normalize.std)},
                "precision": "bfloat16" if self.context.mixed else "float32",
                "in_float32": in_float32,
            },
        )

    def _load_final(self, stage: StageName, wanted_by: StageName, into: nn.Module) -> None:
        path = self.stage_folder(stage) / FINAL
        if distributed.from_first(lambda: self.finished(stage)) is None:
            raise self._unfinished(stage, wanted_by)
        checkpoints.load_weights(into, checkpoints.load(path, self.worker.device)["network"], path)

    def _pretext(self) -> nn.Module:
        path = self.stage_folder("pretrain") / FINAL
        if self.recipe.encoder.frozen:
            if distributed.from_first(lambda: self.finished("pretrain")) is None:
                raise self._unfinished("pretrain", "train")
            state = checkpoints.load(path, self.worker.device)["network"]
            # Not drawn with the heads: their weights would depend on the kind of adapter.
            with _seeded(self.context.key("train", "adapter")):
                adapter = new_adapter(self._training)
            adapter.project_on(state["encoder.mean"], state["encoder.basis"])
            return FrozenNet(None, adapter)
        encoder = build_encoder(self.recipe.encoder, self.recipe.data.channels)
        network = PretextNet(encoder, self.recipe.pretrain).to(self.worker.device)
        self._load_final("pretrain", "train", network)
        return network

    def _mined(self) -> MinedNeighbors:
        return MinedNeighbors.load(self.stage_folder("pretrain") / NEIGHBORS)

    def _clusters(self) -> ClusterNet:
        encoder: nn.Module
        if self.recipe.encoder.frozen:
            encoder = new_adapter(self._training)
        else:
            encoder = build_encoder(self.recipe.encoder, self.recipe.data.channels)
        heads = ClusterHeads(
            self.recipe.train, out_features(encoder), self.recipe.data.num_clusters, heads=1
        )
        network = ClusterNet(encoder, heads)
        network.to(self.worker.device)
        self._load_final("train", "boost", network)
        return self.context.to_device(network)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Run k-means on raw pixels, if there are labels and the images are in memory.

        Of many images a random sample is taken: the baseline must not cost as much as an epoch. A
        frozen encoder's images are large, and its features are the better baseline.
        """
        data = self.context.data
        if self.recipe.encoder.frozen:
            return {}
        if self.catalog.labels is None or self.store or not isinstance(data, ResidentData):
            return {}
        path = self.folder / "baselines.json"
        if path.exists():
            return dict(storage.read_json(path))
        began = time.monotonic()
        key, clusters = self.context.key("kmeans", "pixels"), self.recipe.data.num_clusters
        images_NP, labels_N = data.images_NCHW.flatten(1), self.catalog.labels
        most = max(_BASELINE_NUMBERS // images_NP.shape[1], clusters)
        starts = 10
        if len(images_NP) > most:
            drawn = torch.randperm(len(images_NP), generator=rng.generator(key, "sample"))[:most]
            images_NP, labels_N = images_NP[drawn.to(images_NP.device)], labels_N[drawn]
            starts = 1
        told = partial(self.context.count, "k-means on pixels", unit="iterations")
        _, clusters_N = kmeans(images_NP.float(), clusters, key, starts, told)
        figures = oracle(labels_N, clusters_N) | {"images": len(images_NP)}
        figures["seconds"] = round(time.monotonic() - began, 3)
        if self.worker.rank == 0:
            storage.write_json(path, {"kmeans_pixels": figures})
        return {"kmeans_pixels": figures}


def normalisation(recipe: Recipe, catalog: Catalog) -> Normalize:
    """Return the recipe's mean and standard deviation, or those of the images.

    A frozen encoder gets pixels in [0, 1], unless the recipe says otherwise: it normalises itself.
    """
    data = recipe.data
    embedded = recipe.encoder.name == NO_ENCODER
    if embedded or (recipe.encoder.frozen and data.mean is None):
        return Normalize((0.0,) * data.channels, (1.0,) * data.channels)
    share = catalog.values.double() / catalog.values.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * value).sum(1)
    std = (share * (value - mean[:, None]).square()).sum(1).clamp_min(1e-6).sqrt()
    return Normalize(data.mean or tuple(mean.tolist()), data.std or tuple(std.tolist()))


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    """Seed torch's global generators for a network's initial weights, and restore them after."""
    with torch.random.fork_rng():
        torch.manual_seed(key)
        yield
