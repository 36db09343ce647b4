"""`snscc sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from snscc_ray.cli.options import (
    SCALE,
    Address,
    Settings,
    fail,
    out,
    overrides_of,
    ready_for_ray,
    say,
)
from snscc_ray.cli.recipe import folder_of, recipe_of
from snscc_ray.config.errors import UserError
from snscc_ray.texts import counted

_METRICS = (
    "health/score", "health/neighbor_agreement", "health/balance", "health/confidence",
    "oracle/acc", "oracle/nmi", "oracle/ari",
)  # fmt: skip


def sweep(
    space: Annotated[
        str,
        typer.Argument(
            help="epsilon, gamma, sigma, neighbors, grid, ablation-train, ablation-boost, "
            "train-longer, pretext, or FILE.py:FUNCTION"
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help="what the points override: a name from `snscc recipes`; a run folder, for its "
            "recipe; or auto, for what `snscc fit` would choose for --data"
        ),
    ] = "digits",
    data: Annotated[str | None, typer.Option(help="folder of images or Parquet shards")] = None,
    out_folder: Annotated[
        str | None, typer.Option("--out", help="sweep folder  [default: runs/RECIPE-SPACE]")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="a trained one, which stays frozen, as in `snscc fit`; give it again for more"
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="runs of each point, with seeds from --seed on")
    ] = 3,
    seed: Annotated[int | None, typer.Option(help="the first seed")] = None,
    settings: Settings = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="number of points to try  [default: all]")
    ] = None,
    searcher: Annotated[
        str, typer.Option(help="how --samples chooses points: random or optuna")
    ] = "random",
    scheduler: Annotated[
        str, typer.Option(help="none, asha or median: stops trials that fall behind")
    ] = "none",
    metric: Annotated[
        str, typer.Option(help="metric to maximise; oracle/… metrics use the labels")
    ] = "health/score",
    grace: Annotated[int, typer.Option(min=1, help="epochs before a trial may be stopped")] = 2,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the sweep in --out")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="run a few steps and print the expected time")
    ] = False,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            min=1, help="most trials at a time  [default: as many as fit]", rich_help_panel=SCALE
        ),
    ] = None,
    cpus_per_trial: Annotated[
        float, typer.Option(min=0.01, help="CPUs of each worker", rich_help_panel=SCALE)
    ] = 1.0,
    gpus_per_trial: Annotated[
        float,
        typer.Option(min=0, help="GPUs of each worker; .25 shares one", rich_help_panel=SCALE),
    ] = 0.0,
    workers_per_trial: Annotated[
        int, typer.Option(min=1, help="Ray Train workers of each trial", rich_help_panel=SCALE)
    ] = 1,
    address: Address = None,
) -> None:
    """Run the trials of a search space, training shared stages once; the same command resumes.

    Examples:

        snscc sweep epsilon

        snscc sweep sigma --recipe cifar10 --data ~/cifar --gpus-per-trial .25

        snscc sweep grid --scheduler asha --samples 40

        snscc sweep grid --searcher optuna --samples 12

        snscc sweep my_space.py:space --recipe images --data ~/photos

        snscc sweep neighbors --recipe runs/photos
    """
    from snscc_ray.config.paths import as_path
    from snscc_ray.training.engine import Interrupted

    if scheduler not in ("none", "asha", "median"):
        raise UserError(f"--scheduler {scheduler}: use none, asha or median")
    if searcher not in ("random", "optuna"):
        raise UserError(f"--searcher {searcher}: use random or optuna")
    if searcher == "optuna" and samples is None:
        raise UserError("--searcher optuna needs --samples, the number of points to try")
    if metric not in _METRICS:
        raise UserError(f"--metric {metric}: use one of {', '.join(_METRICS)}")
    if workers_per_trial > 1 and gpus_per_trial not in (0, 1):
        raise UserError(
            f"--gpus-per-trial {gpus_per_trial:g}: with --workers-per-trial {workers_per_trial} "
            "each worker takes a whole GPU; use 1 or 0"
        )
    say(f"snscc sweep {space}")  # the imports take seconds
    overrides = overrides_of(settings, seed, data)
    chosen = recipe_of("sweep", recipe, encoder, overrides, data)
    label = space.replace(".py:", "-").replace("/", "-")
    folder = as_path(out_folder or f"{folder_of(recipe, chosen)}-{label}")
    if metric.startswith("oracle/"):
        out.print(f"The search maximises {metric}, which uses the labels.", highlight=False)
    ready_for_ray()
    try:
        from snscc_ray.sweep.run import Request, run_sweep
        from snscc_ray.sweep.session import Options
    except ImportError as error:
        raise UserError(f"sweeps need Ray ({error}); pip install 'ray[data,train,tune]'") from error
    options = Options(
        searcher=searcher,  # type: ignore[arg-type]
        scheduler=scheduler,  # type: ignore[arg-type]
        metric=metric,
        grace=grace,
        workers_per_trial=workers_per_trial,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        max_concurrent=max_concurrent,
        address=address,
    )
    try:
        request = Request(space, chosen, folder, options, seeds, samples, overwrite, dry_run)
        summary = run_sweep(request, out)
    except (Interrupted, KeyboardInterrupt):
        fail("stopped; run the same command again to continue", 130)
    if summary is None:
        out.print("Nothing was written. Leave --dry-run out to start the sweep.", highlight=False)
        return
    for line in summary.text.splitlines():
        say(line)
    out.print()
    say(f"Sweep folder: {folder}")
    failed = sum(row["status"] == "failed" for row in summary.rows)
    if failed:
        again = "the table gives the reasons; run the same command again to retry them"
        fail(f"{failed} of {counted(len(summary.rows), 'trial')} failed; {again}", 1)
