"""`snscc report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from snscc_ray.cli.options import out, say
from snscc_ray.config.errors import UserError


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    out_file: Annotated[
        str | None,
        typer.Option("--out", "-o", help="HTML file to write  [default: RUN/report.html]"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="another run on the same images: show what moved from it to this one",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    open_it: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
) -> None:
    """Make one web page of a finished run, to view and to share.

    It shows whether the run can be trusted; typical and doubtful images of each cluster; the images
    between two clusters; a map of the images; near-duplicates and outliers; and every setting. It
    is one file that opens without a network, with small copies of your images. Its numbers are in a
    .json file beside it.

    With --against it also shows what differs from another run, such as one with more clusters:
    which clusters stayed, split or merged, and images that moved. Images are matched by their ids.

    Examples:

        snscc report runs/digits --open

        snscc report runs/images --out ~/photos.html

        snscc report runs/photos-12 --against runs/photos-10 --out ~/moved.html
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: use auto, cpu or cuda")
    if out_file is not None and not out_file.endswith(".html"):
        raise UserError(f"--out {out_file}: give a name that ends in .html")
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.report import report as make_report
    from snscc_ray.config.paths import as_path, is_url
    from snscc_ray.core.claim import claimed, claimed_file
    from snscc_ray.core.display import Display
    from snscc_ray.core.storage import check_writable
    from snscc_ray.runs.folder import read_recipe

    folder = as_path(run)
    target = as_path(out_file) if out_file is not None else folder / "report.html"
    if open_it and is_url(target):
        raise UserError("--open shows a file on this machine; give one with --out")
    read_recipe(folder)  # fails before a missing folder could be created
    check_writable(target)
    with claimed(folder, say), claimed_file(target, say):
        other = as_path(against) if against is not None else None
        data_file = make_report(folder, target, Display(out), device=device, against=other)
    out.print()
    say(f"Report: {target} (its numbers: {data_file})")
    if open_it:
        webbrowser.open(Path(target).absolute().as_uri())
