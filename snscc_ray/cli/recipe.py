"""The recipe that a command's arguments mean: a name, a run folder, or what fit would choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snscc_ray.cli.options import place_of
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override

if TYPE_CHECKING:
    from snscc_ray.config.settings import EncoderSettings, Recipe

AUTO = "auto"


def recipe_of(
    command: str,
    name: str,
    encoders: list[str] | None,
    overrides: list[str],
    data: str | None,
    gpu: bool | None = None,
) -> Recipe:
    """Return the recipe that the arguments of `command` mean. gpu: see `recipe_for`.

    Raises UserError.
    """
    encoder = _encoder(encoders or [])
    if name == AUTO:
        return _chosen_for(command, data, encoder, overrides, gpu)
    # A name is looked up without an import of torch.
    recipe = recipes.RECIPES[name]() if name in recipes.RECIPES else _of_run(name)
    if encoder is not None:
        recipe = recipe.model_copy(update={"encoder": encoder})
    return override(recipe, overrides)


def folder_of(name: str, recipe: Recipe) -> str:
    """Return the start of the default folder's name: in `runs`, or beside the run it is from."""
    if name in recipes.RECIPES or name == AUTO:
        return f"runs/{recipe.name}"
    return name.rstrip("/")


def _encoder(names: list[str]) -> EncoderSettings | None:
    if not names:
        return None
    from snscc_ray.models.pretrained import encoder_settings, together

    return together([encoder_settings(name) for name in names])


def _of_run(name: str) -> Recipe:
    """Return the recipe of the run in a folder. Raises UserError if there is no such folder."""
    from snscc_ray.config.paths import as_path
    from snscc_ray.runs.folder import read_recipe

    folder = as_path(name)
    if not folder.is_dir():
        return recipes.get(name)
    if not (folder / "recipe.json").exists():
        raise UserError(
            f"{folder} holds no run (it has no recipe.json); if it holds images, give auto in its "
            f"place, with --data {name} and --set data.num_clusters=N"
        )
    return read_recipe(folder)


def _chosen_for(
    command: str,
    data: str | None,
    encoder: EncoderSettings | None,
    overrides: list[str],
    gpu: bool | None,
) -> Recipe:
    """Choose the recipe as `snscc fit` does, but for the number of clusters. Raises UserError."""
    if data is None:
        raise UserError(f"{command} with auto needs the images; add --data FOLDER")
    if not any(text.partition("=")[0].strip() == "data.num_clusters" for text in overrides):
        number = "--clusters N" if command == "compare" else "--set data.num_clusters=N"
        raise UserError(
            f"{command} with auto does not estimate the number of clusters; add {number}, or name "
            "the run folder of `snscc fit` instead of auto"
        )
    from snscc_ray.fit.choose import Preferences
    from snscc_ray.fit.fit import recipe_for

    return recipe_for(place_of(data), Preferences(None, encoder=encoder), overrides, gpu)
