"""The labels of Parquet rows. They only measure, so faulty labels give a note, not an error."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_CLASSES = 65_536


class Labels:
    """Collect `label` and `class_name`, file by file."""

    def __init__(self) -> None:
        self._values: list[Any] = []  # integers and strings; None: no label
        self._names: dict[Any, str] = {}
        self._amiss: str | None = None

    def add(self, shard: Any, table: Any) -> None:
        """Add the columns of one file (a `rows.Shard`)."""
        if not shard.label:
            self._values += [None] * shard.rows
            return
        values = [_plain(value) for value in table["label"].to_pylist()]
        odd = next((value for value in values if isinstance(value, _Odd)), None)
        if odd is not None:
            self._amiss = self._amiss or f"{odd.value!r:.60} in {shard.file.name} is not a class"
        self._values += values
        if shard.class_name:
            for label, name in set(zip(values, table["class_name"].to_pylist(), strict=True)):
                known = None if name is None or label is None else str(name)
                if known is not None and self._names.setdefault(label, known) != known:
                    both = f"{self._names[label]!r} and {known!r}"
                    self._amiss = f"label {label} has two names in {shard.file.name}, {both}"

    def concluded(self, rows: int) -> tuple[np.ndarray | None, tuple[str, ...] | None, str | None]:
        """Return labels, int64 (N,), and class names if all rows have a label, and a note."""
        bare = sum(value is None for value in self._values)
        if bare == rows:
            return None, None, None
        amiss = self._amiss
        if bare:
            amiss = amiss or f"{bare:,} of {rows:,} rows have no label"
        texts = {value for value in self._values if isinstance(value, str)}
        if texts and any(isinstance(value, int) for value in self._values):
            amiss = amiss or "some labels are numbers and some are text"
        if len(texts) > MAX_CLASSES:
            amiss = amiss or f"{len(texts):,} different labels are too many"
        if amiss:
            return None, None, f"the column `label` is ignored: {amiss}"
        if texts:
            classes = {name: number for number, name in enumerate(sorted(texts))}
            return np.array([classes[v] for v in self._values], np.int64), tuple(classes), None
        names = self._names
        # A label that does not occur (because of `limit`) is named by its number.
        named = (
            tuple(names.get(label, str(label)) for label in range(max(names) + 1))
            if names
            else None
        )
        return np.array(self._values, np.int64), named, None


class _Odd:
    """A value that is not a class."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _plain(value: Any) -> int | str | _Odd | None:
    """Return a class number or name, or None for a missing label: null, NaN or -1."""
    if value is None or value == -1 or value != value:
        return None
    if isinstance(value, str):
        return value
    number = isinstance(value, bool | int | float)
    if number and 0 <= value < MAX_CLASSES and value == int(value):
        return int(value)
    return _Odd(value)
