"""`snscc compare`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from rich.table import Table

from snscc_ray.cli.options import (
    SCALE,
    Address,
    Cpus,
    Gpu,
    Settings,
    Wait,
    Workers,
    counts_of,
    fail,
    folder_in,
    launcher,
    out,
    overrides_of,
    refuse_alone,
    say,
    scale_of,
)
from snscc_ray.cli.recipe import folder_of, recipe_of
from snscc_ray.compare.methods import METHODS, chosen, left_out
from snscc_ray.config.errors import UserError


def compare(
    recipe: Annotated[
        str,
        typer.Argument(
            help="a name from `snscc recipes`; a run folder, for its recipe; or auto, for what "
            "`snscc fit` would choose for --data"
        ),
    ],
    clusters: Annotated[
        str | None, typer.Option(help="number of kinds  [default: the recipe's]")
    ] = None,
    methods: Annotated[str, typer.Option(help=f"all, or some of {', '.join(METHODS)}")] = "all",
    data: Annotated[
        str | None, typer.Option(help="folder of images, Parquet shards, or a torchvision copy")
    ] = None,
    out_folder: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="folder or URL  [default: runs/RECIPE-compare; RUN-compare for a run folder; for "
            "auto, named by the data]",
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
    workers: Workers = "0",
    gpu: Gpu = False,
    cpus_per_worker: Cpus = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="folder or URL for runs, such as s3://BUCKET/runs; --out is then "
            "STORAGE/RECIPE-compare",
            rich_help_panel=SCALE,
        ),
    ] = None,
    address: Address = None,
    wait: Wait = 600.0,
) -> None:
    """Compare clustering methods, ours included, on the same images and encoder, in one table.

    With a frozen encoder, all methods work on the same features of the images. The same command
    continues a stopped comparison. Methods that you add later join the table. With --workers N, up
    to N methods run at the same time, each on one worker; the table is the same.

    Examples:

        snscc compare digits

        snscc compare cifar10 --data ~/cifar --methods pretext,scan,snscc

        snscc compare images --data ~/photos --clusters 12 --methods kmeans,snscc

        snscc compare auto --data ~/photos --clusters 12

        snscc compare runs/photos --methods kmeans,temi,turtle,snscc

        snscc compare digits --workers 2

        snscc compare cifar10 --workers 8 --gpu --address auto --storage s3://bucket/runs
    """
    chosen(methods)  # refuse a misspelt one at once
    counts, count = counts_of(workers), _count(clusters)
    if counts is None:
        refuse_alone(gpu=gpu, cpus_per_worker=cpus_per_worker, address=address)
    say(f"snscc compare {recipe}")  # the imports take seconds
    overrides = [*count, *overrides_of(settings, seed, data)]
    wanted = recipe_of(
        "compare", recipe, encoder, overrides, data, gpu=None if counts is None else gpu
    )
    frozen = wanted.encoder.frozen
    names = chosen(methods, frozen=frozen)
    # Imported here so that --help and a misspelt method need not wait seconds for torch.
    from snscc_ray.compare.comparison import Request
    from snscc_ray.compare.comparison import compare as run_comparison
    from snscc_ray.compare.table import cells, columns
    from snscc_ray.training.engine import Interrupted

    usual = f"{folder_of(recipe, wanted)}-compare"
    if storage is None:
        out_folder = out_folder or usual
    folder = folder_in(storage, out_folder, usual.rpartition("/")[2])
    if frozen and methods.strip() == "all":
        say(f"left out, as they do not work on features: {', '.join(left_out())}")
    workers_of = None
    if counts is not None:
        from snscc_ray.cluster.scale import check_device

        check_device(wanted, gpu)
        scale = scale_of(counts, gpu, cpus_per_worker, address, wait)
        workers_of = partial(launcher().workers_of, scale)
    try:
        rows = run_comparison(Request(wanted, names, folder, overwrite), out, workers_of)
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


def _count(clusters: str | None) -> list[str]:
    """Parse --clusters into overrides. Raises UserError."""
    if clusters is None:
        return []
    if not clusters.isdecimal() or int(clusters) < 2:
        raise UserError(
            f"--clusters {clusters}: give a number of 2 or more; to estimate it, use `snscc fit` "
            "first, and name its run folder here"
        )
    return [f"data.num_clusters={clusters}"]
