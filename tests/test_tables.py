from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from snscc_ray.config.errors import UserError
from snscc_ray.core.tables import read_table, write_table


@pytest.fixture
def table() -> pa.Table:
    rows = range(500)
    return pa.table({
        "id": [f"image{row}.png" for row in rows],
        "cluster": pa.array([row % 7 for row in rows], pa.int32()),
        "confidence": pa.array([row / 500 for row in rows], pa.float32()),
    })  # fmt: skip


def test_a_table_is_read_as_it_was_written(tmp_path: Path, table: pa.Table) -> None:
    write_table(tmp_path / "t.parquet", table)
    assert read_table(tmp_path / "t.parquet").equals(table)
    assert read_table(tmp_path / "t.parquet", ["id"]).column_names == ["id"]


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path, table: pa.Table) -> None:
    path, chance, refused = tmp_path / "t.parquet", random.Random(0), 0
    write_table(path, table)
    whole = path.read_bytes()
    for place in chance.sample(range(len(whole)), 150):
        altered = bytearray(whole)
        altered[place] ^= 1 << chance.randrange(8)
        path.write_bytes(altered)
        try:
            assert read_table(path).equals(table)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_what_cannot_be_read_is_one_line(tmp_path: Path, table: pa.Table) -> None:
    with pytest.raises(UserError, match="damaged or gone"):
        read_table(tmp_path / "nothing.parquet")
    write_table(tmp_path / "t.parquet", table)
    with pytest.raises(UserError, match="label"):
        read_table(tmp_path / "t.parquet", ["label"])
