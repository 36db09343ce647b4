"""Put the image files of a finished run into one folder per group, and be able to undo it.

`make_plan` writes nothing; `carry` does what it says.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from snscc_ray.answers.features import rows_now
from snscc_ray.answers.journal import (
    PART,
    UNDO_FILE,
    Action,
)
from snscc_ray.answers.names import read_naming
from snscc_ray.answers.places import file_names, folder_names
from snscc_ray.answers.predict import check_finished
from snscc_ray.answers.sheets import read_sheet
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import NO_ENCODER, DataSettings, Recipe
from snscc_ray.core.claim import CLAIM
from snscc_ray.core.display import Display
from snscc_ray.core.tables import read_table
from snscc_ray.data.decode import Reading, UnreadableImage, decode_into
from snscc_ray.data.imageset import digests
from snscc_ray.data.names import Files
from snscc_ray.data.rows import Rows
from snscc_ray.runs.finished import ASSIGNMENTS, SECOND
from snscc_ray.runs.folder import IMAGES_FILE, STAMPS, read_recipe, reading
from snscc_ray.texts import counted

DOUBTFUL, DUPLICATES = "doubtful", "duplicates"


@dataclass(frozen=True)
class SortRequest:
    """What to sort, where to, and how."""

    run: Path
    into: Path
    action: Action = "link"
    min_confidence: float = 0.0  # images below it go to `doubtful`
    by: Literal["name", "cluster"] = "name"
    duplicates: Path | None = None  # a file of `snscc duplicates`


@dataclass(frozen=True)
class Item:
    """One file, and where it goes."""

    source: Path  # absolute
    folder: str  # below DIR
    name: str
    bytes: int
    modified: int  # ns

    @property
    def target(self) -> str:
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Plan:
    """All files in the order of the run, and what is left out."""

    items: list[Item]
    left: list[tuple[str, str]]  # (id, reason)
    notes: list[str]  # sentences on what was chosen or assumed
    images: Path  # their folder

    def folders(self) -> dict[str, tuple[int, int]]:
        """Return the number of images and of bytes of each folder, in the order of the names."""
        images: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for item in self.items:
            images[item.folder] += 1
            size[item.folder] += item.bytes
        return {name: (images[name], size[name]) for name in sorted(images)}


def make_plan(request: SortRequest, display: Display) -> Plan:
    """Find out where each image of the run goes. Writes nothing. Raises UserError."""
    with reading(request.run):
        check_finished(request.run)
        recipe = read_recipe(request.run)
        rows = _files_of(request.run, recipe, display)
        assert isinstance(rows.files, Files)
        check_target(request.into, rows.files.root)
        table = read_table(request.run / ASSIGNMENTS, ["id", "cluster", "confidence"], SECOND)
        ids = table["id"].to_pylist()
        naming = read_naming(request.run, recipe.data.num_clusters)
        seen = _Seen.of(request.run, recipe.data)
    clusters = range(recipe.data.num_clusters)
    by_name = request.by == "name"
    labels = [naming.label(c) if by_name else f"cluster {c}" for c in clusters]
    sure_N = _sure(table, labels)
    aside = _set_aside(request.duplicates, ids)
    places = folder_names(dict.fromkeys(labels), (DOUBTFUL, DUPLICATES, UNDO_FILE, PART, CLAIM))
    notes = [f"group {label!r} is the folder {place!r}" for label, place in places.items()
             if place != label]  # fmt: skip
    where = dict(zip(rows.ids, range(len(rows.ids)), strict=True))
    found: list[tuple[str, Path, str, os.stat_result]] = []  # relative name, path, folder
    left: list[tuple[str, str]] = []
    tell = display.counting("checking", "images")
    for row, (name, cluster, confidence) in enumerate(
        zip(ids, table["cluster"].to_pylist(), sure_N, strict=True)
    ):
        place = where.get(name)
        relative = "" if place is None else os.fsdecode(rows.files.names[place].as_py())
        path = Path(os.path.abspath(rows.files.root)) / relative
        reason, state = ("it is gone", None) if place is None else seen.why_not(row, path)
        if reason is None and request.action == "move" and path.is_symlink():
            reason = "it is a link, and --move moves files only"
        if reason is not None or state is None:
            left.append((name, reason or ""))
        else:
            folder = places[labels[cluster]]
            if name in aside:
                folder = f"{DUPLICATES}/{folder}"
            elif confidence < request.min_confidence:
                folder = f"{DOUBTFUL}/{folder}"
            found.append((relative, path, folder, state))
        tell(row + 1, len(ids))
    display.finish()
    if others := len(rows.ids) - len(set(ids) & where.keys()):
        notes.append(f"{counted(others, 'image file')} in {rows.place} stay: not in the run")
    items = _named(found)
    notes += _about_disks(request, rows.files.root, items)
    return Plan(items, left, notes, rows.files.root)


def _sure(table: pa.Table, labels: Sequence[str]) -> list[float]:
    """Return how likely each image is in its group; one group may have several clusters.

    Of these, the two likeliest count: a run keeps no more. One of an older version keeps one.
    """
    sure_N = table["confidence"].to_numpy().copy()
    if set(SECOND) <= set(table.column_names):
        group_C = np.unique(list(labels), return_inverse=True)[1]
        first_N, second_N = (table[name].to_numpy() for name in ("cluster", "second"))
        same_N = group_C[first_N] == group_C[second_N]
        sure_N += np.where(same_N, table["second_confidence"].to_numpy(), 0)
    return [float(value) for value in sure_N]


def _about_disks(request: SortRequest, images: Path, items: Sequence[Item]) -> list[str]:
    """Say what another disk changes. Raises UserError if it has too little room."""
    place = request.into.absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    other = images.stat().st_dev != there.stat().st_dev
    if request.action == "copy" or (request.action == "move" and other):
        needed, free = sum(item.bytes for item in items), shutil.disk_usage(there).free
        if needed > free:
            raise UserError(
                f"--into {request.into}: {needed / 1e6:,.1f} MB are needed, and {free / 1e6:,.1f} "
                "MB are free there: free some space, give a folder on another disk, or use --link"
            )
    if not other or request.action == "copy":
        return []
    if request.action == "link":
        return [f"{request.into} is on another disk, so the links are symbolic: they lead nowhere "
                "once the images are moved"]  # fmt: skip
    return [f"{request.into} is on another disk: each file is copied and compared, then removed"]


def _named(found: Sequence[tuple[str, Path, str, os.stat_result]]) -> list[Item]:
    """Give each file its name in its folder."""
    members: dict[str, list[int]] = {}
    for number, (_, _, folder, _) in enumerate(found):
        members.setdefault(folder, []).append(number)
    names = [""] * len(found)
    for own in members.values():
        for number, name in zip(own, file_names([found[n][0] for n in own]), strict=True):
            names[number] = name
    return [
        Item(path, folder, name, state.st_size, state.st_mtime_ns)
        for name, (_, path, folder, state) in zip(names, found, strict=True)
    ]


def _files_of(run: Path, recipe: Recipe, display: Display) -> Rows:
    """List the image files of a run. Raises UserError for a run on anything else."""
    data = recipe.data
    if data.path is not None and is_url(data.path):
        raise UserError(
            f"the images of this run are at {data.path}, and `snscc sort` works on files of this "
            "machine: copy them here, and `snscc predict` them"
        )
    if recipe.encoder.name == NO_ENCODER:
        raise UserError("the run is on embeddings, which are no files: there is nothing to sort")
    rows = rows_now(run, recipe, display)
    if rows.files is None:
        kind = "Parquet shards" if rows.shards is not None else "a dataset in one file"
        raise UserError(
            f"the images of the run are in {kind} ({rows.place}), and `snscc sort` works on image "
            f"files: the groups of its images are in {ASSIGNMENTS} of the run"
        )
    return rows


def check_target(into: Path, images: Path) -> None:
    """Raise UserError unless the files can go there. It may not be in the images' folder.

    The next run would take the sorted files for more images.
    """
    if is_url(into):
        raise UserError(f"--into {into}: give a folder on this machine")
    root, place = Path(os.path.realpath(images)), Path(os.path.realpath(into))
    if place.is_relative_to(root):
        raise UserError(
            f"--into {into} is in the folder of the images, {images}: the next run would read the "
            "sorted files as more images; give a folder outside of it"
        )
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--into {into}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--into {into}: {there} is not writable; give another folder")
    if (into / UNDO_FILE).exists():
        raise UserError(
            f"--into {into} holds the files of another sort: put them back with `snscc sort --undo "
            f"{into}`, or give another folder"
        )
    if there == place and any(not p.name.startswith(CLAIM) for p in place.iterdir()):
        raise UserError(f"--into {into} is not empty: give a new or an empty folder")


def folders_to_make(into: Path) -> list[Path]:
    """Return the folders that must be made to have this one, innermost first."""
    place = into.absolute()
    return [path for path in (place, *place.parents) if not path.exists()]


def _set_aside(file: Path | None, ids: Sequence[str]) -> set[str]:
    """Return the ids that a file of `snscc duplicates` does not keep. Raises UserError."""
    if file is None:
        return set()
    lines = read_sheet(file)
    if lines and not {"id", "keep"} <= set(lines[0]):
        raise UserError(f"--duplicates {file} needs the columns id and keep, as `snscc duplicates` "
                        "writes them")  # fmt: skip
    lines = [{**line, "keep": (line["keep"] or "").strip().lower()} for line in lines]
    kept = {line.get("group") for line in lines if line["keep"] == "yes"}
    known = set(ids)
    for number, line in enumerate(lines, 2):
        if line["id"] not in known:
            raise UserError(
                f"--duplicates {file}, line {number}: the run has no image {line['id']!r}; give "
                "the file that `snscc duplicates` wrote for this run"
            )
        if line["keep"] not in ("yes", "no"):
            raise UserError(
                f"--duplicates {file}, line {number}: keep is {line['keep']!r}; write yes or no"
            )
        if line.get("group") not in kept:
            raise UserError(
                f"--duplicates {file}, line {number}: group {line.get('group')} keeps none of its "
                "images; write yes for at least one"
            )
    return {str(line["id"]) for line in lines if line["keep"] == "no"}


# -------------------------------------------------------------------------- files changed since


@dataclass(frozen=True)
class _Seen:
    """What a run recorded of its files, to notice those that have changed since."""

    data: DataSettings
    when: int  # when the run recorded its images, ns
    stamps: np.ndarray | None  # int64 (N, 2): bytes and mtime_ns
    digests: list[bytes] | None  # of the pixels that the run saw

    @staticmethod
    def of(run: Path, data: DataSettings) -> _Seen:
        file = run / IMAGES_FILE
        if not file.exists():  # a run from before it was written
            return _Seen(data, (run / ASSIGNMENTS).stat().st_mtime_ns, None, None)
        table = read_table(file, ["id"], ["digest", *STAMPS])
        columns = set(table.column_names)
        stamps = pixels = None
        if columns.issuperset(STAMPS):
            stamps = np.stack([table[name].to_numpy() for name in STAMPS], axis=1)
        if "digest" in columns:
            pixels = table["digest"].to_pylist()
        return _Seen(data, file.stat().st_mtime_ns, stamps, pixels)

    def why_not(self, row: int, path: Path) -> tuple[str | None, os.stat_result | None]:
        """Return why a file cannot be used, or None, and its state.

        A file of the same size and time counts as unchanged. Of others, the pixels are compared.
        """
        try:
            state = path.stat()
        except OSError as error:
            return (error.strerror or str(error)), None
        if self.stamps is not None:
            same = (state.st_size, state.st_mtime_ns) == tuple(self.stamps[row])
        else:
            same = state.st_mtime_ns <= self.when
        if not same and not (self.digests and self._digest(path) == self.digests[row]):
            return "it was changed since the run", None
        return None, state

    def _digest(self, path: Path) -> bytes | None:
        side = self.data.image_size
        pixels = np.empty((1, self.data.channels, side, side), np.uint8)
        try:
            decode_into(path, pixels[0], Reading.of(self.data))
        except UnreadableImage:
            return None
        return digests(pixels)
