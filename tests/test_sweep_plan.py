"""What a sweep trains: counted without training anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core import storage
from snscc_ray.runs.finished import stage_folder
from snscc_ray.runs.identity import stage_identity
from snscc_ray.sweep.plan import Job, Ledger, check_points, jobs_of, row_of, searched, trials_of
from snscc_ray.sweep.search import at_once
from tune_spaces import load
from tune_spaces.space import Point, Space

DIGITS = recipes.get("digits")


def identity(recipe: Recipe, stage: StageName) -> str:
    return stage_identity(recipe, stage, "pixels", "shuffled")


def counted(name: str, seeds: int = 3) -> tuple[int, ...]:
    trials = trials_of(load(name)(DIGITS).points, DIGITS, seeds, identity)
    return tuple(len(jobs) for jobs in jobs_of(trials).values())


def test_each_distinct_stage_is_trained_once() -> None:
    """γ and σ only touch Boost, ε and K touch Train, and nothing of these touches Pretrain."""
    assert counted("epsilon") == (3, 9, 0)
    assert counted("gamma") == (3, 3, 9)
    assert counted("sigma") == (3, 3, 15)
    assert counted("neighbors") == (3, 12, 12)
    assert counted("grid", seeds=2) == (2, 2 * 12, 2 * 180)
    assert counted("pretext", seeds=1) == (2, 4, 4)


def test_a_stage_is_shared_between_spaces() -> None:
    """The recipe's own point is the same in every space, whatever it is called there."""
    chains = []
    for name, label in (("gamma", "0.99"), ("sigma", "0.7"), ("neighbors", "10")):
        trials = trials_of(load(name)(DIGITS).points, DIGITS, 1, identity)
        (chain,) = (trial.chain for trial in trials if trial.point.label == label)
        chains.append(chain)
    assert chains[0] == chains[1] == chains[2]


def test_samples_are_the_same_points_for_every_seed() -> None:
    trials = trials_of(next(at_once(load("grid")(DIGITS), 7, 0)), DIGITS, 3, identity)
    of_seed = {
        seed: [trial.point.label for trial in trials if trial.seed == seed] for seed in range(3)
    }
    assert of_seed[0] == of_seed[1] == of_seed[2] and len(set(of_seed[0])) == 7


def test_points_that_do_not_fit_the_recipe_are_all_named() -> None:
    wrong = (
        Point("bad", {"train.num_neighbours": 3}),
        Point("good", {"train.num_neighbors": 3}),
        Point("wild", {"boost.confidence_threshold": 1.5}),
    )
    with pytest.raises(UserError) as error:
        check_points(Space("mine", "mine", wrong, "x", ("train",)), DIGITS)
    said = str(error.value)
    assert "space mine: bad: " in said and "num_neighbours" in said and "good" not in said
    assert "wild: boost.confidence_threshold=1.5" in said


def test_only_a_stage_whose_settings_differ_is_searched() -> None:
    jobs = jobs_of(trials_of(load("gamma")(DIGITS).points, DIGITS, 3, identity))
    assert [searched(jobs[stage]) for stage in STAGES] == [False, False, True]


def finish(ledger: Ledger, stage: StageName, name: str, **figures: float) -> None:
    place = stage_folder(ledger.store, stage, name) / stage
    storage.write_json(place / "stage.json", {"identity": name, "figures": figures})
    for file in ("final.pt", "neighbors.parquet"):
        (place / file).write_bytes(b"")


def test_a_row_says_how_its_trial_ended(tmp_path: Path) -> None:
    space = load("gamma")(DIGITS)
    ledger = Ledger(tmp_path / "stages", tmp_path / "sweep")
    trials = trials_of(space.points, DIGITS, 1, identity)
    whole, stopped, lost = trials
    finish(ledger, "pretrain", whole.chain["pretrain"], seconds=2.0)
    finish(ledger, "train", whole.chain["train"], **{"oracle/acc": 0.5, "seconds": 1.0})
    finish(ledger, "boost", whole.chain["boost"], **{"oracle/acc": 0.75, "seconds": 1.0})
    ledger.write("stopped", stopped.chain["boost"], {"epoch": 4, "figures": {"oracle/acc": 0.25}})
    ledger.write("failed", lost.chain["boost"], {"reason": "nan-loss"})
    rows = [row_of(trial, space, ledger) for trial in trials]
    assert [row["status"] for row in rows] == ["finished", "stopped", "failed"]
    assert rows[0]["boost/oracle/acc"] == 0.75 and rows[0]["boost.confidence_threshold"] == 0.9
    assert rows[1]["stopped_at"] == "boost epoch 4" and rows[1]["boost/epochs"] == 4
    assert rows[2]["reason"] == "boost: nan-loss" and rows[2]["train/oracle/acc"] == 0.5
    assert "boost/oracle/acc" not in rows[2]


def test_figures_that_depend_on_the_number_of_clusters_are_not_borrowed(tmp_path: Path) -> None:
    """Pretrain is one for all numbers of clusters, what k-means found in it is not."""
    space = Space(
        "mine", "mine", tuple(Point(f"{c}", {"data.num_clusters": c}) for c in (5, 10)), "C",
        ("train",),
    )  # fmt: skip
    trials = trials_of(space.points, DIGITS, 1, identity)
    assert len(jobs_of(trials)["pretrain"]) == 1
    ledger = Ledger(tmp_path / "stages", tmp_path / "sweep")
    finish(ledger, "pretrain", trials[0].chain["pretrain"], **{"oracle/acc": 0.9, "seconds": 3.0})
    row = row_of(trials[0], space, ledger)
    assert row["pretrain/seconds"] == 3.0 and "pretrain/oracle/acc" not in row


def test_trials_are_compared_with_those_of_their_own_seed(tmp_path: Path) -> None:
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    from snscc_ray.sweep.hooks import PerSeed

    ledger = Ledger(tmp_path / "stages", tmp_path / "sweep")
    jobs = [
        Job("train", f"seed{seed}-{n}", None, seed, DIGITS, {}) for seed in (0, 1) for n in range(3)
    ]

    def asha() -> TrialScheduler:
        return AsyncHyperBandScheduler(
            time_attr="epoch", metric="health/score", mode="max", max_t=8, grace_period=2,
            reduction_factor=2, stop_last_trials=False,
        )  # fmt: skip

    def told(scheduler: PerSeed, number: int, score: float, epoch: int = 2) -> str:
        config = {"trial": {"job": number, "seed": jobs[number].seed}}
        trial: Any = SimpleNamespace(trial_id=jobs[number].identity, config=config)
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"epoch": epoch, "health/score": score})

    scheduler = PerSeed(asha, jobs, jobs, ledger)
    assert told(scheduler, 0, 0.9) == TrialScheduler.CONTINUE
    assert told(scheduler, 3, 0.2) == TrialScheduler.CONTINUE  # low, but the first of its seed
    assert told(scheduler, 1, 0.5) == TrialScheduler.STOP
    assert told(scheduler, 4, 0.3) == TrialScheduler.CONTINUE
    record = ledger.read("stopped", jobs[1].identity)
    assert record == {"epoch": 2, "figures": {"health/score": 0.5}}
    assert ledger.ended(jobs[1]) and not ledger.ended(jobs[0])
    # A sweep that is continued remembers what the trials that have ended had reached.
    lines = stage_folder(ledger.store, "train", jobs[0].identity) / "metrics.jsonl"
    lines.parent.mkdir(parents=True)
    lines.write_text('{"stage": "train", "epoch": 1, "health/score": 0.9}\n')
    later = PerSeed(asha, jobs, [job for job in jobs if job != jobs[0]], ledger)
    config = {"trial": {"job": 1, "seed": 0}}
    trial: Any = SimpleNamespace(trial_id="another", config=config)
    later.on_trial_add(None, trial)
    result = {"epoch": 2, "health/score": 0.5}
    assert later.on_trial_result(None, trial, result) == TrialScheduler.STOP
