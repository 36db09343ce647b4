"""Who has a folder: one command at a time writes into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from snscc_ray import SNSCC
from snscc_ray.cli import options
from snscc_ray.config.errors import UserError
from snscc_ray.core import claim
from snscc_ray.core.claim import CLAIM, claimed
from tests.conftest import TINY, digits_table
from tests.test_cli import Snscc, sets
from tests.test_predict import images


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claim") / "run"
    command = [sys.executable, "-m", "snscc_ray", "run", "digits"]
    command += ["--out", str(folder), *sets(*TINY)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("claim") / "scans", digits_table(60))


def quiet(_: str) -> None: ...


def held(folder: Path) -> set[tuple[str, bytes]]:
    return {
        (str(path.relative_to(folder)), path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != CLAIM
    }


def put(folder: Path, **changed: object) -> None:
    """A claim like this process's own, but for what is changed."""
    own = json.loads(claim._Own().text)
    (folder / CLAIM).write_text(json.dumps(own | changed))


COMMANDS = {
    "fit": "fit SCANS --out RUN",
    "fit --overwrite": "fit SCANS --out RUN --overwrite",
    "run": "run digits --out RUN --overwrite",
    "resume": "run --resume --out RUN",
    "run on Ray": "run digits --out RUN --overwrite --workers 2",
    "sweep": "sweep epsilon --out RUN --overwrite",
    "compare": "compare digits --out RUN --overwrite",
    "report": "report RUN",
    "report elsewhere": "report RUN --out ELSEWHERE.html",
    "predict": "predict RUN SCANS --out ELSEWHERE.csv",
    "export": "export RUN --torch ELSEWHERE.pt2",
    "export into it": "export RUN --torch RUN/model.pt2",
    "pack": "pack SCANS RUN",
    "verify": "pack SCANS RUN --verify",
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_no_command_enters_a_folder_that_is_in_use(
    words: str, run_folder: Path, scans: Path, snscc: Snscc, tmp_path: Path
) -> None:
    before = held(run_folder)
    places = {"RUN": run_folder, "SCANS": scans, "ELSEWHERE": tmp_path / "elsewhere"}
    for name, place in places.items():
        words = words.replace(name, str(place))
    with claimed(run_folder, quiet):
        done = snscc(*words.split())
    assert done.status == 2, done
    line = done.err.strip()
    assert "\n" not in line and f"in use by process {os.getpid()} (" in line, line
    assert f"since {time.strftime('%Y-')}" in line, line
    assert held(run_folder) == before and not list(tmp_path.iterdir())


def test_the_estimator_neither(run_folder: Path, tmp_path: Path) -> None:
    X = np.random.default_rng(0).random((40, 64))
    with claimed(run_folder, quiet), pytest.raises(ValueError, match="in use by process"):
        SNSCC(2, folder=run_folder).fit(X)


def test_what_ends_gives_the_folder_back(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with claimed(folder, quiet), pytest.raises(UserError), claimed(folder, quiet):
        pass
    assert not (tmp_path / "runs").exists()  # nothing came of it
    with claimed(folder, quiet):
        (folder / "recipe.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]


def test_a_dead_process_is_not_in_the_way(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys; from snscc_ray.core.claim import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1]), print): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    while not (tmp_path / CLAIM).exists() or killed.returncode is None:
        killed.poll()
        time.sleep(0.02)
    assert (tmp_path / CLAIM).exists()
    with claimed(tmp_path, quiet):
        assert json.loads((tmp_path / CLAIM).read_text())["pid"] == os.getpid()
    # The number of a dead process, which another one has by now.
    put(tmp_path, started="another time")
    with claimed(tmp_path, quiet):
        pass


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = claim._started(child.pid)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.02)
    put(tmp_path, pid=child.pid, started=started)
    with claimed(tmp_path, quiet):
        pass
    child.wait()


def test_another_machine_counts_as_dead_once_it_is_silent(tmp_path: Path) -> None:
    put(tmp_path, machine="elsewhere", host="elsewhere", pid=7)
    with pytest.raises(UserError) as refused, claimed(tmp_path, quiet):
        pass
    for said in ("process 7", "on elsewhere", f"remove {tmp_path / CLAIM}"):
        assert said in str(refused.value)
    long_ago = time.time() - 3600
    os.utime(tmp_path / CLAIM, (long_ago, long_ago))
    with claimed(tmp_path, quiet):
        pass


def test_a_claim_that_says_nothing_is_first_waited_for(tmp_path: Path) -> None:
    (tmp_path / CLAIM).write_text("")  # its maker was killed before it wrote, or will write soon
    with pytest.raises(UserError, match="just started"), claimed(tmp_path, quiet):
        pass
    a_while_ago = time.time() - 60
    os.utime(tmp_path / CLAIM, (a_while_ago, a_while_ago))
    with claimed(tmp_path, quiet):
        pass


def test_of_many_who_find_a_dead_claim_one_gets_the_folder(tmp_path: Path) -> None:
    for _ in range(10):
        put(tmp_path, started="another time")
        gate, over = threading.Barrier(8), threading.Barrier(8)
        got: list[bool] = []

        def enter(
            gate: threading.Barrier = gate,
            over: threading.Barrier = over,
            got: list[bool] = got,
        ) -> None:
            gate.wait()
            try:
                with claimed(tmp_path, quiet):
                    got.append(True)
                    over.wait()
            except UserError:
                over.wait()

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        assert not list(tmp_path.iterdir())


def test_the_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.05)
    with claimed(tmp_path, quiet):
        os.utime(tmp_path / CLAIM, (0, 0))
        time.sleep(0.5)
        assert (tmp_path / CLAIM).stat().st_mtime > 1e9


def test_who_slept_through_a_takeover_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.05)
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path, quiet):
        put(tmp_path, pid=1)
        time.sleep(5)
    assert "taken over" in capsys.readouterr().err
    assert (tmp_path / CLAIM).exists()  # it is the other's


def test_who_is_patient_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_POLL_SECONDS", 0.01)
    order = []

    def second() -> None:
        with claimed(tmp_path, quiet, patient=True):
            order.append("second")

    with claimed(tmp_path, quiet):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_object_store_is_said_not_to_be_locked() -> None:
    pytest.importorskip("upath")
    from snscc_ray.config.paths import as_path

    said: list[str] = []
    with claimed(as_path("memory://bucket/run"), said.append):
        pass
    assert len(said) == 1 and "cannot be locked" in said[0]
