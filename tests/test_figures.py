from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tune_spaces
from snscc_ray.config import recipes
from snscc_ray.config.settings import STAGES
from snscc_ray.sweep import figures
from tune_spaces.space import Point, Space


def rows_of(space: Space, recipe: str, seeds: int = 2, labels: bool = True) -> list[dict[str, Any]]:
    """Every point finished; figures that differ by point, seed and stage."""
    rows = []
    for place, point in enumerate(space.points):
        for seed in range(seeds):
            row = {
                "space": space.name, "recipe": recipe, "point": point.label, "seed": seed,
                "status": "finished", "reason": None, "stopped_at": None,
            }  # fmt: skip
            for number, stage in enumerate(STAGES[: STAGES.index(point.last_stage or "boost") + 1]):
                value = 0.7 + 0.01 * (place % 7) + 0.02 * seed + 0.01 * number
                names = ("health/score", "health/neighbor_agreement", "health/balance")
                if labels:
                    names += ("oracle/acc", "oracle/nmi", "oracle/ari")
                row |= {f"{stage}/{name}": value - 0.05 * k for k, name in enumerate(names)}
            rows.append(row)
    return rows


def curves_of(space: Space, boost: int = 4) -> dict[str, dict[int, list[dict[str, Any]]]]:
    return {
        point.label: {
            seed: [
                {"stage": stage, "epoch": epoch, "oracle/acc": 0.5 + 0.01 * epoch + 0.1 * seed,
                 "oracle/nmi": 0.4, "oracle/ari": 0.3}
                for stage, epochs in (("pretrain", 3), ("train", 10), ("boost", boost))
                if stage != "boost" or point.last_stage is None
                for epoch in range(epochs)
            ]
            for seed in range(2)
        }
        for point in space.points
    }  # fmt: skip


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def coloured(path: Path, color: str) -> int:
    """How many pixels have just that colour."""
    rgb = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
    return int((pixels(path) == rgb).all(2).sum())


def check_files(paths: list[Path], name: str) -> None:
    png, svg = paths
    assert (png.name, svg.name) == (f"{name}.png", f"{name}.svg")
    held = pixels(png)
    height, width, _ = held.shape
    assert 600 <= height <= 1800 and 800 <= width <= 2200
    assert len(np.unique(held.astype(int) @ [65536, 256, 1])) > 20
    root = ElementTree.parse(svg).getroot()
    assert root.tag.endswith("svg") and len(list(root.iter())) > 50
    assert {path.name for path in png.parent.iterdir()} == {png.name, svg.name}


@pytest.mark.parametrize(
    ("name", "recipe"),
    # On a data set of the paper's, its values are in the same panels.
    [
        *((name, "digits") for name in tune_spaces.SPACES),
        *((name, "imagenet10") for name in ("gamma", "pretext")),
    ],
)
def test_every_space_is_drawn(name: str, recipe: str, tmp_path: Path) -> None:
    space = tune_spaces.load(name)(recipes.get(recipe))
    paths = figures.draw(space, rows_of(space, recipe), tmp_path)
    check_files(paths, name)
    for color in figures._COLORS[:3]:  # ACC, NMI and ARI
        assert coloured(paths[0], color) > 100


def test_nothing_lies_outside_the_picture(tmp_path: Path) -> None:
    """The margin is white: no title, note or label is cut off."""
    for name in ("gamma", "pretext", "grid", "ablation-train"):
        space = tune_spaces.load(name)(recipes.get("digits"))
        rows = rows_of(space, "digits", seeds=3)[:-4]
        held = pixels(figures.draw(space, rows, tmp_path)[0])
        for edge in (held[0], held[-1], held[:, 0], held[:, -1]):
            assert (edge == 255).all(), name


def test_curves_need_lines_and_bars_stand_in_for_them(tmp_path: Path) -> None:
    space = tune_spaces.load("train-longer")(recipes.get("cifar10"))
    rows = rows_of(space, "cifar10")
    curves = figures.draw(space, rows, tmp_path / "curves", curves_of(space))
    bars = figures.draw(space, rows, tmp_path / "bars")
    check_files(curves, "train-longer")
    check_files(bars, "train-longer")
    # Two lines against three series.
    assert coloured(curves[0], figures._COLORS[2]) == 0 < coloured(bars[0], figures._COLORS[2])
    assert pixels(curves[0]).shape != pixels(bars[0]).shape
    empty = figures.draw(space, rows, tmp_path / "empty", {})
    assert empty[0].read_bytes() == bars[0].read_bytes()


def test_epochs_run_on_through_boost() -> None:
    lines = [
        {"stage": "pretrain", "epoch": 0, "oracle/acc": 0.1},
        {"stage": "train", "epoch": 0, "oracle/acc": 0.2},
        {"stage": "train", "epoch": 1, "oracle/acc": 0.4},
        {"stage": "boost", "epoch": 0, "oracle/acc": 0.8},
    ]
    other = [{"stage": "train", "epoch": 1, "oracle/acc": 0.6}, {"stage": "train", "epoch": 0}]
    epochs, means, spreads = figures._over_epochs([lines, other], "oracle/acc")
    assert epochs.tolist() == [1, 2, 3]
    assert means.tolist() == pytest.approx([0.2, 0.5, 0.8])
    assert spreads.tolist() == pytest.approx([0, 0.2 / np.sqrt(2), 0])


def test_a_grid_is_averaged_field_by_field() -> None:
    points = tuple(
        Point(f"{e}-{k}", {"train.entropy_weight": e, "train.num_neighbors": k,
                           "boost.num_neighbors": k})
        for e in (2.0, 5.0) for k in (1, 5)
    )  # fmt: skip
    space = Space("g", "t", points, "x", ("train",), form="grid")
    values = {"2.0-1": 0.1, "2.0-5": 0.2, "5.0-1": 0.3, "5.0-5": 0.6}
    rows = [
        {"recipe": "r", "point": label, "seed": seed, "status": "finished", "reason": None,
         "stopped_at": None, "train/oracle/acc": value + 0.1 * seed}
        for label, value in values.items() for seed in (0, 1)
    ]  # fmt: skip
    first, second = figures._field_panels(space, rows, ["oracle/acc"])
    assert (first.axis, list(first.labels)) == ("ε", ["2", "5"])
    assert (second.axis, list(second.labels)) == ("K", ["1", "5"])
    means = {label: mean for label, (mean, _) in first.ours[0].items()}
    assert means == pytest.approx({"2": 0.15 + 0.05, "5": 0.45 + 0.05})
    assert first.ours[0]["2"][1] == pytest.approx(0.1 / np.sqrt(2))
    assert second.ours[0]["5"][0] == pytest.approx(0.4 + 0.05)


def test_the_papers_values_are_beside_those_of_their_data_set() -> None:
    def panels(recipe: str) -> list[figures._Panel]:
        space = tune_spaces.load("gamma")(recipes.get(recipe))
        name = "CIFAR-100" if recipe == "cifar20" else "CIFAR-10"
        metrics = ("oracle/acc", "oracle/nmi", "oracle/ari")
        return figures._point_panels(space, rows_of(space, recipe), metrics, name)

    [together] = panels("cifar20")
    assert together.ours and together.paper[0]["0.99"] == (0.508, 0)
    ours, paper = panels("digits")
    assert ours.ours and not ours.paper
    assert not paper.ours and paper.paper[1]["0.9"] == (0.781, 0)
    assert paper.title == "Boost: paper, CIFAR-10"


def test_without_labels(tmp_path: Path) -> None:
    space = tune_spaces.load("gamma")(recipes.get("images"))
    rows = rows_of(space, "images", labels=False)
    paths = figures.draw(space, rows, tmp_path)
    check_files(paths, "gamma")
    # One panel: the paper has no label-free figures to stand beside.
    assert pixels(paths[0]).shape[1] == 900


def test_failures_are_drawn_around(tmp_path: Path) -> None:
    space = tune_spaces.load("neighbors")(recipes.get("digits"))
    rows = rows_of(space, "digits", seeds=1)
    broken = [
        {key: value for key, value in row.items() if "/" not in key}
        | {"status": "failed", "reason": "train: $_\\{nan\n"}
        for row in rows
    ]
    for name, held in (("some", [*rows[:2], *broken[2:]]), ("all", broken), ("none", [])):
        check_files(figures.draw(space, held, tmp_path / name), "neighbors")
    for form in ("ablation-boost", "train-longer", "grid"):
        other = tune_spaces.load(form)(recipes.get("digits"))
        check_files(figures.draw(other, [], tmp_path / form), form)


def test_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    space = tune_spaces.load("sigma")(recipes.get("digits"))
    rows = rows_of(space, "digits")
    one, two = (figures.draw(space, rows, tmp_path / name) for name in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_bars_begin_at_zero_unless_they_could_not_be_told_apart() -> None:
    assert figures._floor([(0.2, 0.0), (0.8, 0.0)]) == 0
    assert figures._floor([(0.98, 0.0), (0.99, 0.0)]) == pytest.approx(0.97)
    assert figures._floor([]) == 0
