"""`snscc fit`."""

from __future__ import annotations

import json
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

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
    for_scripts,
    launcher,
    out,
    place_of,
    refuse_alone,
    say,
    scale_of,
    seconds_of,
)
from snscc_ray.config.errors import UserError
from snscc_ray.texts import counted, shown

if TYPE_CHECKING:
    from snscc_ray.config.settings import EncoderSettings
    from snscc_ray.core.display import Display
    from snscc_ray.fit.fit import FitResult


def fit(
    context: typer.Context,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="folder of images, shards, or embeddings")
    ],
    clusters: Annotated[str, typer.Option(help="number of kinds, or auto to estimate it")] = "auto",
    out_folder: Annotated[
        str | None, typer.Option("--out", help="run folder  [default: runs/NAME OF DATA]")
    ] = None,
    max_cluster_imbalance: Annotated[
        float,
        typer.Option(min=1, help="largest allowed ratio of the most frequent to the rarest kind"),
    ] = 1.0,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="a trained one, which stays frozen: timm:NAME, torchvision:NAME, timm:NAME=FILE "
            "or a checkpoint; give it again to use several. With --from-scratch, convnet, resnet18 "
            "and others name the kind of the new one  [default: pip:efficientnet_lite0 for "
            "photographs if it is installed, else a new one]"
        ),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="train a new encoder on these images alone")
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(min=4, max=1024, help="in pixels  [default: by data and machine]")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="time to use, such as 90s, 25m or 2h  [default: as long as needed, at most "
            "30m without a GPU and 2h with one]",
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="column of the embeddings, if DATA holds some  [default: the only one]"),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels",
            help="names of sub-folders are labels, used only to measure: the first ones, or those "
            "below train, val, test and the like",
        ),
    ] = False,
    labels_deepest: Annotated[
        bool,
        typer.Option("--labels-deepest", help="as --labels, but the folder that holds the file"),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="random seed")] = None,
    settings: Settings = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the run in --out")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="print only the end: what was found, and where it is")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="for scripts: print one JSON object at the end, and all else to stderr (with "
            "--quiet: nothing else)",
        ),
    ] = False,
    workers: Workers = "0",
    gpu: Gpu = False,
    cpus_per_worker: Cpus = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="folder or URL for runs, such as s3://BUCKET/runs; --out is then STORAGE/NAME OF "
            "DATA",
            rich_help_panel=SCALE,
        ),
    ] = None,
    address: Address = None,
    wait: Wait = 600.0,
) -> None:
    """Cluster a folder of images, without labels or settings.

    Chooses image size, encoder, batch size and epochs from the images and the machine. Prints the
    choices, the reasons and the expected time, runs, and writes a report. The same command
    continues a stopped or killed run.

    Examples:

        snscc fit ~/photos

        snscc fit ~/photos --clusters 12 --budget 10m

        snscc fit ~/photos --max-cluster-imbalance 10 --out runs/uneven

        snscc fit s3://bucket/shards --encoder torchvision:resnet50

        snscc fit embeddings.npy --clusters 20

        snscc fit ~/photos --json > found.json

        snscc fit s3://bucket/shards --workers 8 --gpu --address auto --storage s3://bucket/runs
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: use auto, cpu or cuda")
    context.with_resource(for_scripts(quiet=quiet, aside=as_json))
    began, count = time.monotonic(), _count(clusters)
    seconds = None if budget is None else seconds_of(budget)
    place = place_of(data)
    if labels and labels_deepest:
        raise UserError("--labels and --labels-deepest exclude each other; give one of them")
    say(f"snscc fit {place}")  # the imports take seconds
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.report import report
    from snscc_ray.core.claim import claimed
    from snscc_ray.core.display import Display
    from snscc_ray.core.storage import read_json
    from snscc_ray.data.loading.bank import FeatureBank
    from snscc_ray.fit.choose import Preferences
    from snscc_ray.fit.fit import FitRequest, fit_on, look_at, name_of
    from snscc_ray.fit.here import Here
    from snscc_ray.models.pretrained import encoder_settings, together
    from snscc_ray.runs.folder import NAMES_FILE, check_apart
    from snscc_ray.training.engine import Interrupted
    from snscc_ray.training.workers import choose_device

    chosen = together([encoder_settings(text) for text in encoder or ()])
    if chosen is not None:
        _check_chosen(chosen, from_scratch)
    folder = folder_in(storage, out_folder, name_of(place))
    counts = counts_of(workers)
    if counts is None:
        refuse_alone(gpu=gpu, cpus_per_worker=cpus_per_worker, address=address)
    elif device != "auto":
        raise UserError(f"--device {device} is for this process; with --workers use --gpu or not")
    elif budget is not None:
        raise UserError("--budget measures this process; leave it out with --workers")
    request = FitRequest(
        source=place,
        folder=folder,
        wishes=Preferences(count, image_size, max_cluster_imbalance, chosen, from_scratch),
        folders_are_labels="deepest" if labels_deepest else labels,
        overrides=(
            *(settings or ()),
            *([] if seed is None else [f"seed={seed}"]),
            *([] if column is None else [f"data.column={json.dumps(column)}"]),
        ),
        budget=seconds,
        device=device,
        overwrite=overwrite,
    )
    page = folder / "report.html"
    check_apart(folder, place)
    with ExitStack() as stack:
        stack.enter_context(claimed(folder, say))
        try:
            display = Display(out)
            start = look_at(request, display)
            if counts is None:
                machine = Here(choose_device(device), display)
            else:
                scale = scale_of(counts, gpu, cpus_per_worker, address, wait)
                machine = stack.enter_context(launcher().workers_of(scale, display))
            fitted = fit_on(machine, request, start, display)
        except (Interrupted, KeyboardInterrupt):
            fail(f"stopped; run the same command again to continue {shlex.quote(str(folder))}", 130)
        called, untold = _name(folder, display)
        _show(fitted, folder, called)
        found = read_json(report(folder, page, display, device=device, loaded=fitted.images))
    measured = _measured(fitted.result.figures)
    if as_json:
        print(json.dumps({**_as_values(found, folder, page), "measured": measured}))
    out.quiet = quiet and as_json
    out.print()
    for line in _in_short(found):
        say(line)
    if measured is not None:
        values = ", ".join(f"{name.upper()} {value:.3f}" for name, value in measured.items())
        say(f"Measured against the labels: {values}.")
    given, told = isinstance(fitted.images[1], FeatureBank), ""
    if fitted.expected_end is not None:
        told = f" (predicted: {(fitted.expected_end - began) / 60:.1f})"
    say(f"It took {(time.monotonic() - began) / 60:.1f} minutes{told}.")
    say(f"Which {'rows' if given else 'images'} are together: {folder / 'assignments.parquet'}")
    say(f"Report: {page}")
    quoted = shlex.quote(str(folder))
    if untold:
        say(f"Names: no words are known ({untold}); yours: snscc name {quoted} --names FILE")
    else:
        say(f"Names of the clusters, to edit: {folder / NAMES_FILE}")
    new, where = ("embeddings", "FILE") if given else ("images", "FOLDER")
    say(f"New {new}: snscc predict {quoted} {where}")


def _as_values(found: dict[str, Any], folder: Path, page: Path) -> dict[str, Any]:
    """Return what a script needs. found: the report's values."""
    summary = found["summary"]
    return {
        "run": str(folder),
        "images": summary["images"],
        "left_out": summary["skipped_total"],
        "notes": summary["notes"],
        "clusters": summary["clusters"],
        "names": [line["label"] for line in found["clusters"]],
        "verdict": found["trust"]["verdict"],
        "assignments": str(folder / "assignments.parquet"),
        "report": str(page),
    }


def _measured(figures: dict[str, Any]) -> dict[str, float] | None:
    """Return what the last stage's clusters have against the labels; None without labels."""
    last = list(figures["stages"].values())[-1]
    if "oracle/acc" not in last:
        return None
    return {name: last[f"oracle/{name}"] for name in ("acc", "nmi", "ari")}


def _in_short(found: dict[str, Any]) -> list[str]:
    """Say how many groups there are, how sure that is, and what to look at first."""
    summary, trust = found["summary"], found["trust"]
    used = [line for line in found["clusters"] if line["size"]]
    sizes = [line["size"] for line in used]
    left_out = f" ({summary['skipped_total']:,} left out)" if summary["skipped_total"] else ""
    worst = [s for level in ("bad", "caution") for s in trust["sentences"] if s["level"] == level]
    if worst:
        first = f"{worst[0]['text']} {worst[0]['todo']}".strip()
    else:
        least = min(used, key=lambda line: float(line["confidence"]))
        label, number = least["label"], f"cluster {least['cluster']}"
        which = number if label == number else f"{number} ({label})"
        first = f"{which} in the report, the least sure one"
    return [
        f"Groups: {len(used)}, of {min(sizes):,} to {max(sizes):,} each; {summary['images']:,} in "
        f"all{left_out}.",
        f"How sure: {trust['verdict']}. {trust['summary'].partition('. ')[0].rstrip('.')}.",
        f"Look first at: {first}",
    ]


def _check_chosen(encoder: EncoderSettings, from_scratch: bool) -> None:
    """Refuse a trained encoder with --from-scratch, and a new one without it. Raises UserError."""
    name, trained = encoder.name, encoder.weights is not None
    if trained and from_scratch:
        raise UserError(
            f"--encoder {name} is a trained one, and it and --from-scratch exclude each other; use "
            "one of them"
        )
    if not trained and not from_scratch:
        known = "" if name == "convnet" else f"torchvision:{name} is, and "
        raise UserError(
            f"--encoder {name} is not trained: {known}--from-scratch trains a new {name} on these "
            "images alone, which takes hours without a GPU"
        )


def _count(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 2:
        raise UserError(f"--clusters {text}: give a number of 2 or more, or auto")
    return int(text)


def _name(folder: Path, display: Display) -> tuple[list[str] | None, str | None]:
    """Return labels of the clusters, if some have names, and why none are suggested, or None."""
    from snscc_ray.answers.words import NoWords, name_clusters

    try:
        named = name_clusters(folder, display)
    except NoWords as error:
        return None, str(error)
    return named.naming.labels(), named.missing


def _show(fitted: FitResult, folder: Path, labels: list[str] | None) -> None:
    from snscc_ray.core.tables import read_table

    found = read_table(folder / "assignments.parquet", ["id", "cluster", "confidence"])
    name = ["name"] if labels else []
    table = Table("cluster", *name, "images", "share", "mean confidence", box=None)
    sizes = found.group_by("cluster").aggregate([("id", "count"), ("confidence", "mean")])
    for row in sizes.sort_by("cluster").to_pylist():
        table.add_row(
            str(row["cluster"]),
            *([Text(shown(labels[row["cluster"]]))] if labels else []),
            f"{row['id_count']:,}",
            f"{row['id_count'] / found.num_rows:.0%}",
            f"{row['confidence_mean']:.2f}",
        )
    out.print()
    out.print(table)
    figures = fitted.result.figures
    if figures["skipped"]:
        left_out = counted(figures["skipped"], "unreadable image")
        say(f"Left out: {left_out}, named in the report.")
