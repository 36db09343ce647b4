"""Names of clusters: a file that people edit, and groups of clusters with the same name."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snscc_ray.answers.sheets import read_sheet
from snscc_ray.config.errors import UserError
from snscc_ray.core.storage import write_whole
from snscc_ray.runs.folder import NAMES_FILE

# Of unnamed clusters.
_LABEL = re.compile(r"cluster (\d+)", re.ASCII | re.IGNORECASE)


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

    def labels(self) -> list[str] | None:
        """Return the label of each cluster; None: no cluster has a name."""
        return [self.label(c) for c in range(len(self.names))] if any(self.names) else None

    def groups(self) -> dict[str, list[int]]:
        """Return the clusters of each label, in the order of the first one."""
        found: dict[str, list[int]] = {}
        for cluster in range(len(self.names)):
            found.setdefault(self.label(cluster), []).append(cluster)
        return found


@dataclass(frozen=True)
class Suggestion:
    """A word for a cluster.

    confidence: share of the cluster's images for which the word alone comes first, too.
    runner_up: the word that comes second.
    """

    word: str
    confidence: float
    runner_up: str


def read_naming(run: Path, clusters: int) -> Naming:
    """Return the names that a run folder holds; no names if it has no names file.

    Raises UserError as `parse` does.
    """
    file = run / NAMES_FILE
    return parse(file, clusters) if file.exists() else Naming((None,) * clusters)


def parse(file: Path, clusters: int) -> Naming:
    """Read `cluster,name` lines; other columns, such as those of suggestions, are ignored.

    A cluster that is not listed, or whose name is empty, has none. Raises UserError for a file
    that is no such table, a cluster that the run does not have, one that is listed twice, and the
    name `cluster N` of a cluster other than N.
    """
    lines = _lines(file, clusters)
    return Naming(tuple(_text(lines.get(cluster), "name") for cluster in range(clusters)))


def with_suggestions(run: Path, suggested: Naming) -> Naming:
    """Return the names in a run's names file, and suggested ones for clusters without.

    A name that is still the word that was suggested before is replaced by a new suggestion. One
    that a person has removed, beside a suggestion, stays removed. Raises UserError as `parse` does.
    """
    file = run / NAMES_FILE
    lines = _lines(file, len(suggested.names)) if file.exists() else {}
    names = list(suggested.names)
    for cluster, line in lines.items():
        name, before = _text(line, "name"), _text(line, "suggestion")
        if name != before or not names[cluster]:
            names[cluster] = name
    return Naming(tuple(names))


def keep_edited(run: Path) -> Path | None:
    """Copy a run's names file beside it if a person has edited it; return the copy's path."""
    file = run / NAMES_FILE
    if not file.exists():
        return None
    # A damaged file is kept, too.
    with suppress(UserError):
        lines = read_sheet(file)
        if all(_text(line, "name") == _text(line, "suggestion") for line in lines):
            return None
    kept = file.with_name("names.before.csv")
    shutil.copyfile(file, kept)
    return kept


def save(naming: Naming, run: Path, suggestions: Sequence[Suggestion | None] = ()) -> None:
    """Write the names file of a run folder, with the suggestions if there are some."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("cluster", "name", *(_SUGGESTED if suggestions else ())))
    for cluster, name in enumerate(naming.names):
        found = suggestions[cluster] if suggestions else None
        beside = (found.word, f"{found.confidence:.2f}", found.runner_up) if found else ()
        rows.writerow((cluster, name or "", *beside))
    write_whole(run / NAMES_FILE, lambda opened: opened.write(text.getvalue().encode()))


_SUGGESTED = ("suggestion", "confidence", "runner_up")


def _lines(file: Path, clusters: int) -> dict[int, dict[str, str | None]]:
    """Return the checked lines of a names file by cluster. Raises UserError."""
    lines = read_sheet(file)
    if not lines or not {"cluster", "name"} <= set(lines[0]):
        raise UserError(f"{file} needs the columns cluster and name, as `snscc name` writes them")
    found: dict[int, dict[str, str | None]] = {}
    for number, line in enumerate(lines, 2):
        given = (line["cluster"] or "").strip()
        if not given.isascii() or not given.isdecimal() or int(given) >= clusters:
            raise UserError(
                f"{file}, line {number}: there is no cluster {given!r}; the run has clusters 0 to "
                f"{clusters - 1}"
            )
        cluster = int(given)
        if cluster in found:
            raise UserError(f"{file}, line {number}: cluster {given} is there twice; keep one line")
        other = _LABEL.fullmatch(_text(line, "name") or "")
        if other and int(other[1]) != cluster:
            raise UserError(
                f"{file}, line {number}: cluster {given} has the name {other[0]!r}, which stands "
                "for another one; give it another name, or none"
            )
        found[cluster] = line
    return found


def _text(line: dict[str, str | None] | None, column: str) -> str | None:
    return " ".join(((line or {}).get(column) or "").split()) or None
