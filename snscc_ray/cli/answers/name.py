"""`snscc name`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from snscc_ray.cli.options import out, say
from snscc_ray.texts import shown

if TYPE_CHECKING:
    from snscc_ray.answers.words import Named


def name(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    names: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="your own names: CSV with the columns cluster and name"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace names that you have changed, too")
    ] = False,
) -> None:
    """Name the clusters of a finished run, and list the names.

    Suggests a word for each cluster if the run's encoder was trained with words, as those for
    photographs are. Writes RUN/names.csv: edit the column `name` as you like. `snscc predict`,
    `snscc export` and `snscc report` use the names. Clusters with the same name count as one group.
    The same command again keeps what you have changed.

    Confidence: the share of the cluster's images whose own first word it is. A suggestion below 10%
    is listed, but the cluster gets no name.

    Examples:

        snscc name runs/photos

        snscc name runs/photos --names my.csv

        snscc name runs/photos --overwrite
    """
    say(f"snscc name {run}")  # the imports take seconds
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.words import NoWords, name_clusters
    from snscc_ray.config.paths import as_path
    from snscc_ray.core.claim import claimed
    from snscc_ray.core.display import Display
    from snscc_ray.core.storage import check_writable
    from snscc_ray.runs.folder import NAMES_FILE, read_recipe

    folder = as_path(run)
    file = folder / NAMES_FILE
    read_recipe(folder)  # fails before a missing folder could be created
    check_writable(file)
    given = None if names is None else as_path(names)
    with claimed(folder, say):
        try:
            named = name_clusters(folder, Display(out), given=given, overwrite=overwrite)
        except NoWords as error:
            raise NoWords(
                f"no names to suggest: {error}; look at the clusters in the report, write lines of "
                "cluster,name into a file, and give it with --names FILE"
            ) from error
    if named.missing:
        say(f"no names to suggest: {named.missing}")
    _show(named)
    for label, clusters in named.naming.groups().items():
        if len(clusters) > 1:
            say(f"One group: clusters {', '.join(map(str, clusters))} have the name {label!r}.")
    say(f"Names: {file} (edit the column name; `snscc report {run}` then shows them)")


def _show(named: Named) -> None:
    suggested = any(named.suggestions)
    more = ("suggestion", "confidence", "runner-up") if suggested else ()
    table = Table("cluster", "images", "name", *more, box=None)
    for cluster, size in enumerate(named.sizes):
        cells = [str(cluster), f"{size:,}", named.naming.names[cluster] or "-"]
        if found := named.suggestions[cluster] if suggested else None:
            cells += [found.word, f"{found.confidence:.0%}", found.runner_up]
        # Not as markup: a name may hold brackets.
        table.add_row(*(Text(shown(cell)) for cell in cells))
    out.print()
    out.print(table)
    out.print()
