"""`snscc compare`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from snscc_ray.cli.options import Settings, fail, out, overrides_of, say
from snscc_ray.cli.recipe import folder_of, recipe_of
from snscc_ray.compare.methods import METHODS, chosen, left_out


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
    say(f"snscc compare {recipe}")  # the imports take seconds
    wanted = recipe_of("compare", recipe, encoder, overrides_of(settings, seed, data), data)
    frozen = wanted.encoder.frozen
    names = chosen(methods, frozen=frozen)
    # Imported here so that --help and a misspelt method need not wait seconds for torch.
    from snscc_ray.compare.comparison import Request
    from snscc_ray.compare.comparison import compare as run_comparison
    from snscc_ray.compare.table import cells, columns
    from snscc_ray.config.paths import as_path
    from snscc_ray.training.engine import Interrupted

    folder = as_path(out_folder or f"{folder_of(recipe, wanted)}-compare")
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
