"""Assign new images to the clusters of a finished run.

The network, the normalisation and the clean pass are those of training, so an image of the run's
own dataset gets the same cluster as in assignments.parquet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console
from torch import Tensor

from snscc_ray.answers.features import answering, trained_encoder
from snscc_ray.answers.names import read_naming
from snscc_ray.answers.nearest import KnownImages, UnreadableRun, known_images
from snscc_ray.answers.table import answers, write
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import NO_ENCODER, DataSettings, Recipe, StageName
from snscc_ray.core import checkpoints
from snscc_ray.core.display import Display
from snscc_ray.core.memory import keeping_freed_memory
from snscc_ray.core.views import Normalize
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.data.loading.resident import Images, ResidentData
from snscc_ray.data.look import resolve_reading
from snscc_ray.data.names import Names
from snscc_ray.data.rows import Rows
from snscc_ray.data.sources import list_rows
from snscc_ray.models.encoders import ClusterHeads, ClusterNet, out_features
from snscc_ray.models.frozen import WholeEncoder
from snscc_ray.runs.folder import FIT_FILE, read_recipe, reading
from snscc_ray.runs.local import bring
from snscc_ray.training.context import Context
from snscc_ray.training.workers import choose_device

_CLUSTERING: tuple[StageName, ...] = ("boost", "train")  # the first of these that exists is used
# Rows per batch: as in a clean pass.
_ROWS = 1024


@dataclass(frozen=True)
class PredictRequest:
    """Which images to assign to which run's clusters, and what to list for each."""

    run: Path
    source: str  # folder of images, or shards
    out: Path
    top: int = 3  # clusters to list
    nearest: int = 3  # of the run's own images to list
    column: str | None = None  # of embeddings; None: as in the run


@dataclass(frozen=True)
class PredictResult:
    """The table that was written, and the number of unreadable images."""

    table: pa.Table
    left_out: int


@dataclass(frozen=True)
class Model:
    """The trained network of a finished run."""

    recipe: Recipe
    network: ClusterNet
    normalize: Normalize
    device: torch.device
    trained: dict[str, Any]  # the entries of the stage's final.pt about its precision

    @property
    def caveat(self) -> str | None:
        """How answers on this device may differ from the run's; None: not at all."""
        return answering(self.recipe, self.trained, self.device)[1]

    def infer(self, images: Images) -> tuple[Tensor, Tensor]:
        """Compute L2-normalised features (N, D) and cluster probabilities (N, C) in one pass.

        Rows are in the order of the images; both are float32 on the device.
        """

        def both(x_BCHW: Tensor) -> Tensor:
            z_BD, logits_HBC = self.network(x_BCHW)
            return torch.cat([z_BD, logits_HBC[0].softmax(1)], dim=1)

        recipe, _ = answering(self.recipe, self.trained, self.device)
        context = Context(recipe, images, None, self.normalize, self.device)
        both_N = context.clean_pass(self.network, both)
        clusters = recipe.data.num_clusters
        z_ND, p_NC = both_N.split([both_N.shape[1] - clusters, clusters], dim=1)
        return z_ND, p_NC

    def probabilities(self, images: Images) -> Tensor:
        """Compute cluster probabilities in the order of the images, (N, C) float32 on the CPU."""
        return self.infer(images)[1].cpu()

    def on(self, device: torch.device) -> Model:
        """Move the network to another device."""
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return replace(self, device=device)


@dataclass(frozen=True)
class Predictor:
    """Everything needed to predict for images, on any machine."""

    model: Model
    top: int
    known: KnownImages | None
    labels: list[str] | None  # of the clusters, if some have names

    def __call__(self, images_BCHW: Tensor) -> pa.Table:
        """Return one row per uint8 image, for any number of images; see `answers`."""
        parts = [
            answers(*self.model.infer(self._data(part)), self.top, self.known, self.labels)
            for part in images_BCHW.split(_ROWS)
        ]
        return pa.concat_tables(parts)

    def _data(self, part: Tensor) -> Images:
        if part.ndim == 3:  # embeddings, (B, 1, D)
            return FeatureBank([part.cpu().numpy()], self.model.device)
        return ResidentData(part, self.model.device)

    def on(self, device: torch.device) -> Predictor:
        known = self.known.on(device) if self.known is not None else None
        return replace(self, model=self.model.on(device), known=known)


def load_model(folder: Path, device: str = "auto") -> Model:
    """Load the network of a run's last stage. Raises UserError if the run is not finished."""
    recipe, stage = read_recipe(folder), check_finished(folder)
    chosen = choose_device(device)
    path = folder / stage / "final.pt"
    held = checkpoints.load_final(path, recipe.data.channels, chosen)
    encoder = trained_encoder(folder, recipe, stage, held["network"])
    own = encoder.adapter if isinstance(encoder, WholeEncoder) else encoder
    clusters = recipe.data.num_clusters
    heads = ClusterHeads(recipe.train, out_features(encoder), clusters, heads=1)
    network = ClusterNet(own, heads)
    checkpoints.load_weights(network, held["network"], path)
    network.encoder = encoder
    mean, std = (tuple(held["normalize"][name]) for name in ("mean", "std"))
    trained: dict[str, Any] = {n: held[n] for n in ("precision", "in_float32") if n in held}
    return Model(recipe, network, Normalize(mean, std), chosen, trained).on(chosen)


def check_finished(folder: Path) -> StageName:
    """Return the last stage of a run. Raises UserError if the run is not finished."""
    read_recipe(folder)
    if not (folder / "metrics.json").exists():
        begun_by_fit = (folder / FIT_FILE).exists()
        same = "the same `snscc fit` command" if begun_by_fit else "`snscc run --resume --out DIR`"
        raise UserError(f"the run in {folder} is not finished; continue it with {same}")
    return _last_stage(folder)


def _last_stage(folder: Path) -> StageName:
    """Return the last stage that has clusters. Raises UserError if there is none."""
    for stage in _CLUSTERING:
        # A finished stage whose network is missing is an error: do not fall back to another.
        if any((folder / stage / name).exists() for name in ("final.pt", "stage.json")):
            return stage
    raise UserError(
        f"the run in {folder} has no Train stage, so it has no clusters; run it with --stages "
        "pretrain,train,boost"
    )


def predict(question: PredictRequest, console: Console, device: str = "auto") -> PredictResult:
    """Cluster the images in a folder or in Parquet shards, and write one row per image.

    Columns: id and those of `answers`. Unreadable images are left out and reported. Raises
    UserError; nothing is written then.
    """
    display = Display(console)
    parts: list[pa.Table] = []
    with reading(question.run):
        answerer, settings, rows = prepare(question, display, device)
        device_ = answerer.model.device
        catalog, data = bring(settings, rows, device_, display)
        tell = display.counting("predict", "images")
        done = 0
        with keeping_freed_memory():
            for images in data.slices(0, len(data), _ROWS):
                parts.append(answerer(images))
                done += len(images)
                tell(done, len(data))
        display.finish()
    return conclude(question, catalog.ids, catalog.skipped, parts, display)


def prepare(
    question: PredictRequest, display: Display, device: str
) -> tuple[Predictor, DataSettings, Rows]:
    """Return the predictor on a device, and the settings and rows of the images.

    Raises UserError.
    """
    model = load_model(question.run, device)
    if model.caveat:
        display.line(model.caveat)
    labels = read_naming(question.run, model.recipe.data.num_clusters).labels()
    settings = _settings(model.recipe, question)
    settings, rows = resolve_reading(
        settings,
        list_rows(settings, display.finding("listing", "images")),
        tell=display.counting("looking", "images"),
    )
    check_inputs(model, rows)
    for note in rows.notes:
        display.line(note)
    known = None
    if question.nearest:
        run, stage = question.run, _last_stage(question.run)
        asked = len(rows.ids)
        try:
            known = known_images(run, stage, question.nearest, asked, model.device, display)
        except UnreadableRun as error:
            display.line(f"no nearest images, because {error}")
    return Predictor(model, question.top, known, labels), settings, rows


def conclude(
    question: PredictRequest,
    ids: Names,
    skipped: Iterable[tuple[str, str]],
    parts: list[pa.Table],
    display: Display,
) -> PredictResult:
    """Report skipped images, join the parts and write the table with the ids."""
    left_out = 0
    for identifier, reason in skipped:
        left_out += 1
        display.line(f"left out {identifier}: {reason}")
    table = pa.concat_tables(parts).add_column(0, "id", ids.column)
    write(table, question.out)
    return PredictResult(table, left_out)


def check_inputs(model: Model, rows: Rows) -> None:
    """Refuse images for a run on embeddings, embeddings for images, and those of another width.

    Raises UserError.
    """
    given = model.recipe.encoder.name == NO_ENCODER
    if given != (rows.vectors is not None):
        own, other = ("embeddings", "images") if given else ("images", "embeddings")
        raise UserError(f"the run is on {own}, and {rows.place} holds {other}: give {own}")
    encoder = model.network.encoder
    if rows.vectors is not None and isinstance(encoder, WholeEncoder):
        here, there = rows.vectors.shape[1], encoder.adapter.in_features
        if here != there:
            raise UserError(
                f"the embeddings in {rows.place} have {here} numbers, and those of the run "
                f"{there}: give embeddings of the same model"
            )


def _settings(recipe: Recipe, question: PredictRequest) -> DataSettings:
    """Return the run's data settings with another source."""
    return recipe.data.model_copy(
        update={
            "source": "auto",
            "path": question.source,
            "column": question.column or recipe.data.column,
            "classes": (),
            "download": False,
            "folders_are_labels": False,
            "skip_corrupt": True,
            "limit": None,
        }
    )
