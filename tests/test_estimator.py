"""The method as a scikit-learn estimator."""

from __future__ import annotations

import doctest
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_clustering, parametrize_with_checks

import snscc_ray.runs.run
from snscc_ray import SNSCC
from snscc_ray.config import recipes
from snscc_ray.data.given import as_bytes
from snscc_ray.data.imageset import ImageSet
from snscc_ray.runs.folder import read_recipe
from snscc_ray.runs.local import run_here
from snscc_ray.runs.run import Request, _Run
from snscc_ray.training.engine import Interrupted
from tests.conftest import TINY

DIGITS = {"recipe": "digits", "settings": [s for s in TINY if "limit" not in s], "device": "cpu"}
DOCS = Path(__file__).resolve().parents[1] / "docs"


# ------------------------------------------------------------------------ scikit-learn's own checks

QUICK = (
    "data.image_size=4", "encoder.name=convnet", "encoder.width=2",
    "pretrain.batch_size=8", "pretrain.projection_hidden=4", "pretrain.projection_dim=4",
    "pretrain.mined_neighbors=3", "train.batch_size=8", "train.num_neighbors=2",
    "train.num_heads=1", "train.view.cutout=2", "train.learning_rate=0.003",
    "boost.batch_size=8", "boost.num_neighbors=2", "boost.view.cutout=2",
)  # fmt: skip


def epochs(pretrain: int, train: int, boost: int) -> list[str]:
    return [f"pretrain.epochs={pretrain}", f"train.epochs={train}", f"boost.epochs={boost}"]


class Pictures(SNSCC):
    """What the checks hand over, a few numbers of any size in a row, made into pictures."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = False
        return tags

    def _images(self, table: np.ndarray) -> np.ndarray:
        pixels = np.zeros((len(table), 16))
        pixels[:, : table.shape[1]] = 0.5 + 0.5 * np.sin(table[:, :16] / 2)
        return np.rint(pixels.reshape(-1, 4, 4) * 255).astype(np.uint8)


ONE_CLUSTER = "asks for one cluster, which would be no clustering"
DO_NOT_APPLY = {
    "check_dont_overwrite_parameters": ONE_CLUSTER,
    "check_methods_subset_invariance": ONE_CLUSTER,
    "check_fit2d_1sample": ONE_CLUSTER,
    "check_fit2d_1feature": ONE_CLUSTER,
    "check_fit2d_predict1d": ONE_CLUSTER,
    "check_clustering": "one epoch learns nothing; it stands below, with eight",
}


@parametrize_with_checks(
    [Pictures(2, recipe="images", settings=(*QUICK, *epochs(1, 1, 1)), device="cpu")],
    expected_failed_checks=lambda estimator: DO_NOT_APPLY,
)
def test_scikit_learn_finds_its_conventions_kept(estimator: Any, check: Any) -> None:
    check(estimator)


def test_scikit_learn_sees_it_cluster() -> None:
    # The recipe's warm-up is for hundreds of epochs: of eight it would leave none.
    settings = (*QUICK, *epochs(8, 8, 0), "pretrain.warmup_epochs=0")
    check_clustering("Pictures", Pictures(recipe="images", settings=settings, device="cpu"))


def test_without_a_recipe_it_chooses_as_fit_does() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
    model = SNSCC(3, settings=epochs(1, 1, 1), device="cpu").fit(colours)
    chosen = model.model_.recipe
    assert (chosen.data.image_size, chosen.data.channels) == (12, 3)
    assert chosen.encoder.name == "convnet" and chosen.pretrain.batch_size == 16
    assert model.labels_.shape == (40,) and np.array_equal(model.predict(colours), model.labels_)
    with pytest.raises(ValueError, match="too few"):
        SNSCC(3).fit(colours[:10])


# ------------------------------------------------------------------------------- the same engine


@pytest.fixture(scope="module")
def digits(tiny_images: ImageSet) -> np.ndarray:
    return tiny_images.images[:, 0].numpy()


@pytest.fixture(scope="module")
def fitted(digits: np.ndarray) -> SNSCC:
    return SNSCC(10, **DIGITS).fit(digits)


def written(folder: Path, images: np.ndarray) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{number:03}.png" for number in range(len(images))]
    for file, pixels in zip(files, images, strict=True):
        Image.fromarray(pixels).save(file)
    return files


def test_it_is_the_run_of_the_command(fitted: SNSCC, tmp_path: Path) -> None:
    run_here(Request("digits", list(TINY), tmp_path / "run"), Console(quiet=True))
    assigned = pq.read_table(tmp_path / "run" / "assignments.parquet")
    assert fitted.labels_.tolist() == assigned["cluster"].to_pylist()
    assert len(set(fitted.labels_)) > 2
    confidence = fitted.probabilities_.max(axis=1)
    assert confidence.tolist() == assigned["confidence"].to_pylist()


def test_all_forms_of_the_same_images_get_the_same_answers(
    fitted: SNSCC, digits: np.ndarray, tmp_path: Path
) -> None:
    files = written(tmp_path / "files", digits)
    forms = {
        "N, H, W, C": digits[..., None],
        "N, C, H, W": digits[:, None],
        "tensor": torch.from_numpy(digits),
        "integers": digits.astype(np.int64),
        "floats": digits / 255,
        "half-sized floats": torch.from_numpy(digits)[:, None].float() / 255,
        "table": digits.reshape(len(digits), -1).astype(np.float32) / 255,
        "colour, last": np.repeat(digits[..., None], 3, axis=3),
        "colour, first": np.repeat(digits[:, None], 3, axis=1),
        "paths": files,
        "texts": [str(file) for file in files],
        "folder": tmp_path / "files",
        "text": str(tmp_path / "files"),
    }
    for name, form in forms.items():
        model = pickle.loads(pickle.dumps(fitted)).set_params(image_shape=(8, 8))
        if name == "table":
            model.n_features_in_ = 64
        assert np.array_equal(model.predict_proba(form), fitted.probabilities_), name
    assert np.array_equal(fitted.predict(digits), fitted.labels_)
    features = fitted.transform(digits)
    assert features.shape == (200, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_a_fit_on_files_is_the_fit_on_their_pixels(
    fitted: SNSCC, digits: np.ndarray, tmp_path: Path
) -> None:
    written(tmp_path / "files", digits)
    other = SNSCC(10, **DIGITS)
    assert np.array_equal(other.fit_predict(tmp_path / "files"), fitted.labels_)
    assert other.ids_[:2].tolist() == ["000.png", "001.png"]
    assert fitted.ids_[:2].tolist() == ["0", "1"]


def test_images_of_another_size_are_brought_to_the_runs_as_files_are(
    fitted: SNSCC, tmp_path: Path
) -> None:
    large = np.random.default_rng(0).integers(0, 256, (5, 20, 24), dtype=np.uint8)
    files = written(tmp_path / "files", large)
    assert np.array_equal(fitted.transform(large), fitted.transform(files))
    smaller = SNSCC(10, image_size=6, random_state=3, **DIGITS)
    recipe = smaller._adapted(recipes.get("digits"), smaller._given(large, reset=True))
    assert (recipe.data.image_size, recipe.seed) == (6, 3)


def test_a_folder_that_stays(
    digits: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SNSCC(10, folder=tmp_path / "run", random_state=1, **DIGITS).fit(digits)
    assert read_recipe(tmp_path / "run").seed == 1
    monkeypatch.setattr(snscc_ray.runs.run, "fit", None)  # nothing is trained again
    again = SNSCC(10, folder=tmp_path / "run", random_state=1, **DIGITS).fit(digits)
    assert np.array_equal(again.probabilities_, first.probabilities_)
    with pytest.raises(ValueError, match=r"another recipe \(seed is 1 there and 2 here\)"):
        SNSCC(10, folder=tmp_path / "run", random_state=2, **DIGITS).fit(digits)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="no run"):
        SNSCC(10, folder=tmp_path / "else", **DIGITS).fit(digits)


def test_a_fit_that_was_stopped_goes_on(
    fitted: SNSCC, digits: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: object) -> None:
        raise Interrupted

    model = SNSCC(10, folder=tmp_path / "run", **DIGITS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Run, "_train", stop)
        model.fit(digits)
    monkeypatch.setattr(_Run, "_pretrain", None)  # that stage was finished
    assert np.array_equal(model.fit(digits).probabilities_, fitted.probabilities_)


# -------------------------------------------------------------------------------------- mistakes

NOISE = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize(
    ("parameters", "X", "says"),
    [
        ({"n_clusters": 1}, NOISE, "n_clusters=1"),
        ({"n_clusters": 61}, NOISE, "the 60 images there are"),
        ({"recipe": "digit"}, NOISE, "did you mean digits"),
        ({"settings": ["train.epoch=3"]}, NOISE, "unknown field"),
        ({"settings": "train.epochs=3"}, NOISE, "a list of FIELD=VALUE"),
        ({"settings": ["data.skip_corrupt=true"]}, NOISE, "skip_corrupt"),
        ({"image_size": 1}, NOISE, "data.image_size=1"),
        ({"device": "gpu"}, NOISE, "device='gpu'"),
        ({}, NOISE.astype(np.float32), "float32 values from 0 to 255"),
        ({}, NOISE.astype(np.int64) - 1, "from -1 to"),
        ({}, NOISE / np.where(NOISE > 250, np.nan, 255), "NaN"),
        ({}, NOISE.reshape(60, 4, 2, 8), "has shape (60, 4, 2, 8)"),
        ({}, np.zeros((32, 32, 3)), "X[None]"),
        ({}, np.zeros((60, 30)), "image_shape"),
        ({"image_shape": (8, 9)}, np.zeros((60, 64)), "image_shape=(8, 9)"),
        ({}, np.zeros((60, 64)) - 0.5, "Negative values"),
        ({}, NOISE[:1], "1 sample"),
        ({}, np.zeros((64, 64), np.uint8), "image_shape=(8, 8) if each row is one"),
        ({}, np.zeros((60, 0, 8), np.uint8), "has shape (60, 0, 8)"),
        ({}, NOISE / 255 * 1.01, "values from 0 to 1.01"),
        ({}, NOISE / 255 - 0.01, "values from -0.01"),
        ({}, "/nowhere/at/all", "does not exist"),
        ({}, ["/nowhere/at/all.png"] * 60, "occurs 60 times"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(
    parameters: dict[str, Any], X: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snscc_ray.runs.run, "fit", None)
    with pytest.raises(ValueError, match=re.escape(says)):
        SNSCC(
            **{"n_clusters": 3, "recipe": "digits", "settings": DIGITS["settings"]} | parameters
        ).fit(X)


@pytest.mark.parametrize("shape", [(8, 8), (6, 8), (16, 16), (48, 16)])
def test_one_image_is_not_taken_for_many(fitted: SNSCC, shape: tuple[int, int]) -> None:
    for method in ("predict", "predict_proba", "transform"):
        with pytest.raises(ValueError, match=r"may be one image: give X\[None\]"):
            getattr(fitted, method)(np.zeros(shape, np.uint8))
        # A table of what it was fit on.
        assert len(getattr(fitted, method)(np.zeros((3, 64), np.uint8))) == 3


def test_one_colour_image_is_not_taken_for_three(fitted: SNSCC) -> None:
    colour = SNSCC(10, **DIGITS)
    colour.__dict__ |= {k: v for k, v in fitted.__dict__.items() if k.endswith("_")}
    for fit in ((200, 3, 8, 8), (200, 8, 8, 3), (200, 64), None):
        colour._fit_shape = fit
        with pytest.raises(ValueError, match=r"may be one image: give X\[None\]"):
            colour.predict(np.zeros((3, 8, 8), np.uint8))
    assert len(fitted.predict(np.zeros((3, 8, 8), np.uint8))) == 3  # as it was fit: grey ones


def test_floats_a_hair_outside_are_clipped(fitted: SNSCC, digits: np.ndarray) -> None:
    above = digits / 255
    above[0, 0, 0], above[1, 0, 0] = np.nextafter(1, 2), -1e-17
    assert np.array_equal(fitted.predict(above), fitted.predict(np.rint(above.clip(0, 1) * 255)
                                                                .astype(np.uint8)))  # fmt: skip
    table = above.reshape(len(above), -1).astype(np.float32)
    table[2, 0] = np.float32(1.0000001)
    assert len(fitted.predict(table)) == len(table)


def test_what_are_no_numbers_is_refused(fitted: SNSCC) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError):
            as_bytes(np.full((4, 8, 8), bad))
        with pytest.raises(ValueError):
            fitted.predict(np.full((4, 8, 8), bad))
    with pytest.raises(ValueError, match="complex128"):
        as_bytes(np.zeros((4, 8, 8), complex))


def test_a_tensor_of_bfloat16_is_read(fitted: SNSCC, digits: np.ndarray) -> None:
    assert len(fitted.predict(torch.from_numpy(digits).bfloat16() / 255)) == len(digits)


def test_what_is_left_aside_is_warned_of(fitted: SNSCC, digits: np.ndarray, tmp_path: Path) -> None:
    written(tmp_path / "files", digits[:30])
    (tmp_path / "files" / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"ignored.* \.txt \(1\)"):
        assert len(fitted.predict(str(tmp_path / "files"))) == 30


def test_it_has_to_be_fitted_first() -> None:
    for method in ("predict", "predict_proba", "transform"):
        with pytest.raises(NotFittedError):
            getattr(SNSCC(), method)(NOISE)


# ------------------------------------------------------------------------------ Ray, and the page


@pytest.fixture
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    # Ray's sockets lie below the folder, and their names may not be long.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory("r", "s") as short:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", short)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.mark.slow
def test_a_ray_dataset(ray: Any, fitted: SNSCC, digits: np.ndarray, tmp_path: Path) -> None:
    import ray.data

    files = written(tmp_path / "files", digits)
    rows = [{"image": f.read_bytes(), "id": f.name, "n": n} for n, f in enumerate(files)]
    encoded = ray.data.from_items(rows, override_num_blocks=5)
    arrays = ray.data.from_numpy(list(np.split(digits, 4))).rename_columns({"data": "image"})
    for dataset in (encoded, arrays):
        assert np.array_equal(fitted.predict_proba(dataset), fitted.probabilities_)
    as_on_disk = [
        [{"image": {"bytes": file.read_bytes(), "path": file.name}} for file in files],
        [{"image": str(file)} for file in files],
        [{"image": image[None], "id": None} for image in digits],
        [{"image": np.repeat(image[None], 3, 0)} for image in digits],
        [{"image": image / 255} for image in digits],
    ]
    for forms in as_on_disk:
        found = fitted.predict_proba(ray.data.from_items(forms, override_num_blocks=3))
        assert np.array_equal(found, fitted.probabilities_)
    with pytest.raises(ValueError, match=r"image '0' of the dataset: its shape is \(8, 8, 4\)"):
        fitted.predict(ray.data.from_items([{"image": np.zeros((8, 8, 4), np.uint8)}] * 2))
    with pytest.raises(ValueError, match="nothing"):
        fitted.predict(ray.data.from_items([]))
    again = SNSCC(10, **DIGITS).fit(encoded)
    assert np.array_equal(again.labels_, fitted.labels_)
    assert again.ids_.tolist() == [file.name for file in files]
    with pytest.raises(ValueError, match="no column `image`"):
        fitted.predict(encoded.drop_columns(["image"]))


def test_the_page_says_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "estimator.md").read_text()
    text = re.sub("^```.*$", "", page, flags=re.M)
    test = doctest.DocTestParser().get_doctest(text, {}, "estimator.md", None, 0)
    assert len(test.examples) > 8
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append).failed
    assert not failed, "".join(said)


def test_an_array_of_paths_is_a_list_of_paths(tmp_path: Path) -> None:
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(files[-1])
    for paths in (np.array(list(map(str, files))), np.array(files, dtype=object)):
        given = SNSCC()._given(paths, reset=True)
        assert given.rows is not None and given.rows.ids == list(map(str, files))
    with pytest.raises(ValueError, match="2D array"):
        SNSCC()._given(np.zeros(3), reset=True)
