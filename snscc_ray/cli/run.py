"""`snscc run`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
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
    seconds_of,
)
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES, StageName
from snscc_ray.texts import counted


def run(
    recipe: Annotated[
        str | None, typer.Argument(help="a name from `snscc recipes`; not needed with --resume")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="folder of images, Parquet shards, or a torchvision copy")
    ] = None,
    out_folder: Annotated[
        str | None, typer.Option("--out", help="run folder or URL  [default: runs/RECIPE]")
    ] = None,
    stages: Annotated[str, typer.Option(help="which stages to run")] = ",".join(STAGES),
    seed: Annotated[int | None, typer.Option(help="random seed")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the run in --out")
    ] = False,
    download: Annotated[
        bool, typer.Option("--download", help="let torchvision fetch CIFAR or STL-10 into --data")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="choose the epochs to finish in about this time, such as 90s, 25m or 2h",
        ),
    ] = None,
    workers: Workers = "0",
    gpu: Gpu = False,
    cpus_per_worker: Cpus = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="folder or URL for runs, such as s3://BUCKET/runs; --out is then STORAGE/RECIPE",
            rich_help_panel=SCALE,
        ),
    ] = None,
    address: Address = None,
    wait: Wait = 600.0,
) -> None:
    """Run a recipe: Pretrain → Train → Boost, into one folder.

    Examples:

        snscc run digits

        snscc run cifar10 --data ~/cifar --download --out runs/c10 --seed 1

        snscc run images --data ~/photos --set data.num_clusters=12

        snscc run digits --set train.num_neighbors=20 --set boost.epochs=0

        snscc run cifar10 --data ~/cifar --budget 25m

        snscc run --resume --out runs/c10

        snscc run cifar10 --workers 8 --gpu --address auto --storage s3://bucket/runs
    """
    chosen_stages = _stages(stages)
    seconds = None if budget is None else seconds_of(budget)
    if recipe is None and not (resume and out_folder):
        raise UserError("name a recipe (`snscc recipes` lists them), or give --resume --out DIR")
    overrides = overrides_of(settings, seed, data)
    if download:
        overrides.append("data.download=true")
    if os.environ.get("RANK", "0") == "0":  # under torchrun, one process speaks
        say(f"snscc run {recipe or '--resume'}")  # the imports take seconds
    # Imported here so that --help and a misspelt recipe need not wait seconds for torch.
    from snscc_ray.runs.local import run_here
    from snscc_ray.runs.run import Request
    from snscc_ray.training.engine import Interrupted

    folder = folder_in(storage, out_folder, str(recipe))
    request = Request(recipe, overrides, folder, chosen_stages, resume, overwrite, seconds)
    counts = counts_of(workers)
    try:
        if counts is None:
            refuse_alone(gpu=gpu, cpus_per_worker=cpus_per_worker, address=address)
            result = run_here(request, out)
        else:
            if budget is not None:
                raise UserError("--budget measures this process; leave it out with --workers")
            scale = scale_of(counts, gpu, cpus_per_worker, address, wait)
            result = launcher().run_on_ray(request, out, scale)
    except Interrupted:
        command = f"snscc run --resume --out {shlex.quote(str(folder))}"
        if counts is not None:
            command += f" --workers {workers}" + " --gpu" * gpu
            command += f" --address {address}" if address else ""
        fail(f"stopped; continue with: {command}", 130)
    if result is not None:
        _print_result(result.figures, result.folder)


def _stages(text: str) -> tuple[StageName, ...]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise UserError(
            f"--stages {text}: there is no stage {unknown[0]!r}; use {', '.join(STAGES)}"
        )
    return tuple(stage for stage in STAGES if stage in names)


def _print_result(figures: dict[str, object], folder: Path) -> None:
    table = Table("stage", "ACC", "NMI", "ARI", "confident", "clusters", "seconds", box=None)
    stages: dict[str, dict[str, float]] = figures["stages"]  # type: ignore[assignment]
    baselines: dict[str, dict[str, float]] = figures["baselines"]  # type: ignore[assignment]
    if "kmeans_pixels" in baselines:
        row, images = baselines["kmeans_pixels"], int(str(figures["rows"]))
        taken = row.get("images", images)
        what = "k-means on pixels" if taken == images else f"k-means, {taken:,} images"
        table.add_row(what, *_cells(row), style="dim")
    names = {
        "pretrain": "Pretrain + k-means",
        "train": "Train",
        "boost": "Boost",
    }
    for stage, row in stages.items():
        table.add_row(names[stage], *_cells(row))
    out.print()
    out.print(table)
    if any(row.get("health/restored") for row in stages.values()):
        out.print("Boost made the label-free score worse: the best earlier state was kept.")
    if figures["skipped"]:
        out.print(f"Left out: {counted(int(str(figures['skipped'])), 'unreadable image')}.")
    out.print()
    say(f"Run folder: {folder}")


def _cells(row: dict[str, float]) -> list[str]:
    def show(name: str, form: str) -> str:
        return format(row[name], form) if name in row else "-"

    return [
        *(show(f"oracle/{name}", ".3f") for name in ("acc", "nmi", "ari")),
        show("health/confident_share", ".0%"),
        show("health/clusters_in_use", "d"),
        show("seconds", ".1f"),
    ]
