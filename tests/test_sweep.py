"""Sweeps as a person runs them: real trials, real kills."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from snscc_ray.core.claim import CLAIM
from tests.ray_tools import (
    FEW_CHECKPOINTS,
    HANG_SECONDS,
    Cluster,
    Ray,
    own_ray,
    refused,
    sets,
    until,
)

SPACE = '''
from tune_spaces.space import Claim, Point, Space

def space(recipe):
    """Two settings of Train times two of Boost."""
    points = tuple(
        Point(f"K {k}, γ {g}", {"train.num_neighbors": k, "boost.confidence_threshold": g})
        for k in (3, 5) for g in (0.2, 0.3)
    )
    claim = Claim("K 5, γ 0.3", "boost", "the last is the best", "nowhere")
    return Space("mine", "Mine", points, "K and γ", ("train", "boost"), claims=(claim,))

def broken(recipe):
    points = (Point("sound", {}), Point("wild", {"train.learning_rate": 1e30}))
    return Space("broken", "Broken", points, "rate", ("train",))

def many(recipe):
    points = tuple(
        Point(f"rate {k}", {"train.learning_rate": 1e-4 * k}, last_stage="train")
        for k in range(1, 11)
    )
    return Space("many", "Many", points, "rate", ("train",))
'''
# What depends on the moment it was measured in.
TIMES = ("seconds", "images_per_second", "wait_share")


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spaces") / "my_space.py"
    file.write_text(SPACE)
    return file


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    with own_ray() as started:
        yield started


def command(spaces: Path, folder: Path, *more: object, name: str = "space") -> list[object]:
    few = sets(*FEW_CHECKPOINTS)
    return ["sweep", f"{spaces}:{name}", *few, "--seeds", 2, "--out", folder, *more]


def table(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    return [
        {name: value for name, value in row.items() if name.split("/")[-1] not in TIMES}
        for row in rows
    ]


@pytest.fixture(scope="module")
def whole(ray: Ray, spaces: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that nothing happens to, and what it said."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    done = ray.snscc(*command(spaces, folder)).wait()
    return folder, done.out


def test_a_sweep_leaves_a_table_a_figure_and_verdicts(whole: tuple[Path, str]) -> None:
    folder, said = whole
    rows = table(folder)
    assert len(rows) == 8 and {row["status"] for row in rows} == {"finished"}
    assert {row["seed"] for row in rows} == {0, 1}
    assert {row["train.num_neighbors"] for row in rows} == {3, 5}
    assert all(0 < row["boost/oracle/acc"] <= 1 and row["boost/epochs"] == 3 for row in rows)
    assert Image.open(folder / "mine.png").width > 300 and (folder / "mine.svg").exists()
    assert (folder / "results.csv").read_text().count("\n") == 9
    assert "| K 5, γ 0.3 |" in (folder / "results.md").read_text()
    assert "8 trials" in said and "about" in said
    assert "Best by health/score" in said and "the last is the best (nowhere)" in said
    # Two of Pretrain, four of Train, eight of Boost; and as many in the store.
    assert "14 trained instead of 24" in said
    stages = sorted(path.name.split("-")[0] for path in (folder.parent / "stages").iterdir())
    assert stages == ["boost"] * 8 + ["pretrain"] * 2 + ["train"] * 4


def test_tensorboard_can_compare_the_trials(whole: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = sorted((whole[0] / "tensorboard").iterdir())
    assert len(runs) == 8
    events = EventAccumulator(str(runs[0]))
    events.Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"train.num_neighbors" in start and b"seed" in start


def test_the_same_command_again_trains_nothing(
    ray: Ray, spaces: Path, whole: tuple[Path, str]
) -> None:
    folder, _ = whole
    stages = folder.parent / "stages"
    before = {path: path.stat().st_mtime_ns for path in stages.rglob("*") if path.is_file()}
    rows = table(folder)
    ray.snscc(*command(spaces, folder)).wait()
    assert {p: p.stat().st_mtime_ns for p in stages.rglob("*") if p.is_file()} == before
    assert table(folder) == rows


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_killed_at_random_moments_ends_with_the_same_table(
    ray: Ray, spaces: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder, kills, draw = tmp_path / "sweep", 0, random.Random(0)
    while kills < 10:
        running = ray.snscc(*command(spaces, folder))
        # From before the first trial to the last stage, further on as more is done.
        time.sleep(draw.uniform(5, 25))
        if running.process.poll() is not None:
            assert table(folder) == table(whole[0])
            shutil.rmtree(tmp_path)  # and once more, until there are ten kills
            tmp_path.mkdir()
            continue
        running.send(signal.SIGKILL)
        running.wait(-signal.SIGKILL)
        kills += 1
        for left in ray.processes():
            left.kill()
    ray.snscc(*command(spaces, folder)).wait()
    assert table(folder) == table(whole[0])


@pytest.mark.slow
def test_a_trial_that_fails_is_said_and_the_others_end(
    ray: Ray, spaces: Path, whole: tuple[Path, str]
) -> None:
    folder = whole[0].parent / "broken"  # beside the first, whose Pretrain it finds
    done = ray.snscc(*command(spaces, folder, name="broken")).wait(1)
    refused(done, "2 of 4 trials failed", "the same command")
    rows = table(folder)
    by_point = {(row["point"], row["seed"]): row for row in rows}
    for seed in (0, 1):
        assert by_point["sound", seed]["status"] == "finished"
        lost = by_point["wild", seed]
        assert lost["status"] == "failed" and "nan-loss" in lost["reason"]
    assert "wild" in done.out and "nan-loss" in done.out
    names = [path.name for path in (folder.parent / "stages").iterdir()]
    assert sum(name.startswith("pretrain") for name in names) == 2


@pytest.mark.slow
def test_asha_stops_trials_that_fall_behind(
    ray: Ray, spaces: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "asha"
    more = ["--scheduler", "asha", "--grace", 1, "--max-concurrent", 1]
    done = ray.snscc(*command(spaces, folder, *more)).wait()
    rows = table(folder)
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert stopped and len(stopped) < len(rows)
    assert all(row["stopped_at"].split()[0] in ("train", "boost") for row in stopped)
    assert "stopped" in done.out
    # Stopped, and its actor used again: it has given back what it had for itself.
    assert not list((tmp_path / "stages").rglob(f"{CLAIM}*"))
    full = {(row["point"], row["seed"]): row for row in table(whole[0])}
    for row in rows:
        if row["status"] == "finished":  # the same stages as in the full sweep
            known = {name: value for name, value in row.items() if value is not None}
            whole_row = full[row["point"], row["seed"]]
            assert known == {name: whole_row[name] for name in known}
            assert "boost/oracle/acc" in known


@pytest.mark.slow
def test_asha_with_all_places_and_several_seeds_leaves_no_trial_out(
    ray: Ray, spaces: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "asha"
    more = ["--scheduler", "asha", "--grace", 1, "--seeds", 3]
    ray.snscc(*command(spaces, folder, *more)).wait()
    rows = table(folder)
    assert len(rows) == 12 and {row["status"] for row in rows} <= {"finished", "stopped"}
    assert {row["seed"] for row in rows if row["status"] == "finished"} == {0, 1, 2}
    ended = [row for row in rows if row["status"] == "finished"]
    assert all(row["boost/epochs"] == 3 for row in ended)
    assert all(row["stopped_at"] for row in rows if row not in ended)
    assert not list((tmp_path / "stages").rglob(f"{CLAIM}*"))


@pytest.mark.slow
def test_asha_leaves_no_place_free_while_trials_wait(
    ray: Ray, spaces: Path, tmp_path: Path
) -> None:
    """Ten trials in two places. A trial holds its stage's folder while it trains."""
    more = ["--scheduler", "asha", "--grace", 1, "--seeds", 1, "--max-concurrent", 2]
    asked = command(spaces, tmp_path / "asha", *more, *sets("train.epochs=6"), name="many")
    running = ray.snscc(*asked)
    seen: list[tuple[float, int, int]] = []  # when, trials begun, places taken
    began = time.monotonic()
    while running.process.poll() is None:
        assert time.monotonic() - began < HANG_SECONDS, running.said()
        trials = list((tmp_path / "stages").glob("train-*"))
        taken = sum((trial / CLAIM).exists() for trial in trials)
        seen.append((time.monotonic(), len(trials), taken))
        time.sleep(0.02)
    running.wait()
    rows = table(tmp_path / "asha")
    assert len(rows) == 10 and {row["status"] for row in rows} == {"finished", "stopped"}
    assert sum(row["status"] == "stopped" for row in rows) >= 3
    last = next(when for when, begun, _ in seen if begun == 10)
    full = [when for when, _, taken in seen if taken == 2 and when < last]
    # A place is taken again at once: the actor of the trial before goes on with the next.
    assert max(later - now for now, later in pairwise([*full, last])) < 10, seen


@pytest.mark.slow
def test_what_ray_tune_keeps_of_a_sweep_may_be_broken(
    ray: Ray, spaces: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    """Killed in mid-write: a sweep goes on by what it has written down itself."""
    folder = tmp_path / "sweep"
    running = ray.snscc(*command(spaces, folder))
    until(lambda: bool(list((tmp_path / "stages").glob("train-*/train/stage.json"))), running.said)
    running.send(signal.SIGKILL)
    running.wait(-signal.SIGKILL)
    for left in ray.processes():
        left.kill()
    state = [path for path in (folder / "tune").rglob("*") if path.is_file()]
    assert any(path.name == "tuner.pkl" for path in state)
    assert any(path.name.startswith("experiment_state") for path in state)
    for number, path in enumerate(state):
        cut = path.read_bytes()[: path.stat().st_size // 2]
        path.write_bytes(b"\x00garbled" if number % 2 else cut)
    done = {path: path.read_bytes() for path in (tmp_path / "stages").rglob("stage.json")}
    ray.snscc(*command(spaces, folder)).wait()
    assert table(folder) == table(whole[0])
    assert done and all(path.read_bytes() == content for path, content in done.items())


@pytest.mark.slow
def test_a_sweep_says_that_all_nodes_are_gone_and_goes_on_with_new_ones(
    spaces: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    with own_ray() as own:
        cluster = Cluster(own)
        node = cluster.add()
        at = ["--address", cluster.address]
        running = own.snscc(*command(spaces, tmp_path / "sweep", *at))
        stages = tmp_path / "stages"
        until(lambda: bool(list(stages.glob("train-*/train/stage.json"))), running.said)
        cluster.lose(node)
        says = "waiting for a node for a trial (1 CPU): no running node is large enough"
        until(lambda: says in running.out, running.said)
        cluster.add()
        running.wait()
    assert table(tmp_path / "sweep") == table(whole[0])


@pytest.mark.slow
def test_a_sweep_whose_nodes_do_not_come_back_ends(spaces: Path, tmp_path: Path) -> None:
    """The wait, which no option of a sweep sets, is shortened."""
    soon = (
        "from dataclasses import replace; from snscc_ray.sweep import session\n"
        "was = session.Options.scale\n"
        "session.Options.scale = lambda options: replace(was(options), wait=20)\n"
        "from snscc_ray.cli import main; main()"
    )
    with own_ray() as own:
        cluster = Cluster(own)
        node = cluster.add()
        asked = command(spaces, tmp_path / "sweep", "--address", cluster.address)
        running = own.start(sys.executable, "-c", soon, *asked)
        stages = tmp_path / "stages"
        until(lambda: bool(list(stages.glob("pretrain-*/pretrain"))), running.said)
        cluster.lose(node)
        refused(running.wait(2), "no trial could run for 20 s", "ray status", "the same command")


@pytest.mark.slow
def test_a_dry_run_says_what_there_is_to_train_and_writes_nothing(
    ray: Ray, spaces: Path, tmp_path: Path
) -> None:
    done = ray.snscc(*command(spaces, tmp_path / "sweep", "--dry-run")).wait()
    assert "8 trials" in done.out and "minutes, measured from a few steps" in done.out
    assert "Nothing was written" in done.out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_optuna_asks_for_points_one_after_the_other(
    ray: Ray, spaces: Path, whole: tuple[Path, str]
) -> None:
    folder = whole[0].parent / "optuna"  # beside the first, whose stages it finds
    more = ["--searcher", "optuna", "--samples", 3]
    done = ray.snscc(*command(spaces, folder, *more)).wait()
    rows = table(folder)
    assert len({row["point"] for row in rows}) == 3 and len(rows) == 6
    full = {(row["point"], row["seed"]): row for row in table(whole[0])}
    assert all(row == full[row["point"], row["seed"]] for row in rows)
    assert "1 of 4 points not tried" in done.out


@pytest.mark.slow
def test_a_trial_of_two_workers_is_that_of_one(
    ray: Ray, spaces: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    more = ["--workers-per-trial", 2, "--samples", 1, "--seeds", 1]
    ray.snscc(*command(spaces, folder, *more)).wait()
    full = {(row["point"], row["seed"]): row for row in table(whole[0])}
    [row] = table(folder)
    one = full[row["point"], row["seed"]]
    assert row["pretrain/oracle/acc"] == pytest.approx(one["pretrain/oracle/acc"], abs=0.02)
    assert row["status"] == "finished"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--cpus-per-trial", 999], ["a trial takes 999 CPU", "--cpus-per-trial"]),
        (["--gpus-per-trial", 1], ["1 GPU", "--gpus-per-trial"]),
        (["--workers-per-trial", 2, "--gpus-per-trial", 0.5], ["--gpus-per-trial 0.5", "1 or 0"]),
        (["--scheduler", "best"], ["--scheduler best", "asha"]),
        (["--searcher", "best"], ["--searcher best", "optuna"]),
        (["--searcher", "optuna"], ["--searcher optuna", "--samples"]),
        (["--scheduler", "median"], ["another search", "--overwrite"]),
        (["--metric", "accuracy"], ["--metric accuracy", "health/score"]),
        (["--seeds", 3], ["another seeds", "--overwrite"]),
        (["--set", "train.epochs=2"], ["another recipe", "--overwrite"]),
    ],
)
def test_mistakes_are_one_line(
    ray: Ray, spaces: Path, whole: tuple[Path, str], more: list[object], says: list[str]
) -> None:
    running = ray.snscc(*command(spaces, whole[0], *more)).wait(2)
    refused(running, *says)


def test_an_unknown_space_is_refused_with_the_nearest(ray: Ray, tmp_path: Path) -> None:
    refused(ray.snscc("sweep", "epsilom", "--out", tmp_path / "x").wait(2), "epsilon")
    assert not (tmp_path / "x").exists()
