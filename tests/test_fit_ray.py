"""`snscc fit` on the workers of Ray, against the fit in one process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import digits_table
from tests.ray_tools import assert_same_run, own_ray, refused, sets
from tests.test_cli import Snscc, content
from tests.test_cli import refused as refused_here
from tests.test_predict import images

QUICK = sets("pretrain.epochs=2", "train.epochs=2", "boost.epochs=1")
ONE = ["--workers", 1, "--cpus-per-worker", 1]


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str]) -> Snscc:
    return Snscc(capsys)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, one of them broken."""
    folder = images(tmp_path_factory.mktemp("fit-ray") / "scans", digits_table(150))
    (folder / "torn.png").write_bytes(b"\x89PNG torn")
    return folder


@pytest.mark.slow
def test_a_fit_on_one_worker_is_the_fit_in_one_process(scans: Path, tmp_path: Path) -> None:
    """The choices, the count, the weights, the answers and the report; a kill costs nothing."""
    ours, theirs = tmp_path / "ray" / "run", tmp_path / "local" / "run"
    long = (*QUICK, *sets("train.epochs=40"))  # on a busy machine, a kill takes seconds
    with own_ray() as here, own_ray() as there:
        local = here.snscc("fit", scans, *long, "--out", theirs)
        asked = ["fit", scans, *long, *ONE, "--out", ours]
        killed = there.snscc(*asked)
        killed.reaches(ours, "pretrain", 0)
        for process in there.processes():
            process.kill()
        killed.wait(-signal.SIGKILL)
        local.wait()
        again = there.snscc(*asked).wait()
        assert "continuing the run" in again.out and "report.html" in again.out, again.said()
        assert_same_run(ours, theirs)
        reports = [json.loads((run / "report.json").read_text()) for run in (ours, theirs)]
        for report in reports:
            for part in ("summary", "stages", "health"):  # they hold times
                del report[part]
        assert reports[0] == reports[1]
        counts = [(run / "clusters.json").read_text() for run in (ours, theirs)]
        assert counts[0] == counts[1]
        finished = there.snscc(*asked).wait()
        assert "is finished" in finished.out


@pytest.mark.slow
def test_two_workers_count_and_share_the_batch(scans: Path, tmp_path: Path) -> None:
    with own_ray() as own:
        shared = ["--workers", 2, "--cpus-per-worker", 0.5, "--storage", tmp_path / "runs"]
        said = own.snscc("fit", scans, *QUICK, *shared).wait().out
    run = tmp_path / "runs" / "scans"
    for words in ("left out torn.png", "batch: 64", "clusters have the highest", "report.html"):
        assert words in said, said
    found = pq.read_table(run / "assignments.parquet")
    number = json.loads((run / "clusters.json").read_text())["chosen"]
    assert found.num_rows == 150 and set(found["cluster"].to_pylist()) <= set(range(number))
    assert json.loads((run / "recipe.json").read_text())["recipe"]["data"]["num_clusters"] == number
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu"], ["--gpu needs Ray workers", "--workers N"]),
        (["--address", "auto"], ["--address needs Ray workers"]),
        (["--workers", "two"], ["--workers two", "MIN:MAX"]),
        (["--workers", 2, "--device", "cpu"], ["--device cpu", "--gpu"]),
        (["--workers", 2, "--budget", "2m"], ["--budget", "leave it out"]),
        (["--out", "a", "--storage", "b"], ["--out", "--storage", "one of them"]),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[object], says: list[str], scans: Path, snscc: Snscc, tmp_path: Path
) -> None:
    where = [] if "--out" in options else ["--out", tmp_path / "r"]
    refused_here(snscc("fit", scans, *where, *options), *says)
    assert not content(tmp_path)


@pytest.mark.slow
def test_what_ray_cannot_do_is_refused_in_one_line(scans: Path, tmp_path: Path) -> None:
    """Missing images, too many workers for a batch, and workers that do not fit."""
    few = images(tmp_path / "few", digits_table(20))
    out = ["--out", tmp_path / "r"]
    with own_ray() as own:
        five = ["--workers", 5, "--cpus-per-worker", 0.1, *out]
        refused(own.snscc("fit", tmp_path / "gone", *five).wait(2), "gone")
        refused(own.snscc("fit", few, *five).wait(2), "--workers", "batches of 8", "use fewer")
        huge = ["--workers", 1, "--cpus-per-worker", 5000, *out]
        refused(own.snscc("fit", scans, *huge).wait(2), "--cpus-per-worker")
    assert not (tmp_path / "r").exists()
