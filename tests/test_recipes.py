from __future__ import annotations

import pytest

from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override, validate
from snscc_ray.config.settings import Recipe


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_json_round_trip(name: str) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert validate(recipe.model_dump(mode="json")) == recipe


def test_the_papers_settings() -> None:
    for name in ("cifar10", "cifar20", "imagenet10"):
        recipe = recipes.get(name)
        assert recipe.train.entropy_weight == 5
        assert recipe.train.num_neighbors == recipe.boost.num_neighbors == 10
        assert recipe.train.learning_rate == recipe.boost.learning_rate == 1e-4
        assert (recipe.train.epochs, recipe.boost.epochs) == (500, 200)
        assert (recipe.boost.confidence_threshold, recipe.boost.top_fraction) == (0.99, 0.7)
        assert recipe.train.view.num_operations == 4
    assert [recipes.get(n).train.view.cutout for n in ("cifar10", "stl10", "imagenet10")] == [
        16, 32, 75,
    ]  # fmt: skip
    assert recipes.get("imagenet_dogs").data.num_clusters == 15
    assert len(recipes.get("imagenet_dogs").data.classes) == 15


@pytest.mark.parametrize("name", ["cifar10_best", "cifar20_best", "imagenette"])
def test_recipes_that_have_not_run_at_full_length_say_so(name: str) -> None:
    assert "untested at full length" in (recipes.RECIPES[name].__doc__ or "")


def test_ours_see_the_same_images_as_the_papers() -> None:
    for name in ("cifar10", "cifar20"):
        assert recipes.get(f"{name}_best").data == recipes.get(name).data


def test_override_reaches_any_field() -> None:
    recipe = override(
        recipes.get("digits"),
        ["train.num_neighbors=20", "train.view.flip=0.25", "seed=3", "data.path=some where"],
    )
    assert recipe.train.num_neighbors == 20
    assert recipe.train.view.flip == 0.25
    assert recipe.seed == 3
    assert recipe.data.path == "some where"


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("train.num_neighbours=5", "did you mean train.num_neighbors?"),
        ("nonsense=5", "unknown field"),
        ("train=5", "train=5"),
        ("train.num_neighbors=0", "train.num_neighbors=0: input should be greater than or equal"),
        ("train.epochs=many", 'train.epochs="many": input should be a valid integer'),
        ("boost.confidence_threshold=1.5", "boost.confidence_threshold=1.5"),
        ("encoder.name=vgg", "'convnet', 'resnet18', 'resnet34' or 'resnet50'"),
        ("train.view.flip=-1", "train.view.flip=-1"),
        ("data.mean=[0.5,0.5]", "mean needs one number per channel (channels=1)"),
        ("data.std=[0]", "std must be above 0"),
        ("train.num_neighbors=21", "pretrain.mined_neighbors"),
        ("train.epochs", "write FIELD=VALUE"),
        ("train.learning_rate=Infinity", "finite number"),
        ("train.view.crop_scale=[0.9,0.1]", "give the smaller number first"),
        ("train.view.original.x=1", "unknown field"),
        ("train.original_view.flip=0", "train.original_view is empty"),
    ],
)
def test_a_wrong_override_names_field_value_and_mend(assignment: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        override(recipes.get("digits"), [assignment])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean cifar20"):
        recipes.get("cifar")


def test_a_recipe_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipes.get("digits").train.epochs = 1  # type: ignore[misc]
