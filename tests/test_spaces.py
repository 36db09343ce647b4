from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tune_spaces
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe
from tune_spaces.paper import DATA_SETS, TABLE_IV
from tune_spaces.space import Claim, Figures, Point, Space

PAPER = Path(__file__).resolve().parents[2] / "shared" / "paper" / "snscc-paper.md"


def applied(recipe: Recipe, point: Point) -> Recipe:
    return override(recipe, [f"{k}={json.dumps(v)}" for k, v in point.overrides.items()])


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("name", tune_spaces.SPACES)
def test_every_recipe_takes_every_point(name: str, recipe: str) -> None:
    base = recipes.get(recipe)
    space = tune_spaces.load(name)(base)
    assert space.name == name
    changed = [applied(base, point) for point in space.points]
    # Points that are the same run would be trained once and compared with themselves.
    runs = {
        (made.model_dump_json(), p.last_stage)
        for made, p in zip(changed, space.points, strict=True)
    }
    assert len(runs) == len(space.points)
    for point, made in zip(space.points, changed, strict=True):
        for field, value in point.overrides.items():
            found: object = made
            for part in field.split("."):
                found = getattr(found, part)
            assert found == value


def test_the_points_are_the_papers() -> None:
    def values(name: str, field: str) -> list[object]:
        space = tune_spaces.load(name)(recipes.get("cifar10"))
        return [point.overrides[field] for point in space.points]

    assert values("epsilon", "train.entropy_weight") == [2, 5, 10]
    assert values("gamma", "boost.confidence_threshold") == [0.9, 0.95, 0.99]
    assert values("sigma", "boost.top_fraction") == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert values("neighbors", "train.num_neighbors") == [1, 5, 10, 20]
    assert values("neighbors", "boost.num_neighbors") == [1, 5, 10, 20]
    assert len(set(values("grid", "train.num_neighbors"))) == 4
    assert len(values("grid", "train.num_neighbors")) == 3 * 3 * 5 * 4


def test_train_longer_is_700_against_500_and_200_on_cifar10() -> None:
    longer, both = tune_spaces.load("train-longer")(recipes.get("cifar10")).points
    assert (longer.label, longer.overrides, longer.last_stage) == (
        "Train 700", {"train.epochs": 700}, "train",
    )  # fmt: skip
    assert (both.label, both.overrides, both.last_stage) == ("Train 500 + Boost 200", {}, None)
    short = tune_spaces.load("train-longer")(recipes.get("digits")).points
    assert [point.label for point in short] == ["Train 50", "Train 30 + Boost 20"]


def test_the_ablation_of_train_switches_the_papers_losses_and_keeps_the_rest() -> None:
    recipe = override(recipes.get("digits"), ["train.local_weight=0.5"])
    space = tune_spaces.load("ablation-train")(recipe)
    trains = {point.label: applied(recipe, point).train for point in space.points}
    weights = {
        label: (train.local_weight, train.global_weight, train.cluster_weight)
        for label, train in trains.items()
    }
    assert weights == {
        "local": (0.5, 0, 0),
        "global": (0, 1, 0),
        "cluster": (0, 0, 1),
        "local + global": (0.5, 1, 0),
        "local + global + cluster": (0.5, 1, 1),
    }
    assert {train.mined_weight for train in trains.values()} == {0}
    assert {train.entropy_weight for train in trains.values()} == {10}


def test_without_soft_neighbors_none_is_left() -> None:
    recipe = recipes.get("digits")
    points = {p.label: applied(recipe, p) for p in tune_spaces.load("pretext")(recipe).points}
    for label, made in points.items():
        soft = (
            made.train.local_weight, made.train.global_weight, made.train.mined_weight,
            made.boost.soft_weight,
        )  # fmt: skip
        assert soft == ((1, 1, 1, 1) if label.endswith("SN") else (0, 0, 0, 0))
        assert made.pretrain.method == ("moco" if label.startswith("MoCo") else "simclr")
    assert points["MoCo"].pretrain.queue_size == 4 * recipe.pretrain.batch_size
    # A recipe of MoCo's own keeps what it says.
    dogs = recipes.get("imagenet_dogs")
    moco = next(p for p in tune_spaces.load("pretext")(dogs).points if p.label == "MoCo + SN")
    assert applied(dogs, moco).pretrain == dogs.pretrain


def test_too_few_mined_neighbors_are_refused_and_not_raised() -> None:
    recipe = override(recipes.get("digits"), ["pretrain.mined_neighbors=10"])
    points = tune_spaces.load("neighbors")(recipe).points
    assert [applied(recipe, point).pretrain.mined_neighbors for point in points[:3]] == [10] * 3
    with pytest.raises(UserError, match=r"pretrain\.mined_neighbors=10; raise that too"):
        applied(recipe, points[3])


# ------------------------------------------------------------------------------------- the paper


def printed() -> dict[tuple[str, str], list[tuple[str, ...]]]:
    """(table, data set) -> its rows, in the paper's order of rows and of figures."""
    if not PAPER.exists():
        pytest.skip("the paper's text is not beside this checkout")
    found: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    table, sets = "", list[str]()
    for line in re.sub(r"</?b>|\*", "", PAPER.read_text()).splitlines():
        cells = line.rstrip().split("\t")
        if title := re.match(r"TABLE ([IVX]+)\s*$", line):
            table, sets = f"Table {title[1]}", []
        elif named := [cell for cell in cells if cell in DATA_SETS.values()]:
            sets = named
        figures = [cell for cell in cells[1:] if re.fullmatch(r"0\.\d{3}", cell)]
        if sets and figures and len(figures) % len(sets) == 0:
            each = len(figures) // len(sets)
            for n, name in enumerate(sets):
                row = tuple(figures[n * each : (n + 1) * each])
                found.setdefault((table, name), []).append(row)
    return found


def as_printed(figures: Figures) -> tuple[str, ...]:
    acc, nmi, ari = figures
    return tuple(f"{value:.3f}" for value in (nmi, acc, ari) if value is not None)


@pytest.mark.parametrize("name", ["gamma", "ablation-train", "pretext"])
def test_a_cited_table_is_the_papers_row_by_row(name: str) -> None:
    space = tune_spaces.load(name)(recipes.get("cifar10"))
    tables = printed()
    assert {key for key in tables if key[0] == space.where} == {
        (space.where, data_set) for data_set in space.paper
    }
    for data_set, stages in space.paper.items():
        assert list(stages) == list(space.stages)
        ours = [as_printed(stages[s][point.label]) for s in space.stages for point in space.points]
        assert ours == tables[space.where, data_set]


def test_the_default_points_are_those_of_table_iv() -> None:
    tables, cited = printed(), 0
    assert {name for table, name in tables if table == "Table IV"} == TABLE_IV.keys()
    for data_set, stages in TABLE_IV.items():
        last = tables["Table IV", data_set][-2:]
        assert [as_printed(stages["train"]), as_printed(stages["boost"])] == last
    for name in ("epsilon", "sigma", "neighbors", "grid", "ablation-boost", "train-longer"):
        space = tune_spaces.load(name)(recipes.get("cifar10"))
        for data_set, of_stage in space.paper.items():
            for stage, cells in of_stage.items():
                for label, figures in cells.items():
                    [point] = [point for point in space.points if point.label == label]
                    end = point.last_stage or stage
                    assert figures == TABLE_IV[data_set][end], (name, data_set, label)
                    recipe = applied(recipes.get("cifar10"), point)
                    assert recipe == recipes.get("cifar10")  # the paper's defaults
                    cited += 1
    assert cited == 5 * (1 + 1 + 2 + 1 + 2 + 1)


def test_a_table_agrees_with_the_default_point_of_table_iv() -> None:
    recipe = recipes.get("cifar10")
    gamma = tune_spaces.load("gamma")(recipe).paper
    train = tune_spaces.load("ablation-train")(recipe).paper
    pretext = tune_spaces.load("pretext")(recipe).paper
    for name, stages in TABLE_IV.items():
        if name in gamma:
            assert gamma[name]["boost"]["0.99"] == stages["boost"]
        if name in train:
            assert train[name]["train"]["local + global + cluster"][:2] == stages["train"][:2]
        if name in pretext:
            for stage in ("train", "boost"):
                assert pretext[name][stage]["MoCo + SN"][:2] == stages[stage][:2]


def test_a_claim_about_a_printed_table_is_true_of_that_table() -> None:
    for name in ("gamma", "ablation-train", "ablation-boost", "pretext"):
        space = tune_spaces.load(name)(recipes.get("cifar10"))
        for claim in space.claims:
            for data_set, stages in space.paper.items():
                cells = stages[claim.stage]
                for place in range(3):
                    column = {k: v[place] for k, v in cells.items() if v[place] is not None}
                    exception = (name, claim.stage, data_set, place)
                    if not column or exception == ("pretext", "boost", "ImageNet-10", 0):
                        continue  # the claim's `where` says so
                    assert max(column, key=lambda k: column[k] or 0) == claim.best, exception


# -------------------------------------------------------------------------------- loading, checks


def test_a_misspelt_space_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean epsilon"):
        tune_spaces.load("epsilom")
    with pytest.raises(UserError, match="there are epsilon, gamma"):
        tune_spaces.load("xyzzy")


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from tune_spaces.space import Point, Space

@dataclass
class Rates:
    values: tuple[float, ...] = (0.001, 0.01)

def rates(recipe):
    points = tuple(Point(f"{r:g}", {"train.learning_rate": r}) for r in Rates().values)
    return Space("rates", "Learning rate", points, "rate", ("train",))

def nothing(recipe):
    return [recipe.name]

number = 3
"""


def test_a_space_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    recipe = recipes.get("digits")
    space = tune_spaces.load(f"{tmp_path}/mine.py:rates")(recipe)
    assert [point.label for point in space.points] == ["0.001", "0.01"]
    assert applied(recipe, space.points[1]).train.learning_rate == 0.01


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine.py:rate", "has no function 'rate'"),
        ("mine.py:number", "has no function 'number'"),
        ("mine.py:nothing", "returns list; it must return"),
        ("mine.py", "mine.py:mine"),
        ("other.py:rates", "there is no file"),
        ("broken.py:rates", "broken.py cannot be read: SyntaxError"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def rates(:\n")
    with pytest.raises(UserError) as caught:
        tune_spaces.load(f"{tmp_path}/{name}")(recipes.get("digits"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_space_that_contradicts_itself_is_refused() -> None:
    two = (Point("a", {}), Point("b", {"train.epochs": 1}))
    with pytest.raises(UserError, match="two points 'a'"):
        Space("s", "", (Point("a", {}), Point("a", {})), "x", ("train",))
    for claim in (Claim("c", "train", "", ""), Claim("a", "boost", "", "")):
        with pytest.raises(UserError, match="correct `best` or `stage`"):
            Space("s", "", two, "x", ("train",), claims=(claim,))
    with pytest.raises(UserError, match="also a file's"):
        Space("../s", "", two, "x", ("train",))
    with pytest.raises(UserError, match="at least one point"):
        Space("s", "", (), "x", ("train",))


def test_the_shown_stages_are_reached() -> None:
    for build in tune_spaces.SPACES.values():
        space = build(recipes.get("digits"))
        ends = {STAGES.index(point.last_stage or "boost") for point in space.points}
        assert max(ends) == STAGES.index(space.stages[-1])
