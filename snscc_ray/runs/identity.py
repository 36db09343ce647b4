"""The identity of a stage: a hash of all that determines its result, to find finished stages."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from snscc_ray.config.settings import NO_ENCODER, STAGES, EncoderSettings, Recipe, StageName
from snscc_ray.models.pretrained import weights_identity

# Increased whenever a change of this package changes what the same settings train.
_VERSION = 2
# The same for what a frozen encoder's features are projected on; the features stay as they are.
_PROJECTION = "within-whitening"
# Fields added since, each with the value that keeps the old behaviour. At that value a field does
# not enter the hash, so that stages finished before it existed are still found.
_LATER: dict[StageName, dict[str, Any]] = {
    "train": {"max_imbalance": 1.0, "adapter": "none", "start": "kmeans"},
    "boost": {"score_tolerance": 1e-3},
}


def stage_identity(recipe: Recipe, stage: StageName, fingerprint: str, order: str) -> str:
    """Hash the stage's settings, the data's fingerprint and order, the seed and the parent's hash.

    Pretrain does not depend on the number of clusters. No stage depends on `runtime` or on the path
    of the images. Raises UserError if `encoder.weights` cannot be read.
    """
    parent = STAGES.index(stage) - 1
    data = recipe.data
    determines: dict[str, Any] = {
        "version": _VERSION,
        "stage": stage,
        "order": order,
        "settings": _settings(recipe, stage),
        "parent": stage_identity(recipe, STAGES[parent], fingerprint, order)
        if parent >= 0
        else None,
    }
    if parent < 0:
        determines |= {
            "fingerprint": fingerprint,
            "seed": recipe.seed,
            "precision": recipe.precision,
            "encoder": _encoder(recipe.encoder),
            "normalize": [data.mean, data.std],
        }
        if recipe.encoder.frozen:
            determines["projection"] = _PROJECTION
    else:
        determines["num_clusters"] = data.num_clusters
    text = json.dumps(determines, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def bank_identity(recipe: Recipe, fingerprint: str, *, mixed: bool) -> str:
    """Hash all that determines a frozen encoder's features of these images.

    The seed of the run does not: runs with other seeds use the same features. mixed: whether they
    are computed in bfloat16, as by default on a GPU.
    """
    encoder, data = recipe.encoder, recipe.data
    given = encoder.name == NO_ENCODER  # its views are mixtures with mined neighbours
    determines: dict[str, Any] = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "encoder": _encoder(encoder if given else encoder.model_copy(update={"components": 0})),
        "view": recipe.pretrain.view.model_dump(mode="json") if encoder.views else None,
        "precision": "bfloat16" if mixed else "float32",
        "normalize": [data.mean, data.std],
    }
    if given:
        determines["mined_neighbors"] = recipe.pretrain.mined_neighbors
    text = json.dumps(determines, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# Settings of frozen encoders only; runs from before them are still found.
_FROZEN = {"frozen", "views", "views_seed", "components", "further"}


def _encoder(settings: EncoderSettings) -> dict[str, Any]:
    """Return the encoder's settings, with its weights by content instead of by path.

    Weights are left out if there are none, so that runs from before that setting are still found.
    """
    if settings.frozen:
        values = settings.model_dump(mode="json", exclude={"weights", "further"})
        return values | {"parts": [_encoder(part) for part in settings.each()]}
    values = settings.model_dump(mode="json", exclude={"weights", *_FROZEN})
    return values if settings.weights is None else values | {"weights": weights_identity(settings)}


def _settings(recipe: Recipe, stage: StageName) -> dict[str, Any]:
    later = _LATER.get(stage, {})
    values: dict[str, Any] = getattr(recipe, stage).model_dump(mode="json")
    return {k: v for k, v in values.items() if k not in later or v != later[k]}
