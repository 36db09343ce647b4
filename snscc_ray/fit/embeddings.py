"""Choose a recipe for a user's own embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import NO_ENCODER, EncoderSettings, Recipe
from snscc_ray.data.look import ImageStats
from snscc_ray.fit.choose import FEWEST, Pick, Preferences, choose
from snscc_ray.models.libraries import DEFAULT

# Choices about pixels.
_OF_IMAGES = ("image size", "colours", "augmentation", "encoder")
_VIEWS = 4  # mixtures with a neighbour, of each row
_SIDE = 32  # unused


def choose_for_embeddings(
    name: str,
    data: dict[str, Any],
    seen: ImageStats,
    *,
    gpu: bool,
    free_bytes: int,
    wishes: Preferences,
    workers: Sequence[int] = (1,),
) -> tuple[Recipe, list[Pick]]:
    """Choose a recipe as `choose` does for the features of a frozen encoder.

    Raises UserError if there are too few rows, or for a wish about images.
    """
    if seen.rows < FEWEST:
        raise UserError(f"{seen.rows} embeddings are too few to learn from; give {FEWEST} or more")
    named = wishes.encoder is not None and wishes.encoder.name != NO_ENCODER
    for option, given in (
        ("--encoder", named),
        ("--from-scratch", wishes.from_scratch),
        ("--image-size", wishes.image_size is not None),
    ):
        if given:
            raise UserError(f"{option} is for images, and these are embeddings; leave it out")
    if data.get("folders_are_labels"):
        raise UserError(
            "--labels and --labels-deepest take names of folders, and these are embeddings; leave "
            "them out (a column `label` of a Parquet file is used anyway)"
        )
    as_if = EncoderSettings(name=DEFAULT, weights="default", frozen=True)
    recipe, picks = choose(
        name,
        data,
        replace(seen, sampled=seen.rows, side=_SIDE, grey=False),
        gpu=gpu,
        free_bytes=free_bytes,
        wishes=replace(wishes, encoder=as_if, image_size=_SIDE),
        workers=workers,
    )
    encoder = EncoderSettings(name=NO_ENCODER, frozen=True, views=_VIEWS)
    none = Pick("encoder", "none", "the rows are embeddings already")
    kept = [
        replace(pick, why="only the cluster heads are trained") if pick.what == "epochs" else pick
        for pick in picks
        if pick.what not in _OF_IMAGES
    ]
    mixed = Pick(
        "augmentation",
        f"{_VIEWS} mixtures with neighbours",
        "a vector cannot be cropped or recoloured as an image can",
    )
    return recipe.model_copy(update={"encoder": encoder}), [none, *kept, mixed]
