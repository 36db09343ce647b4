"""Encoder features of a finished run's own images, computed once and cached beside the stage."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import Recipe, StageName
from snscc_ray.core import checkpoints, storage
from snscc_ray.core.display import Display
from snscc_ray.core.tables import read_table
from snscc_ray.core.views import Normalize
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.resident import Images
from snscc_ray.data.sources import list_rows
from snscc_ray.models.encoders import build_encoder
from snscc_ray.runs.folder import read_recipe
from snscc_ray.runs.local import bring, mode_for
from snscc_ray.training.context import Context


@dataclass(frozen=True)
class RunImages:
    """A run and its own images, in the order of its assignments.parquet."""

    folder: Path
    recipe: Recipe
    catalog: Catalog
    data: Images
    device: torch.device


def own_images(folder: Path, device: torch.device, display: Display) -> RunImages:
    """Read a run's images again. Raises UserError if they are gone or have changed."""
    recipe = read_recipe(folder)
    place = recipe.data.path
    if place is not None and not is_url(place) and not Path(place).exists():
        raise UserError(
            f"the images of the run {folder} are no longer at {place}: put them back there, or run "
            "the recipe again"
        )
    rows = list_rows(recipe.data)
    mode = mode_for(recipe.data, rows, device, display)
    catalog, data = bring(recipe.data, rows, mode, device, display)
    known = own_ids(folder)
    if catalog.ids != known:
        raise UserError(
            f"{rows.place} does not hold the images of the run {folder} ({len(catalog):,} now, "
            f"{len(known):,} then); put them back, or run the recipe again"
        )
    return RunImages(folder, recipe, catalog, data, device)


def own_ids(folder: Path) -> list[str]:
    """Return the ids of a run's own images, in order."""
    table = read_table(folder / "assignments.parquet", ["id"])
    ids: list[str] = table["id"].to_pylist()
    return ids


def load_encoder(
    folder: Path, recipe: Recipe, stage: StageName, device: torch.device
) -> tuple[nn.Module, Normalize, Recipe]:
    """Load the encoder of a finished stage, its normalisation and the recipe for inference.

    Raises UserError.
    """
    path = folder / stage / "final.pt"
    held = checkpoints.load_final(path, recipe.data.channels, device)
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    weights = {
        name.removeprefix("encoder."): weight
        for name, weight in held["network"].items()
        if name.startswith("encoder.")
    }
    checkpoints.load_weights(encoder, weights, path)
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = (tuple(held["normalize"][name]) for name in ("mean", "std"))
    return encoder, Normalize(mean, std), answering(recipe, held, device)[0]


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

    They are cached in half precision.
    """
    kept = kept_features(own.folder, stage, len(own.catalog))
    if kept is not None:
        return kept
    encoder, normalize, recipe = load_encoder(own.folder, own.recipe, stage, own.device)
    context = Context(recipe, own.data, None, normalize, own.device)
    features_ND = F.normalize(context.clean_pass(encoder, encoder), dim=1).cpu().half()
    identity = storage.read_json(own.folder / stage / "stage.json")["identity"]
    path = own.folder / stage / "features.pt"
    if not is_url(path) and not os.access(path.parent, os.W_OK):
        return features_ND.float()  # the run folder is read-only: do not cache
    checkpoints.save(path, {"identity": identity, "features": features_ND})
    return features_ND.float()


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
