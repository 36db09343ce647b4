"""Names of clusters: the file that people edit."""

from __future__ import annotations

from pathlib import Path

import pytest

from snscc_ray.answers.names import NAMES_FILE, Naming, parse, read_naming, save
from snscc_ray.config.errors import UserError


def test_saved_names_are_read_again(tmp_path: Path) -> None:
    naming = Naming(("birds, small", None, 'a "q"', "Vögel", "birds, small"))
    save(naming, tmp_path)
    assert read_naming(tmp_path, 5) == naming
    assert naming.groups() == {
        "birds, small": [0, 4], "cluster 1": [1], 'a "q"': [2], "Vögel": [3]
    }  # fmt: skip


def test_a_run_without_the_file_has_no_names(tmp_path: Path) -> None:
    assert read_naming(tmp_path, 3) == Naming((None, None, None))


@pytest.mark.parametrize(
    "text",
    [
        "cluster,name\n1,cat\n",
        "\ufeffcluster;name;note\r\n1; cat ;x\r\n0;;\r\n",
        "name\tcluster\ncat\t1\n",
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / NAMES_FILE).write_bytes(text.encode())
    assert read_naming(tmp_path, 2) == Naming((None, "cat"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cluster,name\n2,cat\n", "line 2: there is no cluster '2'; the run has clusters 0 to 1"),
        ("cluster,name\n-1,cat\n", "there is no cluster '-1'"),
        ("cluster,name\n²,cat\n", "there is no cluster"),
        ("cluster,name\n,cat\n", "there is no cluster ''"),
        ("cluster,name\n1,cat\n1,dog\n", "line 3: cluster 1 is there twice"),
        ("1,cat\n0,dog\n", "needs the columns cluster and name"),
        ("", "needs the columns cluster and name"),
    ],
)
def test_a_file_that_is_no_names_is_refused_in_one_line(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(text.encode())
    with pytest.raises(UserError, match=told) as error:
        parse(file, 2)
    assert "\n" not in str(error.value)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / NAMES_FILE).write_bytes("cluster,name\n1,Vögel\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        read_naming(tmp_path, 2)
