"""The rows of a source, before any image is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snscc_ray.data.decode import OWN_RANGE, Reading, Source
from snscc_ray.data.names import Names

# Rows that a thread decodes at a time: enough to make the hand-over cheap, few enough to keep the
# encoded bytes in memory small.
BATCH = 128


@dataclass(frozen=True)
class Rows:
    """The rows of a source, before any image is decoded. Batches follow the order of the ids."""

    place: str  # name of the source in messages
    ids: Names
    batches: Iterable[Sequence[Source]]
    labels: np.ndarray | None = None  # int64 (N,)
    class_names: tuple[str, ...] | None = None
    files: Sequence[Path] | None = None  # if each row is a file
    shards: Sequence[Shard] | None = None  # if the rows are in Parquet files
    reading: Reading = OWN_RANGE
    vectors: np.ndarray | None = None  # float16 (N, D) of length 1: embeddings in place of images
    notes: tuple[str, ...] = ()  # sentences on what was left out or assumed

    @property
    def streamable(self) -> bool:
        """Whether any part can be read separately, again in each epoch."""
        return self.files is not None or self.shards is not None

    @property
    def some_files(self) -> list[str]:
        """All shards, or the first and last image file, to test which nodes can read them."""
        if self.shards is not None:
            return [str(shard.file) for shard in self.shards]
        return [str(self.files[0]), str(self.files[-1])] if self.files else []


@dataclass(frozen=True, eq=False)
class Batches:
    """Items in batches of BATCH. It can be iterated repeatedly."""

    items: Sequence[Source] | np.ndarray

    def __iter__(self) -> Iterator[list[Source]]:
        for start in range(0, len(self.items), BATCH):
            yield list(self.items[start : start + BATCH])


@dataclass(frozen=True)
class Shard:
    """A Parquet file and which columns it has."""

    file: Path
    rows: int  # how many to read, from the first
    groups: tuple[int, ...]  # rows of each row group
    id: bool
    label: bool
    class_name: bool
