"""Choose the points of a space that a sweep tries: all, a random sample, or Optuna's proposals.

A search is a generator. It yields the points of each round, and receives the mean figure of every
point tried so far, by label (None: failed, or stopped early). It needs no saved state to resume
after a kill: the same figures give the same points.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence

from snscc_ray.config.errors import UserError
from tune_spaces.space import Point, Space

Found = Mapping[str, float | None]
Search = Generator[Sequence[Point], Found, None]

# Attempts per round: Optuna may propose points tried before, or points outside the space.
_TRIES = 50


def at_once(space: Space, samples: int | None, seed: int) -> Search:
    """Yield all points in one round, or `samples` of them drawn at random."""
    points: Sequence[Point] = space.points
    if samples is not None and samples < len(points):
        points = random.Random(seed).sample(points, samples)
    yield points


def by_optuna(space: Space, samples: int, seed: int, together: int) -> Search:
    """Yield `samples` points proposed by Optuna's TPE, `together` of them per round.

    Fields that always change together, such as K of Train and of Boost, are one parameter.
    Raises UserError if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("--searcher optuna needs Optuna; pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fields = list(dict.fromkeys(name for point in space.points for name in point.overrides))
    columns = {name: tuple(point.overrides.get(name) for point in space.points) for name in fields}
    apart = list({column: name for name, column in reversed(columns.items())}.values())[::-1]
    kinds: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(list(dict.fromkeys(columns[name])))
        for name in apart
    }
    by_values = {
        tuple(point.overrides.get(name) for name in apart): point for point in space.points
    }
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=max(2, min(10, samples // 3)), constant_liar=True
        ),
    )
    asked: list[Point] = []
    found: Found = {}

    def tell(trial: optuna.Trial, value: float | None) -> None:
        state = optuna.trial.TrialState
        study.tell(trial, value, state=state.PRUNED if value is None else state.COMPLETE)

    while len(asked) < min(samples, len(space.points)):
        waiting: list[tuple[optuna.Trial, Point]] = []
        for _ in range(_TRIES):
            trial = study.ask(kinds)
            point = by_values.get(tuple(trial.params[name] for name in apart))
            if point is None:
                tell(trial, None)
            elif point.label in found:
                tell(trial, found[point.label])
            elif point in asked:
                tell(trial, None)  # already in this round
            else:
                asked.append(point)
                waiting.append((trial, point))
            if len(waiting) == together or len(asked) == min(samples, len(space.points)):
                break
        if not waiting:
            return  # Optuna proposes only known points
        found = yield [point for _, point in waiting]
        for trial, point in waiting:
            tell(trial, found.get(point.label))
