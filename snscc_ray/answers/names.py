"""Names of clusters: a file that people edit, and groups of clusters with the same name."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from snscc_ray.config.errors import UserError
from snscc_ray.core.storage import write_whole

# In the run folder: one line per cluster, its number and its name.
NAMES_FILE = "names.csv"


@dataclass(frozen=True)
class Naming:
    """The name of each cluster, None where it has none. Clusters with one name are one group."""

    names: tuple[str | None, ...]

    def label(self, cluster: int) -> str:
        """Return the name of a cluster, or `cluster N`."""
        return self.names[cluster] or f"cluster {cluster}"

    def title(self, cluster: int) -> str:
        """Return the name of a cluster and its number, or `cluster N`."""
        name = self.names[cluster]
        return self.label(cluster) if name is None else f"{name} ({cluster})"

    def groups(self) -> dict[str, list[int]]:
        """Return the clusters of each label, in the order of the first one."""
        found: dict[str, list[int]] = {}
        for cluster in range(len(self.names)):
            found.setdefault(self.label(cluster), []).append(cluster)
        return found


def read_naming(run: Path, clusters: int) -> Naming:
    """Return the names that a run folder holds; no names if it has no names file.

    Raises UserError as `parse` does.
    """
    file = run / NAMES_FILE
    return parse(file, clusters) if file.exists() else Naming((None,) * clusters)


def parse(file: Path, clusters: int) -> Naming:
    """Read `cluster,name` lines; other columns, such as those of suggestions, are ignored.

    A cluster that is not listed, or whose name is empty, has none. Raises UserError for a file
    that is no such table, a cluster that the run does not have, and one that is listed twice.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); save it as CSV") from error
    try:
        lines = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text)))
    except csv.Error as error:
        raise UserError(f"{file} is no CSV table ({error}); save it as CSV") from error
    if not lines or not {"cluster", "name"} <= set(lines[0]):
        raise UserError(f"{file} needs the columns cluster and name, as `snscc name` writes them")
    names: dict[int, str | None] = {}
    for number, line in enumerate(lines, 2):
        given = (line["cluster"] or "").strip()
        if not given.isascii() or not given.isdecimal() or int(given) >= clusters:
            raise UserError(
                f"{file}, line {number}: there is no cluster {given!r}; the run has clusters 0 to "
                f"{clusters - 1}"
            )
        if int(given) in names:
            raise UserError(f"{file}, line {number}: cluster {given} is there twice; keep one line")
        names[int(given)] = " ".join((line["name"] or "").split()) or None
    return Naming(tuple(names.get(cluster) for cluster in range(clusters)))


def save(naming: Naming, run: Path) -> None:
    """Write the names file of a run folder."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("cluster", "name"))
    rows.writerows((cluster, name or "") for cluster, name in enumerate(naming.names))
    write_whole(run / NAMES_FILE, lambda opened: opened.write(text.getvalue().encode()))


def _delimiter(text: str) -> str:
    """Spreadsheets of many countries write semicolons."""
    return max(",;\t", key=text.partition("\n")[0].count)
