"""What people add to, and the names that settings allow for it, say the same."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

from snscc_ray.answers.export import _FORMATS as FORMATS
from snscc_ray.answers.export import Format
from snscc_ray.cli.answers.export import export
from snscc_ray.compare import methods
from snscc_ray.config.recipes import RECIPES
from snscc_ray.config.settings import (
    LIBRARIES,
    DataSettings,
    PretrainSettings,
    Settings,
    TrainSettings,
)
from snscc_ray.data.sources import READERS
from snscc_ray.models import libraries
from snscc_ray.training.stages.objectives import OBJECTIVES
from snscc_ray.training.stages.pretext import PRETEXTS
from tune_spaces import SPACES


def allowed(settings: type[Settings], field: str) -> set[Any]:
    return set(get_args(settings.model_fields[field].annotation))


def test_every_pretext_and_objective_is_a_setting() -> None:
    assert allowed(PretrainSettings, "method") == set(PRETEXTS)
    assert allowed(TrainSettings, "objective") == set(OBJECTIVES)


def test_every_source_of_images_is_a_setting() -> None:
    assert allowed(DataSettings, "source") == {"auto", *READERS}


def test_every_library_of_encoders_is_a_setting() -> None:
    assert set(LIBRARIES) == set(libraries.LIBRARIES)


def test_every_recipe_has_the_name_that_it_is_found_by() -> None:
    assert all(build().name == name for name, build in RECIPES.items())
    assert all(inspect.getdoc(build) for build in RECIPES.values())


def test_every_space_has_the_name_that_it_is_found_by() -> None:
    recipe = RECIPES["digits"]()
    assert all(build(recipe).name == name for name, build in SPACES.items())


def test_every_method_has_a_file_and_every_file_is_a_method() -> None:
    folder = Path(inspect.getfile(methods)).parent
    places = (path.relative_to(folder) for path in folder.rglob("*.py"))
    files = {".".join(place.with_suffix("").parts) for place in places}
    shared = {"__init__", "features.__init__", "features.inputs"}
    assert {method.file for method in methods.METHODS.values()} == files - shared


def test_every_format_is_an_option_of_export() -> None:
    assert set(get_args(Format)) == set(FORMATS)
    assert set(FORMATS) < set(inspect.signature(export).parameters)
