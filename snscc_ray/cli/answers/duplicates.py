"""`snscc duplicates`."""

from __future__ import annotations

from typing import Annotated

import typer

from snscc_ray.cli.options import out, say
from snscc_ray.config.errors import UserError
from snscc_ray.texts import counted


def duplicates(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    out_file: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="CSV file to write")
    ] = "duplicates.csv",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace --out")] = False,
) -> None:
    """Find equal and nearly equal images of a finished run, and say which of them to keep.

    Nearly equal: resized, compressed again, or cropped by a few per cent. Each is compared pixel by
    pixel with the one to keep: the largest in pixels, of these the sharpest, of these the oldest.
    Nothing is removed or moved. Look at the file, change `keep` where you disagree, and give it to
    `snscc sort`.

    Writes group, id, keep, why, similarity (1: equal), width, height and bytes. Of a run on
    embeddings it compares the features only.

    Examples:

        snscc duplicates runs/photos

        snscc duplicates runs/photos -o twice.csv

        snscc sort runs/photos --into sorted --duplicates twice.csv
    """
    say(f"snscc duplicates {run}")  # the imports take seconds
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.duplicates import find_duplicates, write_duplicates
    from snscc_ray.config.paths import as_path
    from snscc_ray.core.claim import claimed_file
    from snscc_ray.core.display import Display
    from snscc_ray.core.storage import check_writable

    target = as_path(out_file)
    if target.is_dir():
        raise UserError(f"--out {out_file} is a folder; give a file, such as duplicates.csv")
    if target.suffix.lower() != ".csv":
        raise UserError(f"--out {out_file}: end its name in .csv")
    check_writable(target)
    with claimed_file(target, say):
        if target.exists() and not overwrite:
            raise UserError(f"{out_file} exists; use --overwrite, or another --out")
        found = find_duplicates(as_path(run), Display(out))
        write_duplicates(found.lines, target)
    for note in found.notes:
        say(note)
    for name, reason in found.left:
        say(f"left out {name}: {reason}")
    groups = sum(line.keep for line in found.lines)
    spare = len(found.lines) - groups
    size = sum(line.size or 0 for line in found.lines if not line.keep)
    say(
        f"{counted(groups, 'group')}, with {counted(spare, 'image')} not to keep "
        f"({size / 1e6:,.1f} MB): {out_file}"
    )
    if found.left:
        say(f"{counted(len(found.left), 'image')} left out")
        raise typer.Exit(1)
