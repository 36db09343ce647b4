"""Encoder features of a finished run's own images, computed once and cached beside the stage."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import Recipe, StageName
from snscc_ray.core import checkpoints, distributed, storage
from snscc_ray.core.display import Display
from snscc_ray.core.tables import read_table
from snscc_ray.core.views import Normalize
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.bank import FeatureBank, open_bank
from snscc_ray.data.loading.resident import Images
from snscc_ray.data.names import Names
from snscc_ray.data.rows import Rows
from snscc_ray.data.sources import list_rows
from snscc_ray.models.encoders import build_encoder
from snscc_ray.models.frozen import Adapter, WholeEncoder, build_frozen
from snscc_ray.runs.banks import BANK
from snscc_ray.runs.folder import images_differ, read_recipe, refuse_moved
from snscc_ray.runs.local import bring
from snscc_ray.training.context import Context


@dataclass(frozen=True)
class RunImages:
    """A run and its own images, in the order of its assignments.parquet."""

    folder: Path
    recipe: Recipe
    catalog: Catalog
    data: Images
    device: torch.device

    @cached_property
    def inputs(self) -> Images:
        """What the stages read: the images, or a frozen encoder's features of them."""
        if self.recipe.encoder.frozen and not isinstance(self.data, FeatureBank):
            return own_bank(self.folder, self.device)
        return self.data


def own_images(folder: Path, device: torch.device, display: Display) -> RunImages:
    """Read a run's images again. Raises UserError if they are gone or have changed."""
    recipe = read_recipe(folder)
    rows = own_rows(folder, recipe, display)
    catalog, data = bring(recipe.data, rows, device, display)
    if difference := images_differ(folder, catalog):
        raise UserError(
            f"{rows.place} does not hold the images of the run {folder} ({difference}); put them "
            "back, or repeat the command that made the run with --overwrite"
        )
    return RunImages(folder, recipe, catalog, data, device)


def own_rows(folder: Path, recipe: Recipe, display: Display) -> Rows:
    """List the images of a run again, without reading them. Raises UserError if they are gone."""
    refuse_moved(folder)
    place = recipe.data.path
    if place is not None and not is_url(place) and not Path(place).exists():
        raise UserError(
            f"the images of the run {folder} are no longer at {place}: put them back there, or "
            "repeat the command that made the run with --overwrite"
        )
    return list_rows(recipe.data, display.finding("listing", "images"))


def rows_now(folder: Path, recipe: Recipe, display: Display) -> Rows:
    """List what is where a run's images were. Raises UserError if they are gone.

    Without labels and a limit, as these would depend on files that have come since.
    """
    data = recipe.data.model_copy(update={"limit": None, "folders_are_labels": False})
    return own_rows(folder, recipe.model_copy(update={"data": data}), display)


def own_ids(folder: Path) -> Names:
    """Return the ids of a run's own images, in order."""
    table = read_table(folder / "assignments.parquet", ["id"])
    return Names(table["id"])


def trained_encoder(
    folder: Path, recipe: Recipe, stage: StageName, network: dict[str, Tensor]
) -> nn.Module:
    """Build the encoder of a run's stage; a frozen one has its weights, others get them later.

    network: the stage's weights. Raises UserError.
    """
    if not recipe.encoder.frozen:
        return build_encoder(recipe.encoder, recipe.data.channels)
    path = folder / "pretrain" / "final.pt"
    frozen = build_frozen(recipe)
    state = _part(checkpoints.load(path)["network"], "frozen.")
    checkpoints.load_weights(frozen, state, path)
    kind = "none" if stage == "pretrain" else recipe.train.adapter
    width, components = network["encoder.basis"].shape
    return WholeEncoder(frozen, Adapter(width, components, kind))


def own_bank(folder: Path, device: torch.device) -> FeatureBank:
    """Open the cached features of a run with a frozen encoder. Raises UserError."""
    return open_bank(folder / "pretrain" / BANK, device)


def _part(network: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): weight
        for name, weight in network.items()
        if name.startswith(prefix)
    }


def answering(
    recipe: Recipe, held: dict[str, Any], device: torch.device
) -> tuple[Recipe, str | None]:
    """Return a finished run's recipe with the precision it was trained in, and a caveat or None.

    held: the stage's `final.pt`. Precision `auto` is the one used in training (bfloat16 on a GPU,
    float32 on a CPU), whatever the present device. Exception: a bfloat16 run on a CPU uses
    float32, because most CPUs take many times as long in bfloat16. The caveat says so.
    """
    trained = held.get("precision")  # missing in runs from before it was stored
    if recipe.precision != "auto" or trained is None:
        return recipe, None
    caveat = None
    if trained == "bfloat16" and device.type == "cpu":
        trained, known = "float32", held["in_float32"]
        caveat = "the run used bfloat16 on a GPU; this machine answers in float32"
        if known:
            caveat += (
                f": {known['same_cluster']:.2%} of {known['rows']:,} images of the run get the "
                "same cluster, and probabilities differ by at most "
                f"{known['largest_difference']:.2g}"
            )
    return recipe.model_copy(update={"precision": trained}), caveat


def stage_features(own: RunImages, stage: StageName) -> Tensor:
    """Return L2-normalised features after a stage, (N, D) float32 on the CPU.

    They are cached in half precision. All workers of a group call it together. Raises UserError if
    the stage's network cannot be used.
    """
    cached = kept_features(own.folder, stage, len(own.catalog))
    if not distributed.any_process(cached is None):
        assert cached is not None
        return cached
    path = own.folder / stage / "final.pt"
    held = checkpoints.load_final(path, own.recipe.data.channels, own.device)
    encoder = trained_encoder(own.folder, own.recipe, stage, held["network"])
    trained = encoder.adapter if isinstance(encoder, WholeEncoder) else encoder
    checkpoints.load_weights(trained, _part(held["network"], "encoder."), path)
    encoder.to(own.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalize(*(tuple(held["normalize"][name]) for name in ("mean", "std")))
    recipe = answering(own.recipe, held, own.device)[0]
    context = Context(recipe, own.inputs, None, normalize, own.device)
    features_ND = F.normalize(context.clean_pass(encoder, encoder), dim=1).cpu().half()
    if may_keep(own.folder, stage) and distributed.rank() == 0:
        kept = {"identity": held["identity"], "features": features_ND}
        checkpoints.save(path.with_name("features.pt"), kept)
    return features_ND.float()


def may_keep(folder: Path, stage: StageName) -> bool:
    """Whether this process may write beside a stage, such as what it computed from it."""
    return is_url(folder) or os.access(folder / stage, os.W_OK)


def kept_features(folder: Path, stage: StageName, rows: int) -> Tensor | None:
    """Return the features that `stage_features` cached for all rows of this stage.

    Returns None if there are none, the stage is newer, or the file is damaged; they can be
    computed again.
    """
    path = folder / stage / "features.pt"
    if not path.exists():
        return None
    identity = storage.read_json(folder / stage / "stage.json")["identity"]
    try:
        held = checkpoints.load(path)
    except UserError:
        return None
    features = held.get("features")
    sound = (
        held.get("identity") == identity
        and isinstance(features, Tensor)
        and features.ndim == 2
        and len(features) == rows
        and bool(features.isfinite().all())
    )
    return features.float() if sound else None  # type: ignore[union-attr]
