"""The output folder of `snscc pack`: checks, its manifest, and which files are kept or removed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.core.storage import read_json, write_json, write_whole
from snscc_ray.data.pack.plan import FORMAT
from snscc_ray.data.pack.shard import keeps_shards
from snscc_ray.data.shards import MANIFEST

SKIPPED = "skipped.csv"
_SHARD = re.compile(r"part-\d{5,}\.parquet")
_LEFTOVER = re.compile(rf"\.({_SHARD.pattern}|pack\.json|skipped\.csv)\..+")


def check_folders(folder: Path, out: Path) -> None:
    """Raise UserError if `folder` is not a folder, or if `out` is inside it."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: give the folder that holds the images")
    if not is_url(out) and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{out} lies in {folder}: give a folder for the shards outside of the images"
        )


def prepare(out: Path, planned: dict[str, Any], ids: Sequence[str], overwrite: bool) -> None:
    """Write the manifest `planned`, completed with the old entries of the shards that are kept.

    ids: of all images of the plan.

    With `overwrite` no shard is kept: the files of an earlier command are removed.

    Raises:
        UserError: `out` cannot be used, or holds foreign Parquet files or another plan.
    """
    names = _names_in(out)
    begun = MANIFEST in names
    own = {name for name in names if begun and _SHARD.fullmatch(name)}
    former = {*own, SKIPPED} if begun and overwrite else set()
    if begun and not overwrite:
        held = _read_manifest(out)
        _refuse_other_plan(out, held, planned, ids)
        own = {entry["file"] for entry in planned["shards"]}
        for entry, old in zip(planned["shards"], held["shards"], strict=True):
            if entry["file"] in names and (out / entry["file"]).stat().st_size == old.get("bytes"):
                entry.update(old)
    _refuse_foreign(out, names, own)
    try:
        # Remove old shards before their manifest. Otherwise a kill would leave them unclaimed.
        for name in names:
            if name in former or _LEFTOVER.fullmatch(name):
                (out / name).unlink()
        out.mkdir(parents=True, exist_ok=True)
        write_manifest(out, planned)
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror}): give another folder for the shards"
        ) from error


def finished_shards(out: Path) -> list[dict[str, Any]]:
    """Return the manifest's entries. Raises UserError unless `out` holds just one finished pack."""
    names = _names_in(out)
    if MANIFEST not in names:
        raise UserError(
            f"{out} holds no {MANIFEST}, so `snscc pack` did not write it: give a folder of its "
            "shards"
        )
    entries: list[dict[str, Any]] = _read_manifest(out)["shards"]
    _refuse_foreign(out, names, {entry["file"] for entry in entries})
    finished = sum("sha256" in entry for entry in entries)
    if finished < len(entries):
        raise UserError(
            f"{out} is not finished ({finished} of {len(entries)} shards): run the same command "
            "without --verify to finish it"
        )
    return entries


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    with keeps_shards(out / MANIFEST):
        write_json(out / MANIFEST, manifest)


def write_skipped(out: Path, skipped: list[tuple[str, str]]) -> None:
    """Write the (id, reason) of each image left out to `skipped.csv`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("id", "reason"), *skipped])
    with keeps_shards(out / SKIPPED):
        write_whole(out / SKIPPED, lambda file: file.write(text.getvalue().encode()))


def _names_in(out: Path) -> list[str]:
    """Return the sorted names in `out`, or none if it does not exist yet."""
    try:
        return sorted(path.name for path in out.iterdir()) if out.exists() else []
    except NotADirectoryError:
        raise UserError(f"{out} is a file: give a folder for the shards") from None
    except OSError as error:
        raise UserError(
            f"cannot list {out} ({error.strerror}): give another folder for the shards"
        ) from error


def _refuse_foreign(out: Path, names: list[str], own: set[str]) -> None:
    for name in names:
        if name.endswith(".parquet") and not name.startswith(".") and name not in own:
            raise UserError(
                f"{out} holds {name}, which is from elsewhere and would be read with the shards: "
                "move it away, or give another folder for the shards"
            )


def _read_manifest(out: Path) -> dict[str, Any]:
    manifest = read_json(out / MANIFEST)
    held = manifest.get("shards") if isinstance(manifest, dict) else None
    if (
        not isinstance(held, list)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("options"), dict)
        or not all(isinstance(entry, dict) for entry in held)
    ):
        raise UserError(
            f"{out / MANIFEST} was not written by this version of `snscc pack`: start again with "
            "--overwrite, or give another folder for the shards"
        )
    return dict(manifest)


def _refuse_other_plan(
    out: Path, there: dict[str, Any], here: dict[str, Any], ids: Sequence[str]
) -> None:
    remedy = "or start again with --overwrite"
    for name, value in here["options"].items():
        if there["options"].get(name) != value:
            raise UserError(
                f"{out} was begun with {name} {there['options'].get(name)}, not {value}: use the "
                f"same options, {remedy}"
            )
    for old, new in zip_longest(there["shards"], here["shards"]):
        if not (old and new) or not new.items() <= old.items():
            entry = old or new
            raise UserError(
                f"images have changed since {out} was begun "
                f"({_came_and_went(out, there, ids)}{there.get('files')} files then, "
                f"{here['files']} now; the first change is between {entry['first']!r} and "
                f"{entry['last']!r}): restore them, give another folder for the shards, {remedy}"
            )


def _came_and_went(out: Path, there: dict[str, Any], ids: Sequence[str]) -> str:
    """Say how many images came and went. Empty unless all shards are finished and readable."""
    then: set[str] = set()
    for entry in there["shards"]:
        file = out / str(entry.get("file"))
        if "sha256" not in entry or not file.exists():
            return ""
        try:
            with file.open("rb") as opened:
                then.update(pq.read_table(opened, columns=["id"])["id"].to_pylist())
        except (pa.ArrowException, OSError):
            return ""  # `--verify` reports broken shards
        then.update(name for name, _ in entry["skipped"])
    came, went = len(set(ids) - then), len(then - set(ids))
    return f"{came:,} came and {went:,} went, " if came or went else "of the same names, "
