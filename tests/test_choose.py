from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import DataSettings, EncoderSettings, Recipe
from snscc_ray.data.look import ImageStats, inspect_images
from snscc_ray.data.sources import list_rows
from snscc_ray.fit.choose import Preferences, choose
from snscc_ray.fit.overrides import as_set, data_settings
from snscc_ray.runs.plan import check

WHERE: dict[str, Any] = {"source": "auto", "path": "anywhere"}


def chosen(seen: ImageStats, *, gpu: bool = False, free: float = 64, **wishes: Any) -> Recipe:
    """Unless an encoder is wished for, one that learns from scratch. free: GiB of memory."""
    machine: dict[str, Any] = {"gpu": gpu, "free_bytes": int(free * 2**30)}
    wished = Preferences(**{"clusters": 5, "from_scratch": "encoder" not in wishes, **wishes})
    recipe, picks = choose("mine", WHERE, seen, wishes=wished, **machine)
    assert all(pick.value and pick.why for pick in picks)
    return recipe


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("side", [8, 13, 28, 96, 3000])
@pytest.mark.parametrize("rows", [20, 47, 300, 5000, 1_000_000])
def test_what_is_chosen_can_be_run(rows: int, side: int, grey: bool, gpu: bool) -> None:
    recipe = chosen(ImageStats(rows, side, grey), gpu=gpu)
    check(recipe, rows, 1)
    assert recipe.data.channels == (1 if grey else 3)
    assert recipe.data.image_size <= max(side, 32)
    assert 0 < recipe.pretrain.warmup_epochs <= recipe.pretrain.epochs / 5
    if grey:
        assert recipe.pretrain.view.flip == 0


def test_small_sets_are_gone_over_more_often() -> None:
    few, many = (chosen(ImageStats(rows, 28, False)) for rows in (500, 20_000))
    assert few.pretrain.epochs > 10 * many.pretrain.epochs
    assert few.pretrain.batch_size <= 250 < many.pretrain.batch_size


def test_a_gpu_gets_more() -> None:
    seen = ImageStats(5000, 200, False)
    cpu, gpu = chosen(seen), chosen(seen, gpu=True)
    assert cpu.encoder.name == "convnet" and gpu.encoder.name == "resnet18"
    assert cpu.data.image_size < gpu.data.image_size
    assert cpu.pretrain.epochs < gpu.pretrain.epochs


def test_rare_kinds_get_a_longer_pretrain() -> None:
    seen = ImageStats(710, 8, True)
    even, uneven = chosen(seen), chosen(seen, max_imbalance=10.0)
    assert uneven.pretrain.epochs == 2 * even.pretrain.epochs
    assert (uneven.train.epochs, uneven.boost.epochs) == (even.train.epochs, even.boost.epochs)


def test_wishes_are_kept() -> None:
    trained = EncoderSettings(name="resnet18", stem="standard", weights="default")
    recipe = chosen(ImageStats(5000, 200, True), image_size=48, max_imbalance=7.0, encoder=trained)
    assert recipe.data.image_size == 48 and recipe.train.max_imbalance == 7
    assert recipe.encoder == trained and recipe.pretrain.epochs == 0
    assert recipe.data.channels == 3 and recipe.data.mean is not None


@pytest.mark.parametrize(
    ("side", "cpu", "gpu"),
    [(5, 8, 8), (9, 9, 9), (28, 28, 28), (31, 31, 31), (32, 32, 32), (50, 32, 32), (70, 32, 64)],
)
def test_small_images_keep_their_size(side: int, cpu: int, gpu: int) -> None:
    seen = ImageStats(5000, side, False)
    assert chosen(seen).data.image_size == cpu
    assert chosen(seen, gpu=True).data.image_size == gpu


@pytest.mark.parametrize("rows", [300, 2000, 60_000, 1_000_000])
def test_a_gpu_keeps_the_proportion_of_the_stages(rows: int) -> None:
    recipe = chosen(ImageStats(rows, 64, False), gpu=True)
    steps = -(-rows // recipe.pretrain.batch_size)
    for stage, meant in (("pretrain", 20_000), ("train", 10_000), ("boost", 4000)):
        epochs = getattr(recipe, stage).epochs
        assert meant <= epochs * steps < meant + steps, stage


def test_a_part_of_an_epoch_is_a_warm_up_where_epochs_are_few() -> None:
    few = chosen(ImageStats(1_000_000, 64, False), gpu=True)
    assert few.pretrain.epochs < 20 and few.pretrain.warmup_epochs == few.pretrain.epochs / 20
    assert chosen(ImageStats(20_000, 32, False)).pretrain.warmup_epochs > 0


def test_the_batch_fits_into_the_memory() -> None:
    large = EncoderSettings(name="resnet50", stem="standard", weights="default")
    seen = ImageStats(20_000, 300, False)
    batches = [
        chosen(seen, gpu=True, free=free, encoder=large).pretrain.batch_size
        for free in (200, 80, 24, 8)
    ]
    # One image's activations take 82 MiB in float32, so its two views take as much in bfloat16.
    assert batches == [512, 256, 128, 32]
    assert chosen(seen, free=12, encoder=large).pretrain.batch_size < 256
    assert chosen(seen, gpu=True, free=8).pretrain.batch_size == 512
    with pytest.raises(UserError, match=r"resnet50 at 224 px needs .* GiB for 8 images"):
        chosen(seen, gpu=True, free=1, encoder=large)


def test_too_few_images() -> None:
    with pytest.raises(UserError, match=r"19 images are too few.*20"):
        chosen(ImageStats(19, 32, False))


def pictures(folder: Path, colours: int, greys: int) -> Path:
    drawing = np.random.default_rng(0)
    for number in range(colours + greys):
        pixels = drawing.integers(0, 256, (30 + number, 40, 3), np.uint8)
        if number >= colours:
            pixels[...] = pixels[..., :1]
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no")
    return folder


@pytest.mark.parametrize(("colours", "greys", "grey"), [(0, 9, True), (5, 5, False), (9, 0, False)])
def test_a_look_at_a_folder(tmp_path: Path, colours: int, greys: int, grey: bool) -> None:
    place = pictures(tmp_path, colours, greys)
    data = DataSettings(source="auto", path=str(place), num_clusters=2, image_size=32)
    seen = inspect_images(list_rows(data))
    assert seen.rows == colours + greys + 1 and seen.grey == grey
    assert 30 <= seen.side <= 40


def test_nothing_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no")
    data = DataSettings(source="auto", path=str(tmp_path), num_clusters=2, image_size=32)
    with pytest.raises(UserError, match=r"none of the sampled .*known format"):
        chosen(inspect_images(list_rows(data)))


def test_what_is_set_is_said_instead_of_what_was_chosen() -> None:
    recipe, picks = choose(
        "mine", WHERE, ImageStats(300, 32, True), gpu=False, free_bytes=2**36, wishes=Preferences(5)
    )
    given = ["encoder.width=4", "train.epochs=3", "boost.batch_size=16", "data.image_size=20"]
    given += ["train.view.crop_scale=[0.5,1]"]
    told = {pick.what: pick for pick in as_set(picks, override(recipe, given), given)}
    first, last = recipe.pretrain.epochs, recipe.boost.epochs
    for what, value in (
        ("image size", "20 px"),
        ("encoder", "convnet, width 4"),
        ("epochs", f"{first} + 3 + {last}"),
        ("batch", "128 / 128 / 16"),
    ):
        assert (told[what].value, told[what].why) == (value, "your setting")
    assert told["augmentation"].why == "your setting"
    assert told["colours"] in picks
    assert as_set(picks, recipe, ["seed=3"]) == picks


def test_settings_of_the_chosen_colours_do_not_stand_in_the_way_of_listing() -> None:
    given = ["data.mean=[0.3]", "data.std=[0.4]", "data.limit=5", "seed=3"]
    data = data_settings(WHERE, given)
    assert (data.path, data.limit, data.mean) == ("anywhere", 5, None)
    recipe = choose(
        "mine", WHERE, ImageStats(300, 32, True), gpu=False, free_bytes=2**36, wishes=Preferences(5)
    )[0]
    assert override(recipe, given).data.mean == (0.3,)
