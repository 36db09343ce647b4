"""Many strings and files in Arrow arrays."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path
from snscc_ray.data.imageset import check_ids, describe
from snscc_ray.data.names import Files, Names
from snscc_ray.data.rows import Batches, Rows

WORDS = [f"{row}/é{row % 7}.png" for row in range(150_000)]  # more than one part


def test_names_are_a_sequence_of_the_strings() -> None:
    names = Names.of(iter(WORDS))
    assert len(names) == len(WORDS) and list(names) == WORDS == names
    assert names[3] == WORDS[3] and names[-1] == WORDS[-1]
    for part in (slice(2, 5), slice(None, 4), slice(-3, None), slice(0, 100, 7), slice(5, 2)):
        assert isinstance(names[part], Names) and names[part] == WORDS[part]
    assert names.take(np.array([9, 0])) == [WORDS[9], WORDS[0]]
    assert Names.of(names) is names
    assert Names.of([]) == [] and not Names.of([])
    with pytest.raises(IndexError):
        names[len(WORDS)]


def test_names_differ_by_any_string_and_by_length() -> None:
    names = Names.of(["a", "b"])
    assert names == Names.of(["a", "b"]) and names == ("a", "b")
    assert names != ["a", "c"] and names != ["a"] and names != Names.of(["b", "a"]) and names != 3


def test_names_come_from_the_column_of_a_table_and_go_into_one() -> None:
    chunks = pa.chunked_array([["a"], ["b", "c"]])
    assert Names(chunks) == ["a", "b", "c"]
    assert Names(chunks).column.type == pa.string()


def test_a_part_is_pickled_alone() -> None:
    names, files = Names.of(WORDS), Files.of(Path("/photos"), WORDS)
    assert len(pickle.dumps(names[5000:5010])) < 1000
    assert len(pickle.dumps(files[5000:5010])) < 1000
    assert pickle.loads(pickle.dumps(names[5:7])) == WORDS[5:7]
    assert list(pickle.loads(pickle.dumps(files[5:7]))) == list(files[5:7])


def test_repeated_names_are_found() -> None:
    assert Names.of(["a", "b"]).repeated() is None
    assert Names.of(["b", "a", "c", "a", "a"]).repeated() == ("a", 3)
    with pytest.raises(UserError, match="id 'a' occurs 2 times in x"):
        check_ids(Rows("x", Names.of(["a", "a"]), Batches([])))


def test_files_are_paths_below_the_root_whatever_their_names() -> None:
    odd = os.fsdecode(b"caf\xe9/1.png")
    files = Files.of(Path("photos"), [odd, "b.png"])
    assert list(files) == [Path("photos") / odd, Path("photos/b.png")]
    assert files[-1] == Path("photos/b.png") and list(files[1:]) == [Path("photos/b.png")]
    remote = Files.of(as_path("memory://bucket/photos"), ["a/b.png"])
    assert str(remote[0]) == "memory://bucket/photos/a/b.png"


def test_the_fingerprint_is_the_hash_of_the_json_and_the_digests() -> None:
    """A run's identity must not depend on how the ids are held."""
    digests = bytes(range(16)) * len(WORDS)
    rows = Rows("x", Names.of(WORDS), Batches([]))
    kept = np.arange(len(WORDS))
    found = describe(rows, kept, [], digests, np.zeros((1, 256), np.int64), (1, 8, 8))
    whole = json.dumps([len(WORDS), 1, 8, 8, WORDS]).encode() + digests
    assert found.fingerprint == hashlib.sha256(whole).hexdigest()
    assert found.distinct == 1
