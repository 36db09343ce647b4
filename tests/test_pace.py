"""How many epochs fit into a time, and when a stage will be over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from snscc_ray.cli.options import seconds_of
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe
from snscc_ray.core.eta import Eta
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.runs import local, pace
from snscc_ray.runs.folder import read_recipe
from snscc_ray.runs.local import run_here
from snscc_ray.runs.pace import Seconds, measure, within
from snscc_ray.runs.run import Request
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.schedules import learning_rate
from tests.conftest import TINY

PACE: Seconds = {"pretrain": (10, 2.0), "train": (5, 4.0), "boost": (0, 1.0)}


def epochs(recipe: Recipe) -> dict[str, int]:
    return {stage: getattr(recipe, stage).epochs for stage in STAGES}


def cost(recipe: Recipe) -> float:
    return sum(PACE[stage][0] + PACE[stage][1] * count for stage, count in epochs(recipe).items())


@pytest.mark.parametrize("seconds", [30, 100, 1000, 100_000])
def test_the_epochs_end_in_time_and_one_more_of_each_would_not(seconds: float) -> None:
    recipe = recipes.get("digits")  # 100, 30, 20 epochs
    fitting = within(recipe, PACE, seconds, STAGES)
    assert cost(fitting) <= seconds
    more = [f"{stage}.epochs={count + 1}" for stage, count in epochs(fitting).items()]
    assert cost(override(fitting, more)) > 0.9 * seconds
    shares = [count / epochs(recipe)[stage] for stage, count in epochs(fitting).items()]
    if seconds >= 1000:
        assert max(shares) - min(shares) <= 1 / 20  # the proportion of the recipe, to an epoch


@pytest.mark.parametrize(
    ("warmup", "seconds", "expected"),
    [
        (5, 2000, 5),  # longer than the recipe: what a start needs does not grow with it
        (5, 200, 5),
        (5, 60, 2.6),  # a fifth of 13
        (50, 200, 26.0),  # half of the recipe's stage, half of this one's
        (0, 200, 0),
    ],
)
def test_a_warm_up_keeps_its_epochs(warmup: float, seconds: float, expected: float) -> None:
    recipe = override(recipes.get("digits"), [f"pretrain.warmup_epochs={warmup}"])
    fitting = within(recipe, PACE, seconds, STAGES).pretrain
    assert fitting.warmup_epochs == pytest.approx(expected), fitting.epochs


def test_schedules_keep_their_shape() -> None:
    recipe = override(
        recipes.get("digits"),
        ["train.schedule=step", "train.milestones=[10,20]", "pretrain.warmup_epochs=0"],
    )
    fitting = within(recipe, PACE, 2000, STAGES)
    for stage in STAGES:
        old, new = getattr(recipe, stage), getattr(fitting, stage)
        assert new.epochs > old.epochs
        for share in (0.01, 0.04, 0.3, 0.6, 0.7, 0.99, 1.0):
            expected = learning_rate(old, share * old.epochs)
            assert learning_rate(new, share * new.epochs) == pytest.approx(expected, rel=1e-6)


def test_stages_that_are_not_run_or_have_no_epochs_stay() -> None:
    recipe = override(recipes.get("digits"), ["boost.epochs=0"])
    assert epochs(within(recipe, PACE, 1000, STAGES))["boost"] == 0
    only = within(recipe, PACE, 1000, ("pretrain",))
    assert epochs(only) == {"pretrain": 470, "train": 30, "boost": 0}


def test_a_budget_for_less_than_an_epoch_of_each_is_refused() -> None:
    with pytest.raises(UserError, match=r"--budget: one epoch of each stage takes about 22 s"):
        within(recipes.get("digits"), PACE, 20, STAGES)


@pytest.mark.parametrize(
    ("epoch", "measured", "once", "an_epoch"),
    [
        # Seconds outside the epochs: 1 + rows / 32. Fast: up to all rows; nothing is guessed.
        (0.001, [32, 128, 200], 1 + 200 / 32, 0.001),
        # Enough at the second size: the constant second is told from what grows.
        (0.5, [32, 128], 1 + 200 / 32, 0.5 * 200 / 128),
        # So slow that one look must do: all of it is taken to grow.
        (4.0, [32], 2 * 200 / 32, 4.0 * 200 / 32),
    ],
)
def test_what_a_few_rows_show_is_scaled_to_the_whole_set(
    epoch: float,
    measured: list[int],
    once: float,
    an_epoch: float,
    tiny: Recipe,
    tiny_images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    seen: list[int] = []

    def few(*given: object) -> dict[str, pace._Timed]:
        rows = given[3]
        assert isinstance(rows, int)
        seen.append(rows)
        return dict.fromkeys(STAGES, pace._Timed(3.0, 1 + rows / 32, epoch))

    monkeypatch.setattr(pace, "_measure", few)
    found = measure(
        tiny,
        tiny_images.catalog,
        ResidentData(tiny_images.images, torch.device("cpu")),
        torch.device("cpu"),
        tmp_path,
    )
    assert seen == measured
    for stage in STAGES:
        assert found[stage] == pytest.approx((3 + once, an_epoch))  # warm-up does not grow


def test_the_time_of_a_stage_has_three_parts(tiny: Recipe, tiny_images: ImageSet) -> None:
    known, images = tiny_images.catalog, tiny_images.images
    device = torch.device("cpu")
    timed = pace._measure(tiny, known, ResidentData(images[:64], device), 64, device)
    assert set(timed) == set(STAGES)
    assert all(of.epoch > 0 and of.once > 0 and of.warm_up >= 0 for of in timed.values())


def test_what_was_chosen_is_the_recipe_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "measure", lambda *_: PACE)
    folder = tmp_path / "run"
    result = run_here(Request("digits", list(TINY), folder, budget=36.0), Console(quiet=True))
    assert result is not None and list(result.figures["stages"]) == list(STAGES)
    kept = read_recipe(folder)
    assert epochs(kept) == {"pretrain": 2, "train": 2, "boost": 2}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage in STAGES:
        trained = [line for line in lines if line["stage"] == stage and "warning" not in line]
        assert len(trained) == getattr(kept, stage).epochs
    # The same folder needs nothing but --resume, and a second choice is refused.
    again = run_here(Request(None, [], folder, resume=True), Console(quiet=True))
    assert again is not None and again.figures["stages"] == result.figures["stages"]
    with pytest.raises(UserError, match="leave it out with --resume"):
        run_here(Request(None, [], folder, resume=True, budget=36.0), Console(quiet=True))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("25m", 1500), ("1.5h", 5400)])
def test_a_time_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "25", "0m", "-3m", "m", "1h30m"])
def test_another_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--budget {text}: give a number and a unit"):
        seconds_of(text)


def test_a_budget_too_small_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "measure", lambda *_: PACE)
    with pytest.raises(UserError, match="one epoch of each stage takes about 22 s"):
        run_here(Request("digits", list(TINY), tmp_path / "r", budget=22), Console(quiet=True))
    assert not (tmp_path / "r").exists()


def test_a_stop_while_measuring_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> Seconds:
        raise Interrupted

    monkeypatch.setattr(local, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_here(Request("digits", list(TINY), tmp_path / "r", budget=60), Console(quiet=True))
    assert not (tmp_path / "r").exists()


def test_eta_counts_what_an_epoch_ends_with_and_forgets_the_first() -> None:
    # Four epochs of ten steps; a step takes 1 s and an epoch's end 5 s, the first epoch 30 s more.
    eta, now = Eta(40, 0), 0.0
    assert eta.seconds(now) is None
    for epoch in range(3):
        for _ in range(10):
            now += 1 + 3 * (epoch == 0)
            eta.advance(1, now)
        if epoch == 0:
            assert eta.seconds(now) == pytest.approx(120)  # all it can know: four seconds a step
        now += 5
        eta.epoch_ended(now)
    assert eta.seconds(now) == pytest.approx(15)
    assert eta.seconds(now + 3) == pytest.approx(12)  # time goes on between two steps
    assert eta.seconds(now + 99) == 0


def test_eta_of_a_resumed_stage_starts_where_it_was_left() -> None:
    eta = Eta(100, 90)
    eta.advance(1, 52.0)
    assert eta.seconds(52.0) is None  # what came before the first step is no measure
    eta.advance(4, 60.0)
    assert eta.seconds(60.0) == pytest.approx(10)
