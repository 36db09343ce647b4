"""`snscc similar`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from snscc_ray.cli.options import out, say
from snscc_ray.config.errors import UserError
from snscc_ray.texts import shown


def similar(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    queries: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUERY",
            help="image files, or ids of the run's own images (as in assignments.parquet; a file "
            "of that name is preferred); of a run on embeddings, .npy files or ids",
        ),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="WORD",
            help="also the images that fit this word best; the words are those of the classes that "
            "the run's encoder was trained with, such as the 1,000 of ImageNet; repeat for more",
        ),
    ] = None,
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, max=1000, help="images to list for each QUERY")
    ] = 20,
    out_file: Annotated[
        str | None,
        typer.Option("--out", "-o", help="also write a page with the pictures, .html"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace --out")] = False,
) -> None:
    """List the images of a finished run that are most like another image.

    Prints id, cluster and similarity, the most similar first. The similarity is the cosine of two
    features of the run's encoder. With -o, the images are also shown on one HTML page, which opens
    without a network.

    Examples:

        snscc similar runs/photos dog.jpg

        snscc similar runs/photos dog.jpg church.jpg -n 50 -o similar.html

        snscc similar runs/photos 2024/IMG_0007.jpg

        snscc similar runs/photos --text church --text "garbage truck"
    """
    if not queries and not texts:
        raise UserError("give an image file, an id of an image of the run, or --text WORD")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: use auto, cpu or cuda")
    if out_file is not None and not out_file.endswith(".html"):
        raise UserError(f"--out {out_file}: give a name that ends in .html")
    say(f"snscc similar {run} {' '.join([*(queries or ()), *(texts or ())])}")  # imports take long
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.similar import SimilarRequest
    from snscc_ray.answers.similar import similar as find
    from snscc_ray.config.paths import as_path
    from snscc_ray.core.claim import claimed_file
    from snscc_ray.core.storage import check_writable

    target = None if out_file is None else as_path(out_file)
    with ExitStack() as held:
        if target is not None:
            if target.is_dir():
                raise UserError(f"--out {out_file} is a folder; give a file, such as similar.html")
            check_writable(target)
            held.enter_context(claimed_file(target, say))
            if target.exists() and not overwrite:
                raise UserError(f"{out_file} exists; use --overwrite, or another --out")
        request = SimilarRequest(
            as_path(run), tuple(queries or ()), number, target, tuple(texts or ())
        )
        answers = find(request, out, device)
    for answer in answers:
        out.print()
        say(f"{answer.query}: {answer.cluster}{', one of the run' * (answer.row is not None)}")
        table = Table("similarity", "cluster", box=None)
        table.add_column("id", overflow="fold")
        for one in answer.found:
            line = (f"{one.similarity:.3f}", shown(one.cluster), shown(one.id))
            table.add_row(*map(Text, line))
        out.print(table)
    if out_file is not None:
        out.print()
        say(f"Pictures: {out_file}")
