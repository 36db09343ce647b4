"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from snscc_ray import recipes
from snscc_ray.config import STAGES, StageName
from snscc_ray.errors import TrainingError, UserError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Find out what is in a pile of images without labels: Pretrain → Train → Boost.

    Examples:

        snscc run digits

        snscc recipes

        snscc doctor
    """,
)
out = Console()
_SCALE = "Scale out"  # a panel of the help
_METRICS = (
    "health/score", "health/neighbor_agreement", "health/balance", "health/confidence",
    "oracle/acc", "oracle/nmi", "oracle/ari",
)  # fmt: skip

# Older typers raise click's own usage error, newer ones that of the click inside them.
_UsageError: Any = typer.BadParameter.__bases__[0]


@app.command()
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
    seed: Annotated[int | None, typer.Option(help="of everything random in the run")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="override any field of the recipe"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the run in --out")
    ] = False,
    download: Annotated[
        bool, typer.Option("--download", help="let torchvision fetch CIFAR or STL-10 into --data")
    ] = False,
    workers: Annotated[
        str,
        typer.Option(
            help="Ray workers, or MIN:MAX; 0: this process, without Ray",
            show_default=True,
            rich_help_panel=_SCALE,
        ),
    ] = "0",
    gpu: Annotated[
        bool, typer.Option("--gpu", help="a GPU for each worker", rich_help_panel=_SCALE)
    ] = False,
    cpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="1 on a cluster; alone, an equal share", rich_help_panel=_SCALE
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="where runs live, such as s3://BUCKET/runs; --out is then STORAGE/RECIPE",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="the Ray cluster to join: auto, or HOST:PORT  [default: RAY_ADDRESS, or Ray is "
            "started here for this run]",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            min=0, help="seconds until the workers must be placed", rich_help_panel=_SCALE
        ),
    ] = 600.0,
) -> None:
    """Run a recipe: Pretrain → Train → Boost, into one folder.

    Examples:

        snscc run digits

        snscc run cifar10 --data ~/cifar --download --out runs/c10 --seed 1

        snscc run images --data ~/photos --set data.num_clusters=12

        snscc run digits --set train.num_neighbors=20 --set boost.epochs=0

        snscc run --resume --out runs/c10

        snscc run cifar10 --workers 8 --gpu --address auto --storage s3://bucket/runs
    """
    # Imported here: torch takes seconds, which --help and a misspelt recipe should not wait for.
    from snscc_ray.engine import Interrupted
    from snscc_ray.local import run_here
    from snscc_ray.paths import as_path

    chosen_stages = _stages(stages)
    if recipe is None and not (resume and out_folder):
        raise UserError("name a recipe (`snscc recipes` lists them), or give --resume --out DIR")
    overrides = _overrides(settings, seed, data)
    if download:
        overrides.append("data.download=true")
    if storage is not None and out_folder is not None:
        raise UserError("--out is the run folder and --storage where run folders lie; give one")
    folder = as_path(out_folder or f"{(storage or 'runs').rstrip('/')}/{recipe}")
    what = (recipe, overrides, folder, chosen_stages, resume, overwrite, out)
    counts = _workers(workers)
    try:
        if counts is None:
            _refuse_alone(gpu=gpu, cpus_per_worker=cpus_per_worker, address=address)
            result = run_here(*what)
        else:
            scale_out = _launcher()
            scale = scale_out.Scale(counts, gpu, cpus_per_worker, address, wait)
            result = scale_out.run_on_ray(*what, scale)
    except Interrupted:
        command = f"snscc run --resume --out {shlex.quote(str(folder))}"
        if counts is not None:
            command += f" --workers {workers}" + " --gpu" * gpu
            command += f" --address {address}" if address else ""
        _fail(f"stopped; continue with: {command}", 130)
    if result is not None:
        _print_result(result.figures, result.folder)


@app.command()
def sweep(
    space: Annotated[
        str,
        typer.Argument(
            help="epsilon, gamma, sigma, neighbors, grid, ablation-train, ablation-boost, "
            "train-longer, pretext, or FILE.py:FUNCTION"
        ),
    ],
    recipe: Annotated[str, typer.Option(help="what the points override")] = "digits",
    data: Annotated[str | None, typer.Option(help="folder of images or Parquet shards")] = None,
    out_folder: Annotated[
        str | None, typer.Option("--out", help="sweep folder  [default: runs/RECIPE-SPACE]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of every point, from --seed on")] = 3,
    seed: Annotated[int | None, typer.Option(help="the first seed")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="override any field of the recipe"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="only so many points, drawn at random")
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help="none, asha or median: stops trials that fall behind")
    ] = "none",
    metric: Annotated[
        str, typer.Option(help="what is searched for; label-free unless you name oracle/acc")
    ] = "health/score",
    grace: Annotated[int, typer.Option(min=1, help="epochs before a trial may be stopped")] = 2,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the sweep in --out")
    ] = False,
    max_concurrent: Annotated[
        int | None,
        typer.Option(min=1, help="trials at a time, if fewer than fit", rich_help_panel=_SCALE),
    ] = None,
    cpus_per_trial: Annotated[
        float, typer.Option(min=0.01, help="of each worker", rich_help_panel=_SCALE)
    ] = 1.0,
    gpus_per_trial: Annotated[
        float, typer.Option(min=0, help="of each worker; .25 shares a GPU", rich_help_panel=_SCALE)
    ] = 0.0,
    workers_per_trial: Annotated[
        int, typer.Option(min=1, help="Ray Train workers of each trial", rich_help_panel=_SCALE)
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option(help="the Ray cluster to join: auto, or HOST:PORT", rich_help_panel=_SCALE),
    ] = None,
) -> None:
    """Run a search space, sharing the stages that trials have in common; the same command resumes.

    Examples:

        snscc sweep epsilon

        snscc sweep sigma --recipe cifar10 --data ~/cifar --gpus-per-trial .25

        snscc sweep grid --scheduler asha --samples 40

        snscc sweep my_space.py:space --recipe images --data ~/photos
    """
    from snscc_ray.engine import Interrupted
    from snscc_ray.paths import as_path

    if scheduler not in ("none", "asha", "median"):
        raise UserError(f"--scheduler {scheduler}: use none, asha or median")
    if metric not in _METRICS:
        raise UserError(f"--metric {metric}: use one of {', '.join(_METRICS)}")
    overrides = _overrides(settings, seed, data)
    chosen = recipes.override(recipes.get(recipe), overrides)
    label = space.replace(".py:", "-").replace("/", "-")
    folder = as_path(out_folder or f"runs/{recipe}-{label}")
    if metric.startswith("oracle/"):
        out.print(f"Searching by {metric}, which reads the labels, as asked.", highlight=False)
    try:
        from snscc_ray.sweep_run import Options, run_sweep
    except ImportError as error:
        raise UserError(f"sweeps need Ray ({error}); pip install 'ray[data,train,tune]'") from error
    options = Options(
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
        summary = run_sweep(
            space, chosen, folder, options, out, seeds=seeds, samples=samples, overwrite=overwrite
        )
    except (Interrupted, KeyboardInterrupt):
        _fail("stopped; the same command again goes on from here", 130)
    out.print(summary.text, highlight=False, markup=False, soft_wrap=True)
    out.print(f"\nSweep folder: {folder}", highlight=False, markup=False, soft_wrap=True)


@app.command("recipes")
def list_recipes(
    name: Annotated[str | None, typer.Argument(help="print this one as JSON")] = None,
) -> None:
    """List the recipes, or print one as JSON.

    Examples:

        snscc recipes

        snscc recipes cifar10
    """
    if name is not None:
        print(recipes.get(name).model_dump_json(indent=2))
        return
    table = Table("recipe", "what", box=None)
    for key, build in recipes.RECIPES.items():
        table.add_row(key, (build.__doc__ or "").strip())
    out.print(table)


@app.command("pack")
def pack_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the images, nested or not")],
    shards: Annotated[str, typer.Argument(metavar="OUT", help="folder for the shards")],
    shard_mb: Annotated[int, typer.Option(min=1, max=2000, help="size of a shard, about")] = 64,
    image_size: Annotated[
        int | None,
        typer.Option(min=4, max=1024, help="make larger images squares of this side, encoded anew"),
    ] = None,
    folders_are_labels: Annotated[
        bool, typer.Option("--folders-are-labels", help="sub-folder names become labels")
    ] = False,
    jobs: Annotated[int, typer.Option(min=0, help="processes; 0: one per core")] = 0,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="leave out unreadable images, and list them")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the shards that a pack left in OUT")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="only check the finished shards in OUT")
    ] = False,
) -> None:
    """Write a folder of images as Parquet shards; the same command again continues.

    Examples:

        snscc pack ~/photos shards/photos

        snscc pack imagenet/train shards/imagenet --image-size 256 --folders-are-labels

        snscc pack ~/photos shards/photos --verify
    """
    # Imported here: torch takes seconds, which --help should not wait for.
    from snscc_ray import pack
    from snscc_ray.paths import as_path

    place = as_path(shards)
    if verify and overwrite:
        raise UserError("--verify checks shards and --overwrite replaces them; give one of them")
    if verify:
        found = pack.verify(place, jobs, out)
    else:
        options = pack.Options(shard_mb, image_size, folders_are_labels)
        try:
            found = pack.pack(
                folder.expanduser(),
                place,
                options,
                jobs=jobs,
                skip_corrupt=skip_corrupt,
                overwrite=overwrite,
                console=out,
            )
        except KeyboardInterrupt:
            _fail("stopped; the same command again keeps the finished shards", 130)
    rate = f", {found.packed / found.seconds:,.0f} images/s" if found.packed else ""
    lines = [
        f"{'OK: ' * verify}{found.shards:,} shards, {found.rows:,} rows, "
        f"{found.bytes / 1e6:,.1f} MB, {len(found.skipped):,} skipped{rate}"
    ]
    if found.skipped:
        lines.append(f"Left out: {place / pack.SKIPPED}")
    if not verify:
        command = f"snscc run images --data {shlex.quote(str(place))} --set data.num_clusters=..."
        lines.append(f"Next: {command}")
    out.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what this machine offers and what a run would use.

    Example:

        snscc doctor
    """
    from snscc_ray.doctor import examine

    table = Table(box=None, show_header=False)
    for name, finding in examine():
        table.add_row(name, finding)
    out.print(table)


def _overrides(settings: list[str] | None, seed: int | None, data: str | None) -> list[str]:
    found = list(settings or [])
    if seed is not None:
        found.append(f"seed={seed}")
    if data is not None:
        place = data if "://" in data else str(Path(data).expanduser())
        found.append(f"data.path={json.dumps(place)}")
    return found


def _workers(text: str) -> tuple[int, int] | None:
    """Fewest and most, or None for this process."""
    try:
        fewest, _, most = text.partition(":")
        counts = int(fewest), int(most or fewest)
    except ValueError:
        counts = (-1, -1)
    if counts == (0, 0):
        return None
    if not 1 <= counts[0] <= counts[1]:
        raise UserError(f"--workers {text}: give a number, 0 for none, or MIN:MAX as in 2:8")
    return counts


def _launcher() -> Any:
    try:
        from snscc_ray import launch
    except ImportError as error:
        raise UserError(
            f"--workers needs Ray ({error}); pip install 'ray[data,train,tune]', or leave "
            "--workers out"
        ) from error
    return launch


def _refuse_alone(**given: object) -> None:
    """Options that mean nothing without workers are mistakes, not wishes to be ignored."""
    for name, value in given.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is for Ray workers; add --workers N")


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
        table.add_row("k-means on pixels", *_cells(baselines["kmeans_pixels"]), style="dim")
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
        out.print(f"{figures['skipped']} unreadable images were left out.")
    out.print(f"\nRun folder: {folder}", highlight=False, markup=False, soft_wrap=True)


def _cells(row: dict[str, float]) -> list[str]:
    def show(name: str, form: str) -> str:
        return format(row[name], form) if name in row else "-"

    return [
        *(show(f"oracle/{name}", ".3f") for name in ("acc", "nmi", "ari")),
        show("health/confident_share", ".0%"),
        show("health/clusters_in_use", "d"),
        show("seconds", ".1f"),
    ]


def main() -> None:
    """Run the command line; a mistake is one line on stderr and exit status 2."""
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        _fail(str(error), 2)
    except TrainingError as error:
        _fail(str(error), 1)
    except _UsageError as error:
        if not error.format_message():  # no arguments: the help has been printed
            sys.exit(0)
        _fail(f"{error.format_message()} (snscc --help teaches)", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"no space left{where}: free some space and continue with --resume", 2)
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; check the paths given and their rights", 2)


def _fail(message: str, status: int) -> NoReturn:
    print("snscc: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
