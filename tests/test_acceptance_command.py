"""The commands for the day a GPU is at hand: what they start, go on with, refuse and count."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks.cifar10_acceptance import request_for, rows_of
from benchmarks.epoch import context_for, noise, stage_for, views_of
from benchmarks.throughput import Side, flops_per_image, measure, peak_flops
from snscc_ray import recipes
from snscc_ray.config import STAGES, StageName
from snscc_ray.errors import UserError
from snscc_ray.overrides import override
from snscc_ray.run_folder import read_recipe, write_recipe

CPU = torch.device("cpu")


def arguments(out: Path, data: str = "a", **others: object) -> argparse.Namespace:
    given = {"recipe": "cifar10", "seed": 3, "minutes": 2.5, "settings": ["train.epochs=50"]}
    return argparse.Namespace(out=out, data=Path(data), **{**given, **others})


def test_a_new_run_has_the_whole_time(tmp_path: Path) -> None:
    request = request_for(arguments(tmp_path))
    recipe = request.recipe()
    assert (request.budget, request.resume) == (150, False)
    assert (recipe.seed, recipe.data.path, recipe.train.epochs) == (3, "a", 50)


def test_the_same_command_goes_on_with_the_epochs_that_were_chosen_elsewhere(
    tmp_path: Path,
) -> None:
    chosen = override(request_for(arguments(tmp_path)).recipe(), ["train.epochs=7"])
    write_recipe(tmp_path, chosen)
    request = request_for(arguments(tmp_path, data="b"))
    assert (request.budget, request.resume, request.recipe_name) == (None, True, None)
    kept = read_recipe(tmp_path)
    assert (kept.data.path, kept.train.epochs) == ("b", 7)


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"recipe": "cifar20"}, {"settings": ["train.num_neighbors=5"]}]
)
def test_a_folder_of_another_run_is_refused_and_left_alone(
    other: dict[str, object], tmp_path: Path
) -> None:
    write_recipe(tmp_path, request_for(arguments(tmp_path)).recipe())
    before = (tmp_path / "recipe.json").read_text()
    with pytest.raises(UserError, match="holds a run of other settings"):
        request_for(arguments(tmp_path, data="b", **other))
    assert (tmp_path / "recipe.json").read_text() == before


def test_the_result_has_a_line_for_each_stage_also_without_labels(tmp_path: Path) -> None:
    speeds = {"pretrain": [5.0, 900.0, 30.0], "train": [7.0], "boost": []}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for stage, values in speeds.items():
            for value in values:
                file.write(json.dumps({"stage": stage, "images_per_second": value}) + "\n")
        file.write('{"stage": "boost", "warning": "w"}\n')
    figures = {
        "baselines": {},
        "stages": {stage: {"health/score": 0.5, "seconds": 1.0} for stage in STAGES},
    }
    rows = rows_of(figures, tmp_path, recipes.get("cifar10"))
    assert [row["what"] for row in rows] == ["pretrain+kmeans", "train", "boost"]
    assert [row["images_per_second"] for row in rows] == [30.0, 7.0, None]
    assert [row["epochs"] for row in rows] == [500, 500, 200]
    assert all(row["acc"] is None and row["score"] == 0.5 for row in rows)


@pytest.mark.parametrize("name", STAGES)
def test_flops_are_those_of_the_encoder_forward_and_backward(name: StageName) -> None:
    recipe = override(
        recipes.get("cifar10"), ["encoder.name=convnet", "encoder.width=2", "data.image_size=8"]
    )
    context = context_for(recipe, noise(recipe, 32), CPU)
    found = flops_per_image(stage_for(name, context).network, context, views_of(recipe, name))
    # Multiply and add are two; backward is twice forward, but for the images' own gradient.
    macs = [3 * 2 * 64, 2 * 2 * 64, 2 * 4 * 16, 4 * 4 * 16, 4 * 8 * 4, 8 * 8 * 4]
    encoder = sum(2 * 9 * mac * (2 if index == 0 else 3) for index, mac in enumerate(macs))
    head = 8 * 512 + 512 * 128 if name == "pretrain" else 8 * 10 * (3 if name == "train" else 1)
    assert found == pytest.approx(views_of(recipe, name) * (encoder + 3 * 2 * head))


def test_sides_are_measured_in_turns_and_compared_within_a_round() -> None:
    calls: list[str] = []
    sides = [
        Side(name, 8, lambda name=name: calls.append(name), "bare pretrain")  # type: ignore[misc]
        for name in ("bare pretrain", "pretrain", "lightly")
    ]
    rows = measure(sides, {}, 2, CPU)
    assert calls == ["bare pretrain", "pretrain", "lightly"] * 3  # the first round does not count
    assert rows[0]["share"] == 1 and rows[2]["x lightly"] == 1
    assert rows[0]["x torchvision"] is None and rows[0]["utilisation"] is None
    assert peak_flops(CPU) is None
