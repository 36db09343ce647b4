"""`snscc compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from snscc_ray.cli.options import Settings, fail, out, overrides_of, place_of, say
from snscc_ray.compare.methods import METHODS, chosen, left_out
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override

if TYPE_CHECKING:
    from snscc_ray.config.settings import EncoderSettings, Recipe

_AUTO = "auto"


def compare(
    recipe: Annotated[
        str,
        typer.Argument(
            help="a name from `snscc recipes`; a run folder, for its recipe; or auto, for what "
            "`snscc fit` would choose for --data"
        ),
    ],
    methods: Annotated[str, typer.Option(help=f"all, or some of {', '.join(METHODS)}")] = "all",
    data: Annotated[
        str | None, typer.Option(help="folder of images, Parquet shards, or a torchvision copy")
    ] = None,
    out_folder: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="folder  [default: runs/RECIPE-compare; RUN-compare for a run folder; for auto, "
            "named by the data]",
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="a trained one, which stays frozen, as in `snscc fit`: the methods work on its "
            "features; give it again to use several"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="random seed")] = None,
    settings: Settings = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the comparison in --out")
    ] = False,
) -> None:
    """Compare clustering methods, ours included, on the same images and encoder, in one table.

    With a frozen encoder, all methods work on the same features of the images. The same command
    continues a stopped comparison. Methods that you add later join the table.

    Examples:

        snscc compare digits

        snscc compare cifar10 --data ~/cifar --methods pretext,scan,snscc

        snscc compare images --data ~/photos --set data.num_clusters=12 --methods kmeans,snscc

        snscc compare auto --data ~/photos --set data.num_clusters=12

        snscc compare runs/photos --methods kmeans,temi,turtle,snscc
    """
    chosen(methods)  # refuse a misspelt one at once
    wanted = _recipe(recipe, encoder or [], overrides_of(settings, seed, data), data)
    frozen = wanted.encoder.frozen
    names = chosen(methods, frozen=frozen)
    # Imported here so that --help and a misspelt method need not wait seconds for torch.
    from snscc_ray.compare.comparison import Request
    from snscc_ray.compare.comparison import compare as run_comparison
    from snscc_ray.compare.table import cells, columns
    from snscc_ray.config.paths import as_path
    from snscc_ray.training.engine import Interrupted

    if out_folder is not None:
        folder = as_path(out_folder)
    elif recipe in recipes.RECIPES or recipe == _AUTO:
        folder = as_path(f"runs/{wanted.name}-compare")
    else:
        folder = as_path(f"{recipe.rstrip('/')}-compare")
    if frozen and methods.strip() == "all":
        say(f"left out, as they do not work on features: {', '.join(left_out())}")
    try:
        rows = run_comparison(Request(wanted, names, folder, overwrite), out)
    except Interrupted:
        fail("stopped; run the same command again to continue", 130)
    shown = columns(rows)
    table = Table("method", *shown.values(), "clusters", "epochs", "seconds", box=None)
    for row in rows:
        table.add_row(*cells(row, shown))
    out.print()
    out.print(table)
    out.print()
    say(f"Table: {folder / 'compare.md'}")
    failed = [row.method for row in rows if row.seconds is None]
    if failed:
        fail(f"failed: {', '.join(failed)}; the reasons are in the table", 1)


def _recipe(name: str, encoders: list[str], overrides: list[str], data: str | None) -> Recipe:
    """Return the recipe that the arguments mean. Raises UserError."""
    encoder = _encoder(encoders)
    if name == _AUTO:
        return _chosen_for(data, encoder, overrides)
    # A name is looked up without an import of torch.
    recipe = recipes.RECIPES[name]() if name in recipes.RECIPES else _of_run(name)
    if encoder is not None:
        recipe = recipe.model_copy(update={"encoder": encoder})
    return override(recipe, overrides)


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
    return read_recipe(folder) if folder.is_dir() else recipes.get(name)


def _chosen_for(data: str | None, encoder: EncoderSettings | None, overrides: list[str]) -> Recipe:
    """Choose the recipe as `snscc fit` does, but for the number of clusters. Raises UserError."""
    if data is None:
        raise UserError("compare auto needs the images; add --data FOLDER")
    if not any(text.partition("=")[0].strip() == "data.num_clusters" for text in overrides):
        raise UserError(
            "compare auto does not estimate the number of clusters; add --set "
            "data.num_clusters=N, or name the run folder of `snscc fit` instead of auto"
        )
    from snscc_ray.fit.choose import Preferences
    from snscc_ray.fit.fit import recipe_for

    return recipe_for(place_of(data), Preferences(None, encoder=encoder), overrides)
