"""Write a folder of images as Parquet shards: in parallel, resumable, read back after writing.

`pack.json` beside the shards holds the plan, written before the first shard, and the content of
each finished shard. A shard is finished once it is on disk, was read back and is recorded there, so
a kill loses only the shards in progress. The bytes of a shard depend only on its images and on the
options, not on the number of processes or on interruptions.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from snscc_ray.config.errors import UserError
from snscc_ray.core.claim import claimed, refuse_in_use
from snscc_ray.core.display import Display
from snscc_ray.data.decode import available_cores
from snscc_ray.data.pack import folder as filled
from snscc_ray.data.pack.folder import SKIPPED
from snscc_ray.data.pack.plan import Options, as_manifest, make_plan
from snscc_ray.data.pack.processes import write_shards
from snscc_ray.data.pack.shard import corrupt, file_digest
from snscc_ray.data.shards import MANIFEST
from snscc_ray.data.sources import image_id

__all__ = ["MANIFEST", "SKIPPED", "Options", "Request", "Summary", "pack", "verify"]


@dataclass(frozen=True)
class Summary:
    shards: int
    rows: int
    bytes: int
    skipped: list[tuple[str, str]]  # (id, reason) of each corrupt image
    first_frames: int  # images of which only the first frame or page is kept
    packed: int  # images that this call read, in `seconds`
    seconds: float


@dataclass(frozen=True)
class Request:
    """A request to write the images below `folder` as shards into `out`."""

    folder: Path
    out: Path
    options: Options
    jobs: int = 0  # processes; 0: all cores
    skip_corrupt: bool = False
    overwrite: bool = False


def pack(request: Request, console: Console) -> Summary:
    """Write the images of a folder as shards.

    Finished shards of the same plan are kept. With `options.image_size`, an image whose shorter
    side is longer becomes the square that a run with that `data.image_size` would see, stored as
    JPEG (quality 95) or, from a lossless format, as PNG. All others are stored unchanged. So are
    images of more than 8 bits and transparent ones: their conversion depends on the whole dataset.

    Raises:
        UserError: bad folders, another plan in `out`, a corrupt image, a full disk.
    """
    filled.check_folders(request.folder, request.out)
    display = Display(console)
    with claimed(request.out, display.line):
        return _pack(request, display)


def _pack(request: Request, display: Display) -> Summary:
    folder, out, skip_corrupt = request.folder, request.out, request.skip_corrupt
    shards, notes = make_plan(folder, out, request.options, skip_corrupt)
    manifest = as_manifest(shards, request.options)
    ids = [image_id(name) for shard in shards for name in shard.names]
    filled.prepare(out, manifest, ids, request.overwrite)
    entries = manifest["shards"]
    if not skip_corrupt:
        for name, reason in _skipped(entries)[:1]:
            raise corrupt(folder, name, reason)
    todo = [shard for shard in shards if "sha256" not in entries[shard.number]]
    total, left = (sum(len(shard.names) for shard in some) for some in (shards, todo))
    jobs = min(request.jobs or available_cores(), max(1, len(todo)))
    began = time.monotonic()
    for note in notes:
        display.line(note)
    display.start("packing", 1, total, total - left, "images")
    try:
        with closing(write_shards(todo, jobs, display.advance)) as records:
            for number, record in records:
                entries[number].update(record)
                filled.write_manifest(out, manifest)
    finally:
        display.finish()
    summary = _summary(entries, left, time.monotonic() - began)
    if not summary.rows:
        name, reason = summary.skipped[0]
        raise UserError(
            f"no image in {folder} is readable (the first of {total}, {name!r}: {reason}): "
            "give a folder with readable images"
        )
    if summary.skipped:
        filled.write_skipped(out, summary.skipped)
    return summary


def verify(out: Path, jobs: int, console: Console) -> Summary:
    """Check all shards of a finished `out`. Raises UserError naming the first broken one."""
    refuse_in_use(out)
    entries = filled.finished_shards(out)
    began = time.monotonic()
    broken: list[tuple[str, str]] = []
    display = Display(console)
    display.start("verifying", 1, len(entries), 0, "shards")
    pool = ThreadPoolExecutor(jobs or available_cores())
    try:
        states = pool.map(lambda entry: _state(out, entry), entries)
        for entry, state in zip(entries, states, strict=True):
            if state != "whole":
                broken.append((entry["file"], state))
            display.advance()
    finally:
        pool.shutdown(cancel_futures=True)
        display.finish()
    if broken:
        name, state = broken[0]
        more = f" ({len(broken) - 1:,} more as well)" if len(broken) > 1 else ""
        mend = "run" if state == "missing" else "remove it and run"
        raise UserError(
            f"{out / name} is {state}{more}: {mend} the same command without --verify to write it "
            "again"
        )
    return _summary(entries, sum(entry["rows"] for entry in entries), time.monotonic() - began)


def _state(out: Path, entry: dict[str, Any]) -> str:
    try:
        whole = file_digest(out / entry["file"]) == (entry["bytes"], entry["sha256"])
    except FileNotFoundError:
        return "missing"
    return "whole" if whole else "broken (its bytes have changed)"


def _summary(entries: list[dict[str, Any]], packed: int, seconds: float) -> Summary:
    return Summary(
        shards=len(entries),
        rows=sum(entry["rows"] for entry in entries),
        bytes=sum(entry["bytes"] for entry in entries),
        skipped=_skipped(entries),
        first_frames=sum(entry.get("first_frames", 0) for entry in entries),
        packed=packed,
        seconds=seconds,
    )


def _skipped(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(name, reason) for entry in entries for name, reason in entry.get("skipped", [])]
