"""The command for a quarter of an hour on a GPU, on this CPU with a tiny network."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bundle, carry
from benchmarks.gpu.__main__ import beside_expected, run_phase
from benchmarks.gpu.cifar10 import EPOCHS, STOPPED, epochs_that_fit, pays, recipe_for, speeds_in
from snscc_ray.answers.predict import load_model
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training.workers import LocalWorker
from tests.conftest import execute_on, shards

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------ bundle


class StopIn(NullMonitor):
    """Stops a run in the second epoch of a stage, as a second Ctrl-C would."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        if (stage, epoch) == (self.stage, 1):
            raise KeyboardInterrupt


class Starts(NullMonitor):
    """Notes how many steps of each stage were done when it began."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
        self.found[stage] = done


def stopped_run(stage: str, recipe: Recipe, images: ImageSet, folder: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        execute_on(recipe, images, folder, LocalWorker(folder, CPU), StopIn(stage))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_from_its_bundle(
    stage: str, tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    run = stopped_run(stage, tiny, tiny_images, tmp_path / "run")
    files = bundle.pack(run, tmp_path / "out", limit=10_000)
    assert len(files) > 1 and all(file.stat().st_size <= 10_000 for file in files)
    whole = sum(file.stat().st_size for file in run.rglob("*.pt"))
    assert sum(file.stat().st_size for file in files) < whole

    elsewhere = tmp_path / "elsewhere"
    bundle.unpack(tmp_path / "out", elsewhere)
    starts = Starts()
    result = execute_on(tiny, tiny_images, elsewhere, LocalWorker(elsewhere, CPU), starts)
    assert list(result.figures["stages"]) == list(STAGES)
    assert all("oracle/acc" in figures for figures in result.figures["stages"].values())
    # Stages that were done are not done again.
    done = [one for one in STAGES if (run / one / "stage.json").exists()]
    for one in done:
        before = json.loads((run / one / "stage.json").read_text())
        assert json.loads((elsewhere / one / "stage.json").read_text()) == before
    first, steps = next(iter(starts.found.items()))
    # Boost begins again; the others go on after the epoch that was saved.
    assert first == stage and (steps > 0) == (stage != "boost")


def test_what_goes_on_has_the_weights_in_half_precision(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    run = stopped_run("train", tiny, tiny_images, tmp_path / "run")
    bundle.pack(run, tmp_path / "out")
    bundle.unpack(tmp_path / "out", tmp_path / "elsewhere")
    for name in ("pretrain/final.pt", "train/latest.pt"):
        then, now = (torch.load(folder / name) for folder in (run, tmp_path / "elsewhere"))
        for key, weight in then["network"].items():
            held = now["network"][key]
            assert held.dtype == weight.dtype
            torch.testing.assert_close(held, weight, rtol=1e-3, atol=1e-6)
    assert now["optimizer"]["state"] == {} and then["optimizer"]["state"]
    assert (now["epoch"], now["step"]) == (then["epoch"], then["step"])


def test_what_half_precision_cannot_hold_is_kept_whole() -> None:
    held = {"a": torch.tensor([1e6]), "b": [torch.tensor([0.5]), torch.tensor([3])]}
    halved = bundle._each(held, bundle._half)
    assert halved["a"].dtype == torch.float32 and halved["b"][0].dtype == torch.float16
    assert halved["b"][1].dtype == torch.int64


def test_a_finished_run_is_a_model(tiny: Recipe, tiny_images: ImageSet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    execute_on(tiny, tiny_images, run, LocalWorker(run, CPU), NullMonitor())
    bundle.pack(run, tmp_path / "out")
    bundle.unpack(tmp_path / "out", tmp_path / "model")
    assert not (tmp_path / "model" / "train" / "final.pt").exists()
    data = ResidentData(tiny_images.images, CPU)
    there, here = (load_model(f, "cpu").probabilities(data) for f in (run, tmp_path / "model"))
    torch.testing.assert_close(there, here, rtol=0, atol=5e-3)


def test_a_damaged_bundle_is_refused(tiny: Recipe, tiny_images: ImageSet, tmp_path: Path) -> None:
    run = stopped_run("pretrain", tiny, tiny_images, tmp_path / "run")
    files = bundle.pack(run, tmp_path / "out", limit=5000)
    with pytest.raises(UserError, match="exists already"):
        bundle.unpack(tmp_path / "out", run)
    files[1].rename(tmp_path / "aside")
    with pytest.raises(UserError, match="no whole bundle"):
        bundle.unpack(tmp_path / "out", tmp_path / "b")
    files[1].write_bytes((tmp_path / "aside").read_bytes())
    files[-1].write_bytes(b"")
    files[-2].write_bytes(files[-2].read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        bundle.unpack(tmp_path / "out", tmp_path / "b")
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.part").exists()
    with pytest.raises(UserError, match="holds no run"):
        bundle.pack(tmp_path / "nothing", tmp_path / "out")


# ------------------------------------------------------------------------------------ choices


def test_epochs_are_those_aimed_at_or_fewer_in_their_proportion() -> None:
    fast = {"pretrain": 1e9, "train": 1e9, "boost": 1e9}
    assert epochs_that_fit(fast, 60_000, 300, 4) == EPOCHS
    assert epochs_that_fit({}, 60_000, 300, 4) == EPOCHS
    slow = {"pretrain": 20_000.0, "train": 10_000.0, "boost": 10_000.0}
    fits = epochs_that_fit(slow, 60_000, 325, 2)
    seconds = sum(60_000 * fits[stage] / slow[stage] for stage in STAGES)
    assert 0.9 * 590 < seconds <= 590
    assert fits["train"] / fits["pretrain"] == pytest.approx(0.1, abs=0.01)
    assert epochs_that_fit(slow, 60_000, 1, 1)["pretrain"] == 1


def test_batches_divide_the_set() -> None:
    recipe = recipe_for(tiny=False)
    assert all(60_000 % getattr(recipe, stage).batch_size == 0 for stage in STAGES)
    assert recipe.train.mined_from == "predictions"


def test_what_phase_two_found_is_read(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    assert speeds_in(file) == {} and not pays(file)
    rates = {"bare pretrain": 9.0, "pretrain": 8.0, "train": 5.0, "pretrain compiled": 8.3}
    rows = [{"what": what, "images_per_second": rate} for what, rate in rates.items()]
    file.write_text(json.dumps({"results": rows}))
    assert speeds_in(file) == {"pretrain": 8.0, "train": 5.0} and not pays(file)
    rows[-1]["images_per_second"] = 9.0
    file.write_text(json.dumps({"results": rows}))
    assert pays(file)


def test_measured_stands_beside_expected() -> None:
    rates = {"pretrain": 20_000.0, "torchvision, 8 loaders": 1000.0}
    rows = {row["what"]: row["measured"] for row in beside_expected(rates, 0.3)}
    assert rows["pretrain"] == 20_000 and rows["pretrain / torchvision, 8 loaders"] == 20
    assert rows["train"] == "-" and rows["pretrain utilisation"] == 0.3


# ------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize(
    ("program", "seconds", "status", "why"),
    [
        ("print('x')", 20, "ok", ""),
        ("import sys; print('gone wrong'); sys.exit(3)", 20, "failed", "exit status 3: gone wrong"),
        (f"import sys; sys.exit({STOPPED})", 20, "stopped", ""),
        ("import time; time.sleep(60)", 1, "killed", "did not end within 1 s"),
        ("import os; os.kill(os.getpid(), 9)", 20, "failed", "exit status -9: no output"),
    ],
)
def test_how_a_phase_ends(program: str, seconds: float, status: str, why: str) -> None:
    log = io.StringIO()
    ended = run_phase("one", [sys.executable, "-c", program], seconds, log)
    assert (ended.status, ended.why) == (status, why)
    assert ended.seconds < 15


def test_a_phase_that_will_not_stop_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__._GRACE", 1.0)
    pid = tmp_path / "pid"
    program = (
        "import signal, subprocess, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    ended = run_phase("one", [sys.executable, "-c", program], 3, io.StringIO())
    assert ended.status == "killed"
    for _ in range(50):
        if not _lives(int(pid.read_text())):
            break
        time.sleep(0.1)
    assert not _lives(int(pid.read_text()))


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(") ")[1][:1]
    except FileNotFoundError:
        return False


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data: nowhere does not exist"),
        (["--phases", "tests,sped"], "sped is none of tests, speed, cifar10"),
        (["--from", "."], "holds no whole bundle"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    given = ["--data", ROOT / "tests", "--seconds", 5, "--out", tmp_path / "out", *arguments]
    done = subprocess.run(command(*given), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_command_and_another_sitting(tmp_path: Path) -> None:
    data = shards("cifar10-jpeg")
    out = tmp_path / "out"
    given = ["--data", data, "--tiny", "--phases", "speed,cifar10"]
    process = subprocess.Popen(
        command(*given, "--seconds", 400, "--out", out),
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "speed: at most" in line:  # killed: the next phase goes on without it
            _kill_children(process.pid)
        if "pretrain" in line and "steps" in line:  # a limit from outside
            process.send_signal(signal.SIGTERM)
            break
    seen += process.stdout.readlines()
    assert process.wait() == 1, "".join(seen)
    report = json.loads((out / "report.json").read_text())
    first, *rest = report["phases"]
    assert (first["phase"], first["status"]) == ("speed", "failed")
    assert rest[-1]["why"] == "stopped from outside"
    files = list(out.iterdir())
    assert len(files) <= 8 and (out / "bundle.tar.00").exists()
    assert 0 <= report["cifar10"]["stages"].get("pretrain", {"epochs_done": 0})["epochs_done"] < 40

    again = tmp_path / "again"
    given = [*given[:-1], "cifar10", "--from", out]
    done = subprocess.run(
        command(*given, "--seconds", 600, "--out", again), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((again / "report.json").read_text())
    assert report["cifar10"]["finished"] and len(report["cifar10"]["sittings"]) == 2
    stages = report["cifar10"]["stages"]
    assert {stage: one["epochs_done"] for stage, one in stages.items()} == {
        "pretrain": 40, "train": 10, "boost": 5,
    }  # fmt: skip
    assert "oracle/acc" in stages["boost"]["figures"]


def _kill_children(pid: int) -> None:
    for _ in range(100):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            os.kill(int(children[0]), signal.SIGKILL)
            return
        time.sleep(0.05)
    raise AssertionError("no phase was started")


# -------------------------------------------------------------------------------------- carry


def test_what_is_carried_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(carry, "_ROOT", tmp_path)
    monkeypatch.setattr(carry, "tracked_bytes", lambda: 1000)
    monkeypatch.setattr(carry, "fetch_wheels", lambda folder, python: folder.mkdir())
    data, held = tmp_path / "data", tmp_path / "held"
    for folder, name in ((data, "a.parquet"), (held, "bundle.tar.00")):
        folder.mkdir()
        (folder / name).write_bytes(bytes(2000))
    monkeypatch.setattr(sys, "argv", ["carry", "--data", str(data), "--from", str(held)])
    carry.main()
    assert (tmp_path / ".gpu/data/a.parquet").exists()
    assert (tmp_path / ".gpu/bundle/bundle.tar.00").exists()
    said = capsys.readouterr().out
    assert "--data .gpu/data --seconds 560" in said and "--from .gpu/bundle" in said
    monkeypatch.setattr(carry, "_MOST_BYTES", 4000)
    with pytest.raises(SystemExit, match="are more than"):
        carry.main()
