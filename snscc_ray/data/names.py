"""Many strings, or many files of a folder, in one Arrow array: a tenth of the memory of a list."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import eq
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PART = 65_536  # strings that are Python objects at a time
_KIND = pa.large_string()


class Names(Sequence[str]):
    """Strings in an Arrow array. Equal to any sequence of the same strings."""

    def __init__(self, array: pa.Array | pa.ChunkedArray) -> None:
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        self.array = array.cast(_KIND)

    @staticmethod
    def of(values: Iterable[str]) -> Names:
        if isinstance(values, Names):
            return values
        return Names(_in_parts(values, _KIND))

    @property
    def column(self) -> pa.Array:
        """The strings as a column for a file."""
        return self.array.cast(pa.string())

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> Names: ...

    def __getitem__(self, place: int | slice) -> str | Names:
        if isinstance(place, slice):
            return Names(_part(self.array, place))
        return str(self.array[place].as_py())

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _PART):
            yield from self.array.slice(first, _PART).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return bool(self.array.equals(other.array))
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Names({len(self)}: {', '.join(map(repr, self[:3]))}…)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Names, (_compact(self.array),)

    def take(self, rows: np.ndarray) -> Names:
        return Names(self.array.take(pa.array(rows)))

    def repeated(self) -> tuple[str, int] | None:
        """Return a string that occurs more than once and how often, or None."""
        if pc.count_distinct(self.array).as_py() == len(self):
            return None
        counts = pc.value_counts(self.array)
        most = int(np.argmax(counts.field("counts").to_numpy()))
        return str(counts.field("values")[most].as_py()), int(counts.field("counts")[most].as_py())


@dataclass(frozen=True, eq=False)
class Files(Sequence[Path]):
    """Files below a folder, or at a URL; a path is made when it is asked for."""

    root: Path
    names: pa.Array  # relative, as bytes: a file name need not be valid UTF-8

    @staticmethod
    def of(root: Path, names: Iterable[str]) -> Files:
        return Files(root, _in_parts(map(os.fsencode, names), pa.large_binary()))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> Path: ...

    @overload
    def __getitem__(self, place: slice) -> Files: ...

    def __getitem__(self, place: int | slice) -> Path | Files:
        if isinstance(place, slice):
            return Files(self.root, _part(self.names, place))
        return self.root / os.fsdecode(self.names[place].as_py())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Files):
            return NotImplemented
        return self.root == other.root and bool(self.names.equals(other.names))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, (self.root, _compact(self.names))


def _in_parts(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    left, parts = iter(values), [pa.array([], kind)]
    while part := list(islice(left, _PART)):
        parts.append(pa.array(part, kind))
    return pa.concat_arrays(parts)


def _part(array: pa.Array, place: slice) -> pa.Array:
    first, last, step = place.indices(len(array))
    if step == 1:
        return array.slice(first, max(last - first, 0))
    return array.take(pa.array(np.arange(first, last, step)))


def _compact(array: pa.Array) -> pa.Array:
    """Return a copy without the rest of the array that it is a slice of."""
    return pa.concat_arrays([array, array.slice(0, 0)])
