from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from snscc_ray.config import recipes
from snscc_ray.sweep.search import Search, at_once, by_optuna
from tune_spaces import load
from tune_spaces.space import Point, Space

GRID = load("grid")(recipes.get("digits"))  # 180 points


def goodness(point: Point) -> float | None:
    """Highest at ε 10, γ .95, σ .7, K 10, and falling in every direction."""
    wanted = {
        "train.entropy_weight": 10.0,
        "boost.confidence_threshold": 0.95,
        "boost.top_fraction": 0.7,
        "boost.num_neighbors": 10,
    }
    return -sum(abs(math.log(point.overrides[name] / best)) for name, best in wanted.items())


def followed(
    search: Search, value: Callable[[Point], float | None] = goodness
) -> tuple[list[list[Point]], dict[str, float | None]]:
    """The rounds a search asks for, told `value` of each point."""
    rounds, found = [list(next(search))], dict[str, float | None]()
    while True:
        found |= {point.label: value(point) for point in rounds[-1]}
        try:
            rounds.append(list(search.send(found)))
        except StopIteration:
            return rounds, found


def test_all_points_or_some_drawn_by_the_seed() -> None:
    [everything], _ = followed(at_once(GRID, None, 0))
    assert everything == list(GRID.points)
    [some], _ = followed(at_once(GRID, 40, 0))
    assert len({point.label for point in some}) == 40
    assert followed(at_once(GRID, 40, 0))[0] == [some] != followed(at_once(GRID, 40, 1))[0]
    assert len(followed(at_once(GRID, 999, 0))[0][0]) == 180


def test_optuna_asks_for_other_points_each_time_in_rounds() -> None:
    rounds, found = followed(by_optuna(GRID, 25, 0, 4))
    assert sum(map(len, rounds)) == 25 == len(found)
    assert all(len(points) <= 4 for points in rounds)
    assert all(point in GRID.points for points in rounds for point in points)


def test_optuna_comes_nearer_to_the_best_than_chance() -> None:
    def best(search: Search) -> float:
        return max(value for value in followed(search)[1].values() if value is not None)

    by_chance = sorted(best(at_once(GRID, 30, seed)) for seed in range(5))
    by_search = sorted(best(by_optuna(GRID, 30, seed, 2)) for seed in range(5))
    assert by_search[2] > by_chance[2]


def test_optuna_asked_again_with_the_same_figures_asks_for_the_same_points() -> None:
    assert followed(by_optuna(GRID, 15, 3, 3)) == followed(by_optuna(GRID, 15, 3, 3))
    assert followed(by_optuna(GRID, 15, 3, 3))[0] != followed(by_optuna(GRID, 15, 4, 3))[0]


def test_optuna_goes_on_where_trials_fail() -> None:
    rounds, _ = followed(by_optuna(GRID, 12, 0, 3), lambda point: None)
    assert sum(map(len, rounds)) == 12


@pytest.mark.parametrize("samples", [2, 3, 99])
def test_optuna_ends_when_a_space_has_no_more(samples: int) -> None:
    """Not a product: two of the four combinations are no points."""
    points = (Point("a", {"x": 1, "y": 1}), Point("b", {"x": 2, "y": 3}), Point("c", {"x": 1}))
    space = Space("odd", "Odd", points, "x and y", ("train",))
    rounds, _ = followed(by_optuna(space, samples, 0, 2), lambda point: 0.5)
    asked = [point.label for points in rounds for point in points]
    assert sorted(asked) == sorted(set(asked)) and len(asked) == min(samples, 3)
