"""What changes a choice: the user's `--set` overrides, and the time there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import DataSettings, EncoderSettings, Recipe
from snscc_ray.fit.choose import Pick, Preferences, named

# What names an encoder in `--set`.
_ENCODER_FIELDS = ("encoder.name", "encoder.weights", "encoder.frozen", "encoder.further")


def with_overrides(wishes: Preferences, overrides: Sequence[str]) -> Preferences:
    """Return the wishes with an encoder that `--set encoder.…` names, as `--encoder` would.

    Raises UserError.
    """
    changed = [text for text in overrides if text.strip().startswith(_ENCODER_FIELDS)]
    if not changed:
        return wishes
    fields = {name.strip(): value.strip() for name, _, value in (t.partition("=") for t in changed)}
    if wishes.from_scratch and fields.get("encoder.weights", "null") != "null":
        raise UserError(
            "--from-scratch and --set encoder.weights exclude each other; use one of them"
        )
    start = wishes.encoder or EncoderSettings(name="convnet")
    base = recipes.get("images").model_copy(update={"encoder": start})
    if "encoder.frozen" not in fields and fields.get("encoder.weights", "null") != "null":
        changed.append("encoder.frozen=true")
    return replace(wishes, encoder=override(base, changed).encoder)


# What decides which images there are, and how they are read.
_WHICH_IMAGES = tuple(
    f"data.{name}"
    for name in (
        "source", "path", "column", "download", "classes", "folders_are_labels", "limit",
        "skip_corrupt", "max_pixels", "value_range", "background",
    )
)  # fmt: skip


def data_settings(where: dict[str, Any], overrides: Sequence[str]) -> DataSettings:
    """Return the data settings: where the images are, and overrides such as a limit.

    Raises UserError.
    """
    recipe = recipes.get("images")
    data = recipe.data.model_copy(update=where)
    # Only these: `data.mean`, say, is checked against the channels, which are not chosen yet.
    changed = [text for text in overrides if text.partition("=")[0].strip() in _WHICH_IMAGES]
    return override(recipe.model_copy(update={"data": data}), changed).data


# The recipe fields behind each pick.
_PICKED = {
    "image size": ("data.image_size",),
    "colours": ("data.channels",),
    "encoder": ("encoder",),
    "batch": ("pretrain.batch_size", "train.batch_size", "boost.batch_size"),
    "epochs": ("pretrain.epochs", "train.epochs", "boost.epochs"),
    "augmentation": ("pretrain.view", "train.view", "boost.view", "encoder.views"),
}


def as_set(picks: list[Pick], recipe: Recipe, assignments: Iterable[str]) -> list[Pick]:
    """Return the picks, replacing those that the user's `FIELD=VALUE` overrides changed."""
    fields = [assignment.partition("=")[0].strip() for assignment in assignments]

    def overruled(pick: Pick) -> bool:
        return any(
            f"{field}.".startswith(f"{own}.") or f"{own}.".startswith(f"{field}.")
            for field in fields
            for own in _PICKED[pick.what]
        )

    return [
        Pick(pick.what, used(pick.what, recipe), "your setting") if overruled(pick) else pick
        for pick in picks
    ]


def as_paced(picks: list[Pick], chosen: Recipe, recipe: Recipe) -> list[Pick]:
    """Return the picks, replacing the epochs if they had to be changed to fit the time."""
    epochs = used("epochs", recipe)
    if epochs == used("epochs", chosen):
        return picks
    fitting = Pick("epochs", epochs, "as many as fit into the time")
    return [fitting if pick.what == "epochs" else pick for pick in picks]


def used(what: str, recipe: Recipe) -> str:
    """Return a recipe's value for one of the picks, as text."""
    stages = (recipe.pretrain, recipe.train, recipe.boost)
    if what == "image size":
        return f"{recipe.data.image_size} px"
    if what == "colours":
        return "grey" if recipe.data.channels == 1 else "RGB"
    if what == "encoder":
        return named(recipe.encoder)
    if what == "batch":
        sizes = [str(stage.batch_size) for stage in stages]
        return " / ".join(sizes if len(set(sizes)) > 1 else sizes[:1])
    if what == "epochs":
        return " + ".join(str(stage.epochs) for stage in stages)
    return "your own"
