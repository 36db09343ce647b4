"""Runs that an older version made are read, predicted with and resumed as they are.

`data/run_of_an_older_version` was made before the package was divided into folders, by
`snscc run digits` with the settings `TINY`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from snscc_ray.cli import options
from tests.conftest import digits_table
from tests.test_cli import Snscc, content

OLDER = Path(__file__).parent / "data" / "run_of_an_older_version"


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLDER, tmp_path / "run"))


def test_a_run_of_an_older_version_predicts_what_it_found(
    snscc: Snscc, run: Path, tmp_path: Path
) -> None:
    pq.write_table(digits_table(200), tmp_path / "digits.parquet")
    done = snscc("predict", run, tmp_path / "digits.parquet", "-o", tmp_path / "new.parquet")
    assert done.status == 0, done
    then, now = (pq.read_table(p) for p in (run / "assignments.parquet", tmp_path / "new.parquet"))
    assert now["cluster"].to_pylist() == then["cluster"].to_pylist()
    assert now["confidence"].to_pylist() == pytest.approx(then["confidence"].to_pylist(), abs=1e-5)


def test_a_run_of_an_older_version_is_finished_and_stays_so(snscc: Snscc, run: Path) -> None:
    before = content(run)
    done = snscc("run", "--resume", "--out", run)
    assert done.status == 0 and "ACC" in done.out, done
    after = content(run)
    trained = [name for name in before if name.endswith((".pt", "stage.json"))]
    assert len(trained) == 6 and all(after[name] == before[name] for name in trained)


def test_a_run_of_an_older_version_has_a_report(snscc: Snscc, run: Path) -> None:
    done = snscc("report", run)
    assert done.status == 0 and (run / "report.html").stat().st_size > 100_000, done
