from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from snscc_ray.cli.run import _print_result
from snscc_ray.config import recipes
from snscc_ray.config.errors import TrainingError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core import checkpoints
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import Batch, ResidentData
from snscc_ray.runs import run
from snscc_ray.runs.monitor import Journal, NullMonitor, RunMonitor
from snscc_ray.training import engine
from snscc_ray.training.engine import Interrupted, fit
from snscc_ray.training.schedules import learning_rate
from snscc_ray.training.stages.pretrain import Pretrain
from snscc_ray.training.workers import LocalWorker
from tests.conftest import TINY, equal_states, execute_on, make_context

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


class StopAtEpochEnd(NullMonitor):
    """Asks the process to stop, as a cluster would, after one epoch of one stage."""

    def __init__(self, stage: str, epoch: int) -> None:
        self.at = (stage, epoch)

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        if (stage, epoch) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def finals(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {stage: checkpoints.load(folder / stage / "final.pt")["network"] for stage in STAGES}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: ImageSet
) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    recipe = override(recipes.get("digits"), TINY)
    execute_on(recipe, tiny_images, folder, LocalWorker(folder, CPU), NullMonitor())
    return finals(folder)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_stopping_at_any_epoch_boundary_changes_nothing(
    stage: StageName,
    epoch: int,
    tiny: Recipe,
    tiny_images: ImageSet,
    uninterrupted: dict[str, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    worker = LocalWorker(tmp_path, CPU)
    with pytest.raises(Interrupted):
        execute_on(tiny, tiny_images, tmp_path, worker, StopAtEpochEnd(stage, epoch))
    assert not (tmp_path / stage / "final.pt").exists()
    torch.manual_seed(1234)  # what a new process happens to start with must not matter
    execute_on(tiny, tiny_images, tmp_path, worker, NullMonitor())
    resumed = finals(tmp_path)
    for name in STAGES:
        assert equal_states(resumed[name], uninterrupted[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_in_mid_epoch_changes_nothing(
    stage: StageName, uninterrupted: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    # Seven steps an epoch, a checkpoint every fourth: the kill at step 9 loses one step.
    overrides = [*TINY, "runtime.checkpoint_seconds=1000", "runtime.checkpoint_steps=4"]
    environment = {**os.environ, "THREADS": str(torch.get_num_threads())}

    def start(kill_at: int) -> int:
        words = [str(tmp_path), stage, str(kill_at), *overrides]
        command = [sys.executable, "-m", "tests.killed_run", *words]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode

    assert start(9) == -signal.SIGKILL
    latest = checkpoints.load(tmp_path / stage / "latest.pt")
    assert (latest["epoch"], latest["step"]) == (1, 1)
    assert start(0) == 0
    resumed = finals(tmp_path)
    for name in STAGES:
        assert equal_states(resumed[name], uninterrupted[name]), name


def test_a_finished_stage_is_reused_and_a_changed_one_is_not(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    worker = LocalWorker(tmp_path, CPU)
    execute_on(tiny, tiny_images, tmp_path, worker, NullMonitor())
    written = {s: (tmp_path / s / "final.pt").stat().st_mtime_ns for s in STAGES}
    changed = override(tiny, ["boost.top_fraction=0.5"])
    execute_on(changed, tiny_images, tmp_path, worker, NullMonitor())
    again = {s: (tmp_path / s / "final.pt").stat().st_mtime_ns for s in STAGES}
    assert [again[s] == written[s] for s in STAGES] == [True, True, False]


def test_metrics_lines_are_one_per_epoch_also_after_a_stop(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    class Stopping(RunMonitor):
        def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
            super().epoch(stage, epoch, figures)
            if (stage, epoch) == ("train", 1):
                os.kill(os.getpid(), signal.SIGTERM)

    worker, console = LocalWorker(tmp_path, CPU), Console(quiet=True)
    with pytest.raises(Interrupted):
        execute_on(
            tiny, tiny_images, tmp_path, worker, Stopping(Journal(tmp_path), Display(console))
        )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "epo')  # as a kill in mid-write leaves it
    monitor = RunMonitor(Journal(tmp_path), Display(console))
    execute_on(tiny, tiny_images, tmp_path, worker, monitor)
    monitor.finish()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    places = [(line["stage"], line["epoch"]) for line in lines if "warning" not in line]
    assert places == [(stage, epoch) for stage in STAGES for epoch in range(3)]
    train = next(line for line in lines if line["stage"] == "train")
    assert {
        "loss/local", "loss/global", "loss/cluster", "loss/entropy", "loss/mined", "loss/total",
        "learning_rate", "health/score", "health/confidence", "health/confident_share",
        "health/balance", "health/clusters_in_use", "health/neighbor_agreement", "oracle/acc",
        "oracle/nmi", "oracle/ari", "images_per_second", "wait_share",
    } <= train.keys()  # fmt: skip


def test_tensorboard_holds_scalars_and_views(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = RunMonitor(Journal(tmp_path), Display(Console(quiet=True)))
    execute_on(tiny, tiny_images, tmp_path, LocalWorker(tmp_path, CPU), monitor)
    monitor.journal.hyperparameters(tiny.model_dump(mode="json"), {"oracle/acc": 0.5})
    monitor.finish()
    for stage, views in (("pretrain", 2), ("train", 2), ("boost", 2)):
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage))
        events.Reload()
        assert [e.step for e in events.Scalars("loss/total")] == [0, 1, 2]
        assert sorted(events.Tags()["images"]) == [f"views/{i}" for i in range(views)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_nan_loss_stops_with_its_name_and_keeps_the_last_good_checkpoint(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    class Poisoned(Pretrain):
        def viewer(self, epoch):  # type: ignore[no-untyped-def]
            sound = super().viewer(epoch)

            def poisoned(images_BCHW: Tensor, rows_B: Tensor) -> tuple[Tensor, ...]:
                first, second = sound(images_BCHW, rows_B)
                return (first * math.nan, second) if epoch == 1 else (first, second)

            return poisoned

    class Warnings(NullMonitor):
        seen: list[tuple[str, int, str]]

        def warn(self, stage: str, epoch: int, message: str) -> None:
            self.seen = [(stage, epoch, message)]

    monitor, worker = Warnings(), LocalWorker(tmp_path, CPU)
    context = make_context(tiny, tiny_images)
    with pytest.raises(TrainingError, match=r"nan-loss: instance.*lower pretrain.learning_rate"):
        fit(Poisoned(context), context, worker, monitor, "x")
    assert monitor.seen[0][:2] == ("pretrain", 1)
    latest = worker.latest_checkpoint("pretrain")
    assert latest is not None and latest["epoch"] == 1
    assert all(bool(w.isfinite().all()) for w in latest["network"].values())


def test_collapse_is_warned_of_within_an_epoch(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    class Warnings(NullMonitor):
        def __init__(self) -> None:
            self.seen: list[tuple[str, int, str]] = []

        def warn(self, stage: str, epoch: int, message: str) -> None:
            self.seen.append((stage, epoch, message))

    collapsing = override(
        tiny,
        ["train.head=linear", "train.entropy_weight=0", "train.cluster_weight=0",
         "train.learning_rate=0.05", "train.agreement=log"],
    )  # fmt: skip
    monitor = Warnings()
    execute_on(
        collapsing,
        tiny_images,
        tmp_path,
        LocalWorker(tmp_path, CPU),
        monitor,
        ("pretrain", "train"),
    )
    assert any(s == "train" and m.startswith("collapse: only") for s, _, m in monitor.seen)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_methods_and_precisions_learn(
    method: str, precision: str, tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = override(
        tiny,
        [f"precision={precision}", f"pretrain.method={method}", "pretrain.queue_size=64",
         "pretrain.epochs=16", "pretrain.clip_norm=5", "pretrain.key_momentum=0.9",
         "pretrain.temperature=0.2"],
    )  # fmt: skip

    class Losses(NullMonitor):
        def __init__(self) -> None:
            self.values: list[float] = []

        def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
            self.values.append(figures["loss/total"])

    monitor = Losses()
    worker = LocalWorker(tmp_path, CPU)
    execute_on(recipe, tiny_images, tmp_path, worker, monitor, ("pretrain",))
    assert min(monitor.values[-2:]) < monitor.values[1] - 0.05


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_a_method_resumes_its_copy_of_the_network(
    method: str, tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    class StopInMidEpoch(NullMonitor):
        steps = 0

        def advance(self) -> None:
            self.steps += 1
            if self.steps == 10:  # of seven an epoch
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = override(
        tiny,
        [f"pretrain.method={method}", "pretrain.queue_size=64", "pretrain.key_momentum=0.9",
         "runtime.checkpoint_seconds=1000"],
    )  # fmt: skip
    whole = LocalWorker(tmp_path / "whole", CPU)
    execute_on(recipe, tiny_images, whole.folder, whole, NullMonitor(), ("pretrain",))
    expected = checkpoints.load(whole.folder / "pretrain" / "final.pt")["network"]
    for stop in (StopInMidEpoch(), StopAtEpochEnd("pretrain", 1)):
        worker = LocalWorker(tmp_path / type(stop).__name__, CPU)
        with pytest.raises(Interrupted):
            execute_on(recipe, tiny_images, worker.folder, worker, stop, ("pretrain",))
        torch.manual_seed(1234)
        execute_on(recipe, tiny_images, worker.folder, worker, NullMonitor(), ("pretrain",))
        found = checkpoints.load(worker.folder / "pretrain" / "final.pt")["network"]
        assert equal_states(found, expected), type(stop).__name__


def test_the_speed_counts_until_the_device_has_finished(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading the losses is where a GPU is waited for.
    read = engine._Loop._means

    def slowly(self: engine._Loop) -> dict[str, float]:
        time.sleep(0.5)
        return read(self)

    monkeypatch.setattr(engine._Loop, "_means", slowly)
    recipe = override(tiny, ["pretrain.epochs=1"])
    monitor = RunMonitor(Journal(tmp_path), Display(Console(quiet=True)))
    execute_on(recipe, tiny_images, tmp_path, LocalWorker(tmp_path, CPU), monitor, ("pretrain",))
    monitor.finish()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["images_per_second"] < len(tiny_images.catalog) / 0.5


def test_an_epoch_that_waits_for_its_images_says_so(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = ResidentData.epoch

    def slowly(self: ResidentData, *arguments: object) -> Iterator[Batch]:
        for batch in at_once(self, *arguments):  # type: ignore[arg-type]
            time.sleep(0.2)
            yield batch

    recipe = override(tiny, ["pretrain.epochs=2"])
    for name, waits in (("quick", False), ("slow", True)):
        if waits:
            monkeypatch.setattr(ResidentData, "epoch", slowly)
            monkeypatch.setattr(engine, "_LEAST_SECONDS", 1.0)
        folder = tmp_path / name
        monitor = RunMonitor(Journal(folder), Display(Console(quiet=True)))
        execute_on(recipe, tiny_images, folder, LocalWorker(folder, CPU), monitor, ("pretrain",))
        monitor.finish()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        shares = [line["wait_share"] for line in lines if "wait_share" in line]
        warned = [line["warning"] for line in lines if "warning" in line]
        assert len(shares) == 2 and all((share > 0.5) == waits for share in shares), shares
        assert [text.startswith("waits-for-images: ") for text in warned] == [True] * waits


def test_the_baseline_is_there_before_the_first_stage(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    class Killed(NullMonitor):
        def start(self, stage: str, epochs: int, steps: int, done: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute_on(tiny, tiny_images, tmp_path, LocalWorker(tmp_path, CPU), Killed())
    found = json.loads((tmp_path / "baselines.json").read_text())["kmeans_pixels"]
    assert found["images"] == len(tiny_images.catalog)


def test_of_many_images_the_baseline_takes_a_sample_and_says_so(
    tiny: Recipe,
    tiny_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "_BASELINE_NUMBERS", 100 * tiny_images.images.flatten(1).shape[1])
    result = execute_on(tiny, tiny_images, tmp_path, LocalWorker(tmp_path, CPU), NullMonitor())
    found = result.figures["baselines"]["kmeans_pixels"]
    assert found["images"] == 100 < len(tiny_images.catalog)
    assert 0 < found["oracle/acc"] <= 1
    _print_result(result.figures, tmp_path)
    assert "k-means, 100 images" in capsys.readouterr().out


def test_a_bfloat16_run_keeps_its_precision_and_how_far_float32_is(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = override(tiny, ["precision=bfloat16"])
    execute_on(recipe, tiny_images, tmp_path, LocalWorker(tmp_path, CPU), NullMonitor())
    for stage in ("train", "boost"):
        held = checkpoints.load(tmp_path / stage / "final.pt")
        assert held["precision"] == "bfloat16"
        known = held["in_float32"]
        assert known["rows"] == 200 and known["same_cluster"] > 0.9
        assert 0 < known["largest_difference"] < 0.2
    exact = tmp_path / "exact"
    execute_on(tiny, tiny_images, exact, LocalWorker(exact, CPU), NullMonitor())
    held = checkpoints.load(exact / "boost" / "final.pt")
    assert held["precision"] == "float32" and held["in_float32"] == {}


def test_schedules() -> None:
    base = recipes.get("digits").pretrain.model_copy(
        update={"epochs": 100, "learning_rate": 1.0, "warmup_epochs": 10, "schedule": "cosine"}
    )
    assert learning_rate(base, 0) == 0
    assert learning_rate(base, 5) == pytest.approx(0.5)
    assert learning_rate(base, 10) == pytest.approx(1)
    assert learning_rate(base, 55) == pytest.approx(0.5)
    assert learning_rate(base, 100) == pytest.approx(0)
    constant = base.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 99) == 1
    step = base.model_copy(
        update={"schedule": "step", "milestones": (30, 60), "warmup_epochs": 0, "decay": 0.1}
    )
    assert [learning_rate(step, e) for e in (29, 30, 60)] == pytest.approx([1, 0.1, 0.01])
