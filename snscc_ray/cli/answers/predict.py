"""`snscc predict`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from snscc_ray.cli.options import SCALE, Address, Gpu, launcher, out, place_of, refuse_alone, say
from snscc_ray.config.errors import UserError
from snscc_ray.texts import counted, shown


def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="folder of images, shards, or embeddings")
    ],
    out_file: Annotated[
        str, typer.Option("--out", "-o", help="file to write, .parquet or .csv")
    ] = "predictions.parquet",
    top: Annotated[int, typer.Option(min=1, help="number of clusters to list for each image")] = 3,
    nearest: Annotated[
        int,
        typer.Option(
            min=0, help="number of most similar images of the run to list for each; 0: none"
        ),
    ] = 3,
    column: Annotated[
        str | None,
        typer.Option(help="column of the embeddings  [default: as in the run, or the only one]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace --out")] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Ray workers; 0: this process, without Ray", rich_help_panel=SCALE
        ),
    ] = 0,
    gpu: Gpu = False,
    address: Address = None,
) -> None:
    """Assign new images to the clusters of a finished run, without training.

    Writes id, cluster, confidence, top_clusters, top_confidences, nearest and nearest_similarity,
    and name if the clusters have names (`snscc name`).

    Examples:

        snscc predict runs/digits new_images/

        snscc predict runs/images ~/new_photos -o new.csv

        snscc predict runs/images s3://bucket/shards -o new.parquet --workers 8 --gpu --address auto
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: use auto, cpu or cuda")
    if workers == 0:
        refuse_alone(gpu=gpu, address=address)
    elif device != "auto":
        raise UserError(
            "--device applies only without --workers; leave it out with --workers, or add --gpu"
        )
    say(f"snscc predict {run} {data}")  # the imports take seconds
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.predict import PredictRequest
    from snscc_ray.answers.predict import predict as predict_here
    from snscc_ray.answers.table import check_name
    from snscc_ray.cluster.scale import Scale
    from snscc_ray.config.paths import as_path
    from snscc_ray.core.claim import claimed_file
    from snscc_ray.core.storage import check_writable
    from snscc_ray.runs.folder import check_apart

    target = as_path(out_file)
    if target.is_dir():
        raise UserError(f"--out {out_file} is a folder; give a file, such as new.parquet")
    check_name(target)
    check_writable(target)
    if target.suffix.lower() == ".parquet":  # inside DATA, the next call would read it as images
        check_apart(target.parent, place_of(data))
    question = PredictRequest(as_path(run), place_of(data), target, top, nearest, column)
    with claimed_file(target, say):
        if target.exists() and not overwrite:
            raise UserError(f"{out_file} exists; use --overwrite, or another --out")
        if workers:
            scale = Scale(
                (workers, workers),
                gpu,
                address=address,
                fewer="use fewer --workers",
                smaller="leave --gpu out",
            )
            launcher()  # raises UserError if Ray is not installed
            from snscc_ray.cluster.predict import predict_on_ray

            found = predict_on_ray(question, out, scale)
        else:
            found = predict_here(question, out, device)
    named = "name" in found.table.column_names  # clusters with one name are one group
    table = Table("cluster", *(["name"] if named else []), "images", "mean confidence", box=None)
    sizes = found.table.group_by("name" if named else "cluster").aggregate(
        [("cluster", "distinct"), ("id", "count"), ("confidence", "mean")]
    )
    for row in sorted(sizes.to_pylist(), key=lambda row: min(row["cluster_distinct"])):
        table.add_row(
            ", ".join(map(str, sorted(row["cluster_distinct"]))),
            # Not as markup: a name may hold brackets.
            *([Text(shown(row["name"]))] if named else []),
            f"{row['id_count']:,}",
            f"{row['confidence_mean']:.3f}",
        )
    out.print(table)
    left_out = f", {found.left_out:,} unreadable left out" if found.left_out else ""
    out.print()
    say(f"{counted(found.table.num_rows, 'image')}{left_out}: {out_file}")
