"""The run folder: whose it is, and what may be removed from it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import validate
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core import storage
from snscc_ray.core.claim import CLAIM, refuse_in_use
from snscc_ray.data.imageset import Catalog

# What a run leaves behind, beside TensorBoard's events: in its folder and in those of its stages.
_RUN_FILES = (
    "recipe.json", "metrics.json", "metrics.jsonl", "baselines.json", "assignments.parquet",
    "report.html", "report.json", "fit.json", "clusters.json", "images.parquet",
)  # fmt: skip
# What `snscc fit` was asked and chose, and the number of clusters that it found.
FIT_FILE, COUNT_FILE = "fit.json", "clusters.json"
# Which images a run, a sweep or a comparison was begun with.
IMAGES_FILE = "images.parquet"
_FINGERPRINT = b"fingerprint"
SEEN = ".seen-"
_STAGE_FILES = ("final.pt", "latest.pt", "stage.json", "neighbors.parquet", "features.pt")
_PACKAGES = ("snscc_ray", "torch", "torchvision", "timm", "numpy", "scikit-learn", "pyarrow")


def prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run. Raises UserError; changes nothing."""
    path = folder / "recipe.json"
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; give one of them")
    if not is_url(folder):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"{there} is a file and no folder; use another --out")
        if not os.access(there, os.W_OK):
            raise UserError(f"{there} is not writable; use another --out")
    if resume:
        if not path.exists():
            raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
        if (folder / FIT_FILE).exists() and not (folder / "train" / "stage.json").exists():
            raise UserError(
                f"--resume: {folder} was begun by `snscc fit`; the same `snscc fit` command goes "
                "on with it"
            )
        difference = first_difference(
            read_recipe(folder).model_dump(mode="json"), recipe.model_dump(mode="json")
        )
        if difference:
            raise UserError(
                f"--resume: {folder} was made by another recipe ({difference}); "
                "use another --out, or --overwrite"
            )
    elif not overwrite and holds_something(folder):
        if not path.exists():
            raise UserError(
                f"{folder} already holds files that are no run; use another --out, or --overwrite "
                "to write beside them"
            )
        what = "a finished run" if (folder / "metrics.json").exists() else "an unfinished run"
        raise UserError(
            f"{folder} already holds {what}; use --resume to continue it, --overwrite to replace "
            "it, or another --out"
        )


def holds_something(folder: Path) -> bool:
    """Whether there is anything in the folder, but for who has it and what a killed look left."""
    return folder.exists() and any(not p.name.startswith((SEEN, CLAIM)) for p in folder.iterdir())


def check_apart(folder: Path, source: str | None) -> None:
    """Refuse to write into the images' own folder: what is written would be read as images' table
    the next time. Raises UserError."""
    if source is None or is_url(source) or is_url(folder):
        return
    if folder.resolve() == Path(source).resolve():
        raise UserError(f"{folder} is where the images are; use another --out")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Read a run that others may read as well. Raises UserError where it is being written, also
    where that was begun meanwhile: then what was read may be of two runs."""
    refuse_in_use(folder)
    records = [folder / stage / "stage.json" for stage in STAGES]
    before = [path.read_bytes() if path.exists() else b"" for path in records]
    yield
    if before != [path.read_bytes() if path.exists() else b"" for path in records]:
        raise UserError(f"{folder} was replaced while it was read; run the same command again")


def read_recipe(folder: Path) -> Recipe:
    """The recipe a run folder was made with. Raises UserError when it holds none."""
    path = folder / "recipe.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run (there is no recipe.json in it)")
    held = storage.read_json(path)
    if not isinstance(held, dict) or not isinstance(held.get("recipe"), dict):
        raise UserError(
            f"{path} is not the recipe of a run: bring back a copy of it, or repeat the "
            "command that made the run, with --overwrite"
        )
    try:
        return validate(held["recipe"])
    except UserError as error:
        raise UserError(
            f"{path}: {error}; repeat the command that made it, with --overwrite"
        ) from error


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Keep the recipe, and the versions of what ran it, in the run folder."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a source tree that is not installed
    described = {"recipe": recipe.model_dump(mode="json"), "versions": versions}
    storage.write_json(folder / "recipe.json", described)


def check_images(folder: Path, catalog: Catalog) -> None:
    """Refuse to go on with other images than those it was begun with: a disk may be half mounted,
    and what was finished would be replaced. Raises UserError that says how many came and went."""
    path = folder / IMAGES_FILE
    if path.exists():
        with path.open("rb") as file:
            table = pq.read_table(file)
        same = (table.schema.metadata or {}).get(_FINGERPRINT) == catalog.fingerprint.encode()
    elif (folder / "assignments.parquet").exists():  # a run from before they were noted
        with (folder / "assignments.parquet").open("rb") as file:
            table = pq.read_table(file, columns=["id"])
        same = table["id"].to_pylist() == catalog.ids
    else:
        return
    if same:
        return
    then, now = set(table["id"].to_pylist()), set(catalog.ids)
    came, went = len(now - then), len(then - now)
    what = f"{came:,} came and {went:,} went" if came or went else "of the same names"
    raise UserError(
        f"{folder} was made of other images ({what}; {len(then):,} then, {len(now):,} now): put "
        "them back as they were, or use another --out, or --overwrite to replace it"
    )


def note_images(folder: Path, catalog: Catalog) -> None:
    """Keep which images there are, for `check_images`, where it is not kept yet."""
    path = folder / IMAGES_FILE
    if not path.exists():
        table = pa.table({"id": pa.array(catalog.ids, pa.string())})
        table = table.replace_schema_metadata({_FINGERPRINT: catalog.fingerprint.encode()})
        storage.write_whole(path, lambda file: pq.write_table(table, file))


def _files(folder: Path) -> list[Path]:
    return [
        *(folder / name for name in _RUN_FILES),
        *(folder / stage / name for stage in STAGES for name in _STAGE_FILES),
    ]


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a kill in mid-write left."""
    if is_url(folder):
        return  # an object is there whole or not at all
    for path in _files(folder):
        for left in path.parent.glob(f".{path.name}.????????"):
            left.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, if it is there, and all it holds."""
    if not is_url(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        store: Any = folder
        store.fs.rm(store.path, recursive=True)


def remove_run(folder: Path) -> None:
    """Remove a run's files, by name: `train/` may also be where somebody's images are."""
    for path in _files(folder):
        path.unlink(missing_ok=True)
    logs = folder / "tensorboard"
    for events in list(logs.glob("**/events.out.tfevents.*")):
        events.unlink()
    for empty in (*(folder / stage for stage in STAGES), *(logs / s for s in STAGES), logs):
        with suppress(OSError):
            empty.rmdir()


def first_difference(there: Any, here: Any, place: str = "") -> str | None:
    """Where two recipes, as plain values, differ first, said in words; `runtime` does not count."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in there.keys() | here.keys():
            # Where to run may change between a run and its continuation; what to learn may not.
            if not place and name == "runtime":
                continue
            # What is looked for anew if nobody says it, and found to be what it was.
            looked = place == "data." and name in ("value_range", "background")
            if looked and here.get(name) is None:
                continue
            found = first_difference(there.get(name), here.get(name), f"{place}{name}.")
            if found:
                return found
        return None
    return None if there == here else f"{place[:-1]} is {there!r} there and {here!r} here"
