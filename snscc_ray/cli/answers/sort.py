"""`snscc sort`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from snscc_ray.cli.options import out, say
from snscc_ray.config.errors import UserError
from snscc_ray.texts import counted, shown


def sort(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="folder of a finished run on image files")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="new or empty folder, outside of the images' folder"),
    ] = None,
    link: Annotated[
        bool,
        typer.Option(
            "--link", help="a second name for each file, which takes no space  [default: this]"
        ),
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="a copy of each file")] = False,
    move: Annotated[bool, typer.Option("--move", help="move each file")] = False,
    min_confidence: Annotated[
        float,
        typer.Option(min=0, max=1, help="images below it go to DIR/doubtful/GROUP"),
    ] = 0.0,
    by: Annotated[
        str,
        typer.Option(
            metavar="name|cluster", help="a folder per name (clusters may share one), or cluster"
        ),
    ] = "name",
    duplicates: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="a file of `snscc duplicates`: what it does not keep goes to DIR/duplicates/GROUP",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="do it; without it, only say what would be done")
    ] = False,
    undo: Annotated[
        str | None, typer.Option(metavar="DIR", help="put back what a sort into DIR has done")
    ] = None,
) -> None:
    """Put the images of a finished run into a folder per group.

    Without --yes nothing is touched: it prints the folders, and the command that makes them. No
    file is ever overwritten, and --undo DIR puts everything back. Files that are gone or were
    changed since the run are left out and named; the exit status is then 1.

    --link (the default) makes hard links. Photo programs and file managers show them as ordinary
    files. Removing one keeps the image; editing one in place edits the image. They stay good when
    you move the images later. On another disk, or one without hard links, they are symbolic links.

    --move leaves the run without its images until --undo: make reports and exports before it.

    Examples:

        snscc sort runs/photos --into sorted

        snscc sort runs/photos --into sorted --min-confidence 0.9 --duplicates duplicates.csv --yes

        snscc sort --undo sorted
    """
    if undo is not None:
        if run is not None or into is not None:
            raise UserError("--undo needs no RUN and no --into: snscc sort --undo DIR")
        _undo(undo)
        return
    if run is None:
        raise UserError("give the RUN to sort, or --undo DIR")
    if into is None:
        raise UserError("give the folder for the groups: --into DIR")
    if link + copy + move > 1:
        raise UserError("--link, --copy and --move exclude each other; give one of them")
    if by not in ("name", "cluster"):
        raise UserError(f"--by {by}: use name or cluster")
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.carry import carry_out
    from snscc_ray.answers.sort import (
        SortRequest,
        check_target,
        folders_to_make,
        make_plan,
    )
    from snscc_ray.config.paths import as_path
    from snscc_ray.core.claim import claimed
    from snscc_ray.core.display import Display

    display = Display(out)
    request = SortRequest(
        as_path(run),
        as_path(into),
        "copy" if copy else "move" if move else "link",
        min_confidence,
        "cluster" if by == "cluster" else "name",
        None if duplicates is None else as_path(duplicates),
    )
    plan = make_plan(request, display)
    table = Table("folder", "images", "MB", box=None)
    for name, (images, size) in plan.folders().items():
        table.add_row(shown(name), f"{images:,}", f"{size / 1e6:,.1f}")
    out.print(table)
    out.print()
    for note in plan.notes:
        say(note)
    left = plan.left
    if yes:
        made = folders_to_make(request.into)
        with claimed(request.into, say):
            check_target(request.into, plan.images)
            done = carry_out(plan, request, made, display)
        left = done.left
    for name, reason in left:
        say(f"left out {name}: {reason}")
    if left:
        say(f"{counted(len(left), 'image')} left out")
    if yes:
        how = {"link": "linked", "copy": "copied", "move": "moved"}[request.action]
        also = f" ({done.symbolic:,} of them by symbolic links)" if done.symbolic else ""
        say(f"{counted(done.done, 'image')} {how}{also}: {into}")
        say(f"To undo it: {shlex.join(['snscc', 'sort', '--undo', into])}")
    else:
        doing = {"link": "linked", "copy": "copied", "move": "moved"}[request.action]
        say(f"Nothing is done yet; {counted(len(plan.items), 'image')} would be {doing}. To do it:")
        say(f"  {shlex.join(['snscc', *sys.argv[1:], '--yes'])}")
    if left:
        raise typer.Exit(1)


def _undo(folder: str) -> None:
    from snscc_ray.answers.journal import made_for, remove_made, undo
    from snscc_ray.config.paths import as_path
    from snscc_ray.core.claim import claimed
    from snscc_ray.core.display import Display

    into: Path = as_path(folder)
    made = made_for(into)
    display = Display(out)
    with claimed(into, say):
        found = undo(into, display.counting("putting back", "files"))
    display.finish()
    for note in found.notes:
        say(note)
    for path, reason in found.left:
        say(f"left {path}: {reason}")
    removed = {"link": counted(found.done, "link"), "copy": counted(found.done, "copy", "copies")}
    if found.action == "move":
        say(f"{counted(found.done, 'file')} put back")
    else:
        say(f"{removed[found.action]} removed; the images are where they were")
    if found.left:
        say(
            f"{counted(len(found.left), 'file')} left; once that is mended, the same command again "
            "tries them again"
        )
        raise typer.Exit(1)
    remove_made(made)
    if into.exists():
        say(f"{into} stays: it holds other files, or was there before")
