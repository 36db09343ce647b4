"""Which points of a space a sweep tries: all, some drawn at random, or what Optuna asks for.

A search is a generator: it yields points to try in rounds, and is sent the mean figure of every
point tried so far by its label (None: failed, or stopped early). It needs no state of its own to
go on after a kill: asked again with the same figures, it gives the same points.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence

from snscc_ray.config.errors import UserError
from tune_spaces.space import Point, Space

Found = Mapping[str, float | None]
Search = Generator[Sequence[Point], Found, None]

# Optuna proposes points that were tried before, and such as are not in the space.
_TRIES = 50


def at_once(space: Space, samples: int | None, seed: int) -> Search:
    """All points in one round, or `samples` of them drawn at random."""
    points: Sequence[Point] = space.points
    if samples is not None and samples < len(points):
        points = random.Random(seed).sample(points, samples)
    yield points


def by_optuna(space: Space, samples: int, seed: int, together: int) -> Search:
    """`samples` points that Optuna's TPE asks for, `together` of them in a round.

    Fields whose values always go together, such as K of Train and of Boost, are one parameter.
    Raises UserError where Optuna is not installed.
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
                tell(trial, None)  # of this very round
            else:
                asked.append(point)
                waiting.append((trial, point))
            if len(waiting) == together or len(asked) == min(samples, len(space.points)):
                break
        if not waiting:
            return  # it only asks for what is known
        found = yield [point for _, point in waiting]
        for trial, point in waiting:
            tell(trial, found.get(point.label))
