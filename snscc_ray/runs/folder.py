"""The run folder: which run it belongs to, and what may be removed from it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import validate
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core import storage
from snscc_ray.core.claim import CLAIM, refuse_in_use
from snscc_ray.core.tables import read_table, write_table
from snscc_ray.data.imageset import Catalog, digest_column
from snscc_ray.data.names import Names

# The files of a run besides TensorBoard's events. _STAGE_FILES are in the folders of its stages.
_RUN_FILES = (
    "recipe.json", "metrics.json", "metrics.jsonl", "baselines.json", "assignments.parquet",
    "report.html", "report.json", "fit.json", "clusters.json", "images.parquet", "names.csv",
    "moved.json",
)  # fmt: skip
# The request and choices of `snscc fit`, and the number of clusters that it found.
FIT_FILE, COUNT_FILE = "fit.json", "clusters.json"
# One line per cluster, its number and its name; people edit it.
NAMES_FILE = "names.csv"
# Where `snscc sort --move` has put the images: its folder, and its undo file.
MOVED_FILE = "moved.json"
# The images that a run, a sweep or a comparison started with.
IMAGES_FILE = "images.parquet"
STAMPS = ("bytes", "modified")  # its columns of each file's size and time of change, in ns
_FINGERPRINT = b"fingerprint"
SEEN = ".seen-"
_STAGE_FILES = (
    "final.pt", "latest.pt", "stage.json", "neighbors.parquet", "features.pt",
    "index.pt",
)  # fmt: skip
_PACKAGES = ("snscc_ray", "torch", "torchvision", "timm", "numpy", "scikit-learn", "pyarrow")


def prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that cannot be used for this run. Raises UserError. Changes nothing."""
    path = folder / "recipe.json"
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; give one of them")
    if not is_url(folder):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"{there} is a file, not a folder; use another --out")
        if not os.access(there, os.W_OK):
            raise UserError(f"{there} is not writable; use another --out")
    if resume:
        if not path.exists():
            raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
        if (folder / FIT_FILE).exists() and not (folder / "train" / "stage.json").exists():
            raise UserError(
                f"--resume: {folder} was begun by `snscc fit`; continue it with the same `snscc "
                "fit` command"
            )
        difference = first_difference(
            read_recipe(folder).model_dump(mode="json"), recipe.model_dump(mode="json")
        )
        if difference:
            raise UserError(
                f"--resume: {folder} was made with another recipe ({difference}); use another "
                "--out, or --overwrite"
            )
    elif not overwrite and holds_something(folder):
        if not path.exists():
            raise UserError(
                f"{folder} already holds other files, but no run; use another --out, or "
                "--overwrite to write beside them"
            )
        what = "a finished run" if (folder / "metrics.json").exists() else "an unfinished run"
        raise UserError(
            f"{folder} already holds {what}; use --resume to continue it, --overwrite to replace "
            "it, or another --out"
        )


def holds_something(folder: Path) -> bool:
    """Whether the folder holds anything but claims and the markers that a killed check left."""
    return folder.exists() and any(not p.name.startswith((SEEN, CLAIM)) for p in folder.iterdir())


def check_apart(folder: Path, source: str | None) -> None:
    """Refuse to write into the folder of the images. Raises UserError.

    The next run would read the output as a table of images.
    """
    if source is None or is_url(source) or is_url(folder):
        return
    if folder.resolve() == Path(source).resolve():
        raise UserError(f"{folder} is the folder of the images; use another --out")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Guard the reading of a run folder, without locking out other readers.

    Raises UserError if the run is being written, or was replaced while it was read.
    """
    refuse_in_use(folder)
    records = [folder / stage / "stage.json" for stage in STAGES]
    before = [path.read_bytes() if path.exists() else b"" for path in records]
    yield
    if before != [path.read_bytes() if path.exists() else b"" for path in records]:
        raise UserError(f"{folder} was replaced while it was read; run the same command again")


def refuse_moved(folder: Path) -> None:
    """Raise UserError while the images of a run are where `snscc sort --move` has put them."""
    file = folder / MOVED_FILE
    if file.exists() and Path((held := storage.read_json(file))["undo"]).exists():
        raise UserError(
            f"the images of the run {folder} were moved to {held['into']}: `snscc sort --undo "
            f"{shlex.quote(held['into'])}` puts them back"
        )


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run folder. Raises UserError if the folder has none."""
    path = folder / "recipe.json"
    if not path.exists():
        raise UserError(_no_run(folder))
    held = storage.read_json(path)
    if not isinstance(held, dict) or not isinstance(held.get("recipe"), dict):
        raise UserError(
            f"{path} is not a run's recipe: bring back a copy of it, or repeat the command that "
            "made the run, with --overwrite"
        )
    try:
        return validate(held["recipe"])
    except UserError as error:
        raise UserError(
            f"{path}: {error}; repeat the command that made it, with --overwrite"
        ) from error


def _no_run(folder: Path) -> str:
    if is_url(folder):
        return f"{folder} holds no run (it has no recipe.json); check the address"
    if not folder.exists():
        return f"there is no folder {folder}; give the folder of a run, such as runs/photos"
    within = sorted(str(path.parent) for path in folder.glob("*/recipe.json"))
    hint = f"it holds the runs {', '.join(within[:3])}" if within else "give the folder of a run"
    return f"{folder} holds no run (it has no recipe.json); {hint}"


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe and the versions of Python and packages to the run folder."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed, such as a source tree
    described = {"recipe": recipe.model_dump(mode="json"), "versions": versions}
    storage.write_json(folder / "recipe.json", described)


def check_images(folder: Path, catalog: Catalog) -> None:
    """Refuse to continue a run with different images, which would replace finished work.

    A disk may be only partly mounted. Raises UserError saying how many images came and went.
    """
    if difference := images_differ(folder, catalog):
        raise UserError(
            f"{folder} was made from other images ({difference}): restore them, or use another "
            "--out, or --overwrite to replace it"
        )


def images_differ(folder: Path, catalog: Catalog) -> str | None:
    """Return how the images differ from those that a run was made from; None: they do not.

    The content is compared, too. A run that has not recorded its images differs from none.
    """
    path = folder / IMAGES_FILE
    if path.exists():
        table = read_table(path, ["id"])
        same = (table.schema.metadata or {}).get(_FINGERPRINT) == catalog.fingerprint.encode()
    elif (folder / "assignments.parquet").exists():  # a run from before IMAGES_FILE was written
        table = read_table(folder / "assignments.parquet", ["id"])
        same = Names(table["id"]) == catalog.ids
    else:
        return None
    if same:
        return None
    then, now = set(table["id"].to_pylist()), set(catalog.ids)
    came, went = len(now - then), len(then - now)
    what = f"{came:,} came and {went:,} went" if came or went else "with the same names"
    if named := [*sorted(then - now)[:3], *sorted(now - then)[:3]]:
        what += f", such as {', '.join(named[:3])}"
    return f"{what}; {len(then):,} then, {len(now):,} now"


def note_images(folder: Path, catalog: Catalog) -> None:
    """Record the images for `check_images`, unless they are already recorded."""
    path = folder / IMAGES_FILE
    if not path.exists():
        columns = {"id": catalog.ids.column}
        if catalog.digests:
            columns["digest"] = digest_column(catalog.digests)
        if catalog.stamps is not None:
            columns |= dict(zip(STAMPS, map(pa.array, catalog.stamps.T), strict=True))
        table = pa.table(columns)
        table = table.replace_schema_metadata({_FINGERPRINT: catalog.fingerprint.encode()})
        write_table(path, table)


def _files(folder: Path) -> list[Path]:
    return [
        *(folder / name for name in _RUN_FILES),
        *(folder / stage / name for stage in STAGES for name in _STAGE_FILES),
    ]


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files left by a kill during a write."""
    if is_url(folder):
        return  # an object store has no partly written objects
    for path in _files(folder):
        for left in path.parent.glob(f".{path.name}.????????"):
            left.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours and everything in it, if it exists."""
    if not is_url(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        store: Any = folder
        store.fs.rm(store.path, recursive=True)


def remove_run(folder: Path) -> None:
    """Remove the files of a run by name: a user's images may be in `train/` too."""
    for path in _files(folder):
        path.unlink(missing_ok=True)
    logs = folder / "tensorboard"
    for events in list(logs.glob("**/events.out.tfevents.*")):
        events.unlink()
    for empty in (*(folder / stage for stage in STAGES), *(logs / s for s in STAGES), logs):
        with suppress(OSError):
            empty.rmdir()


def first_difference(there: Any, here: Any, place: str = "") -> str | None:
    """Say where two recipes, as plain values, first differ. `runtime` is ignored."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            # A resumed run may run elsewhere, but it must learn the same.
            if not place and name == "runtime":
                continue
            # If the new recipe leaves these open, they are measured again with the same result.
            looked = place == "data." and name in ("value_range", "background")
            if looked and here.get(name) is None:
                continue
            found = first_difference(there.get(name), here.get(name), f"{place}{name}.")
            if found:
                return found
        return None
    return None if there == here else f"{place[:-1]} is {there!r} there and {here!r} here"
