"""`snscc predict`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from snscc_ray.cli.options import out, place_of
from snscc_ray.errors import UserError


def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="folder of images, or shards")],
    out_file: Annotated[
        str, typer.Option("--out", "-o", help="Parquet file to write")
    ] = "predictions.parquet",
    top: Annotated[int, typer.Option(min=1, help="clusters to list for each image")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace --out")] = False,
) -> None:
    """Put new images into the clusters of a finished run; no training.

    Writes id, cluster, confidence, top_clusters and top_confidences.

    Examples:

        snscc predict runs/digits new_images/

        snscc predict runs/images s3://bucket/shards -o new.parquet
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: use auto, cpu or cuda")
    # Imported here: torch takes seconds, which --help should not wait for.
    from snscc_ray.paths import as_path
    from snscc_ray.predict import predict as predict_images

    target = as_path(out_file)
    if target.is_dir():
        raise UserError(f"--out {out_file} is a folder; give a file, such as new.parquet")
    if target.exists() and not overwrite:
        raise UserError(f"{out_file} exists; use --overwrite, or another --out")
    images, found = predict_images(
        as_path(run), place_of(data), target, out, device=device, top=top
    )
    table = Table("cluster", "images", "mean confidence", box=None)
    sizes = found.group_by("cluster").aggregate([("id", "count"), ("confidence", "mean")])
    for row in sizes.sort_by("cluster").to_pylist():
        table.add_row(str(row["cluster"]), f"{row['id_count']:,}", f"{row['confidence_mean']:.3f}")
    out.print(table)
    left_out = f", {len(images.skipped)} unreadable ones left out" if images.skipped else ""
    out.print(
        f"\n{found.num_rows:,} images{left_out}: {out_file}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
