"""What a source offers before anything is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snscc_ray.config.errors import UserError
from snscc_ray.data.decode import OWN_RANGE, Reading, Source

# Rows decoded by one thread at a time: enough to make the hand-over cheap, few enough that the
# encoded bytes under way stay small.
BATCH = 128


@dataclass(frozen=True)
class Rows:
    """What a source offers before anything is decoded; batches follow the order of the ids."""

    place: str  # what to call the source in a message
    ids: list[str]
    batches: Iterable[Sequence[Source]]
    labels: np.ndarray | None = None  # int64 (N,)
    class_names: tuple[str, ...] | None = None
    files: Sequence[Path] | None = None  # where each row is a file of its own
    shards: Sequence[Shard] | None = None  # where the rows are those of Parquet files
    reading: Reading = OWN_RANGE
    notes: tuple[str, ...] = ()  # what was left aside or assumed, in sentences

    @property
    def streamable(self) -> bool:
        """Whether any part can be read by itself, again in each epoch."""
        return self.files is not None or self.shards is not None

    @property
    def some_files(self) -> list[str]:
        """All shards, or the first and the last image file: where to look who can see them."""
        if self.shards is not None:
            return [str(shard.file) for shard in self.shards]
        return [str(self.files[0]), str(self.files[-1])] if self.files else []


@dataclass(frozen=True, eq=False)
class Batches:
    """Items, so many at a time, as often as they are asked for."""

    items: Sequence[Source] | np.ndarray

    def __iter__(self) -> Iterator[list[Source]]:
        for start in range(0, len(self.items), BATCH):
            yield list(self.items[start : start + BATCH])


def check_ids(rows: Rows) -> None:
    if not rows.ids:
        raise UserError(f"no images in {rows.place}: give a folder or file that holds some")
    # Refused rather than renamed: a row could not be joined back to its image by a made-up id.
    repeated, times = Counter(rows.ids).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"id {repeated!r} occurs {times} times in {rows.place}: make the ids unique, or leave "
            "them out to have the rows numbered"
        )


def corrupt(rows: Rows, row: int, reason: str) -> UserError:
    return UserError(
        f"image {rows.ids[row]!r} in {rows.place} is corrupt ({reason}): repair or "
        "remove it, or leave out such images with --set data.skip_corrupt=true"
    )


def all_corrupt(rows: Rows, row: int, reason: str) -> UserError:
    return UserError(
        f"all {len(rows.ids)} images in {rows.place} are corrupt, the first ({rows.ids[row]!r}) "
        f"by: {reason}; give a folder with readable images"
    )


@dataclass(frozen=True)
class Shard:
    """A Parquet file and which of its columns there are."""

    file: Path
    rows: int  # how many to read, from the first
    groups: tuple[int, ...]  # rows in each of its row groups
    id: bool
    label: bool
    class_name: bool
