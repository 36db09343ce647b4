"""The whole method as a scikit-learn estimator. `fit` runs Pretrain → Train → Boost."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    check_array,
    check_is_fitted,
    check_non_negative,
    validate_data,
)
from torch import Tensor

from snscc_ray.answers.features import RunImages
from snscc_ray.answers.predict import Model, check_inputs, load_model
from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override, validate
from snscc_ray.config.paths import as_path
from snscc_ray.config.settings import DataSettings, Recipe
from snscc_ray.core.claim import claimed
from snscc_ray.core.display import Display
from snscc_ray.data.given import (
    HAIR,
    as_bytes,
    is_ray_dataset,
    rows_of_array,
    rows_of_dataset,
    rows_of_paths,
)
from snscc_ray.data.look import inspect_images, resolve_reading
from snscc_ray.data.rows import Rows
from snscc_ray.data.sources import list_rows
from snscc_ray.data.vectors import rows_of_vectors
from snscc_ray.fit.choose import Preferences, choose
from snscc_ray.fit.embeddings import choose_for_embeddings
from snscc_ray.fit.overrides import data_settings, with_overrides
from snscc_ray.runs.folder import first_difference, holds_something, read_recipe
from snscc_ray.runs.local import bring, device_bytes, load
from snscc_ray.runs.monitor import Journal, RunMonitor
from snscc_ray.runs.plan import Plan, check_plan
from snscc_ray.runs.run import execute
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.workers import LocalWorker, choose_device


@dataclass(frozen=True)
class _Images:
    """The images of X, as rows or as a path."""

    rows: Rows | None  # None: the images are at the path
    path: str | None


class SNSCC(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Cluster unlabelled images by Soft Neighbors Supported Contrastive Clustering.

    In all methods X is one of:

    - an array or torch tensor of images, (N, H, W), (N, H, W, C) or (N, C, H, W), or a table with
      one image per row; integers from 0 to 255 or floats from 0 to 1
    - a list of paths or URLs of images
    - the path or URL of a folder of images or of Parquet shards
    - a Ray Dataset with a column `image`
    - embeddings in place of images: the path of a Parquet, .npy or .npz file, or, with
      `embeddings=True`, an array, tensor or table (N, D) of any numbers

    Parameters
    ----------
    n_clusters : int, default 8
        The number of clusters.
    recipe : str, default "auto"
        A name from `snscc recipes`. "auto" chooses the settings from the images and the machine, as
        `snscc fit` does.
    settings : sequence of str
        Changes to the recipe, each `FIELD=VALUE`, as with `--set`.
    image_size : int, optional
        Side in pixels to which images are resized. None: the recipe's.
    image_shape : tuple of int, optional
        Shape of the rows of a table: (H, W), (H, W, C) or (C, H, W). None: square and grey.
    embeddings : bool, default False
        Whether an X that is an array, tensor or table holds embeddings, one per row. By default
        its rows are pixels: an array does not say which of the two it holds. A path needs no such
        word, because the file says it.
    random_state : int, RandomState or None
        The seed. None: the recipe's seed, so that a fit can be repeated.
    device : {"auto", "cpu", "cuda"}
        Where to train and predict.
    folder : str or Path, optional
        The run folder. None: the run is not kept. `fit` continues an interrupted run in this
        folder, and reuses a finished one.
    verbose : int, default 0
        1 prints what `snscc run` prints.

    Attributes
    ----------
    labels_ : ndarray of int, (N,)
        The cluster of each image.
    probabilities_ : ndarray of float32, (N, n_clusters)
        The probability of each cluster for each image.
    ids_ : ndarray of str, (N,)
        The id of each image: its number or its file.
    n_features_in_ : int
        The length of a row, if X was a table.
    """

    _fit_shape: tuple[int, ...] | None = None  # shape of X in `fit`; None: X was not an array

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        recipe: str = "auto",
        settings: Sequence[str] = (),
        image_size: int | None = None,
        image_shape: tuple[int, ...] | None = None,
        embeddings: bool = False,
        random_state: Any = None,
        device: str = "auto",
        folder: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.recipe = recipe
        self.settings = settings
        self.image_size = image_size
        self.image_shape = image_shape
        self.embeddings = embeddings
        self.random_state = random_state
        self.device = device
        self.folder = folder
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> SNSCC:
        """Train on images. y is ignored.

        Raises ValueError for wrong parameters or images, before training starts, and TrainingError
        for a run that cannot continue.
        """
        with _value_errors():
            self._check_parameters()
            given = self._given(X, reset=True)
            device, display = choose_device(self.device), self._display()
            plan = self._plan(given, device)
            if self.folder is not None:
                folder = as_path(self.folder)
                with claimed(folder, display.line):
                    _check_folder(folder, plan.recipe)
                    self._fit(plan, folder, device, display)
            else:
                with tempfile.TemporaryDirectory(prefix="snscc") as temporary:
                    self._fit(plan, Path(temporary), device, display)
        return self

    def _fit(self, plan: Plan, folder: Path, device: torch.device, display: Display) -> None:
        catalog, data = load(plan, device, display)
        _warn(catalog.notes[len(plan.rows.notes) :])
        monitor = RunMonitor(Journal(folder), display)
        try:
            execute(plan.recipe, catalog, data, folder, LocalWorker(folder, device), monitor)
        except Interrupted as stop:
            raise KeyboardInterrupt from stop
        finally:
            monitor.finish()
        model = load_model(folder, device.type)
        inputs = RunImages(folder, plan.recipe, catalog, data, device).inputs
        z_ND, p_NC = model.infer(inputs)
        # On the CPU: the estimator may be copied to a machine without a GPU.
        self.model_ = model.on(torch.device("cpu"))
        self.probabilities_ = p_NC.cpu().numpy()
        self.labels_ = self.probabilities_.argmax(axis=1)
        self.ids_ = np.array(list(catalog.ids))
        self._n_features_out = z_ND.shape[1]

    def predict(self, X: Any) -> np.ndarray:
        """Return the cluster of each image, int (N,)."""
        return np.asarray(self.predict_proba(X).argmax(axis=1))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each cluster for each image, float32 (N, n_clusters)."""
        return self._look(X)[1].cpu().numpy()

    def transform(self, X: Any) -> np.ndarray:
        """Return the features of the images, float32 (N, D), of Euclidean length 1."""
        return self._look(X)[0].cpu().numpy()

    def _look(self, X: Any) -> tuple[Tensor, Tensor]:
        check_is_fitted(self)
        with _value_errors():
            model: Model = self.model_
            given = self._given(X, reset=False)
            data = _data_settings(model.recipe.data, given)
            data, rows = resolve_reading(data, given.rows or list_rows(data))
            check_inputs(model, rows)
            _warn(rows.notes)
            device, display = choose_device(self.device), self._display()
            _, images = bring(data, rows, device, display)
            try:
                return model.on(device).infer(images)
            finally:
                model.on(torch.device("cpu"))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = not self.embeddings
        tags.input_tags.positive_only = not self.embeddings
        tags.transformer_tags.preserves_dtype = []  # features are float32
        return tags

    def _display(self) -> Display:
        return Display(Console(quiet=not self.verbose, emoji=False))

    def _check_parameters(self) -> None:
        if not isinstance(self.n_clusters, Integral) or self.n_clusters < 2:
            raise ValueError(f"n_clusters={self.n_clusters!r}: give an integer of 2 or more")
        if isinstance(self.settings, str):
            raise ValueError(f"settings={self.settings!r}: give a list of FIELD=VALUE")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: use auto, cpu or cuda")

    def _plan(self, given: _Images, device: torch.device) -> Plan:
        """Return what to train, from all parameters. Warns of what is left out or assumed.

        Raises UserError or ValueError.
        """
        rows, seen = given.rows, None
        if self.recipe == "auto":
            where = {"source": "auto", "path": given.path}
            rows = rows or list_rows(data_settings(where, self.settings))
            seen = inspect_images(rows)
            choosing = choose if rows.vectors is None else choose_for_embeddings
            wishes = Preferences(int(self.n_clusters), self.image_size)
            wishes = with_overrides(wishes, self.settings)
            gpu, free = device.type == "cuda", device_bytes(device)
            recipe, _ = choosing("auto", where, seen, gpu=gpu, free_bytes=free, wishes=wishes)
        else:
            recipe = recipes.get(self.recipe)
        recipe = self._adapted(recipe, given)
        data, rows = resolve_reading(recipe.data, rows or list_rows(recipe.data), seen)
        plan = check_plan(recipe.model_copy(update={"data": data}), rows)
        _warn(plan.rows.notes)
        return plan

    def _adapted(self, recipe: Recipe, given: _Images) -> Recipe:
        """Return the recipe with the changes from the parameters."""
        recipe = override(recipe, self.settings)
        data: dict[str, Any] = {"num_clusters": int(self.n_clusters)}
        if self.image_size is not None:
            data["image_size"] = self.image_size
        if recipe.data.skip_corrupt:
            raise ValueError("data.skip_corrupt would leave rows of X without a label; remove them")
        values = recipe.model_dump()
        values["data"] = _data_settings(recipe.data, given).model_dump() | data
        values["runtime"] |= {"device": self.device}
        if self.random_state is not None:
            values["seed"] = _seed(self.random_state)
        return validate(values)

    def _given(self, X: Any, *, reset: bool) -> _Images:
        if reset:
            self._fit_shape = None
        if self.embeddings and not isinstance(X, str | Path):
            return _Images(self._vectors(X, reset=reset), None)
        if isinstance(X, str | Path):
            return _Images(None, str(X))
        if is_ray_dataset(X):
            return _Images(rows_of_dataset(X), None)
        if getattr(X, "ndim", None) == 1 and hasattr(X, "tolist"):  # an array or a column of paths
            listed = X.tolist()
            X = listed if all(isinstance(path, str | Path) for path in listed) else X
        if isinstance(X, list | tuple) and X and all(isinstance(path, str | Path) for path in X):
            return _Images(rows_of_paths(X), None)
        if isinstance(X, Tensor):
            X = _numpy(X)
        fewest = 2 if reset else 1
        shape = tuple(X.shape) if hasattr(X, "shape") else np.asarray(X).shape
        axes = len(shape)
        if axes != 1:  # scikit-learn reports what is wrong with one axis
            self._check_form(shape, reset)
        if axes <= 2:
            table = validate_data(self, X, reset=reset, ensure_min_samples=fewest)
            images = self._images(table)
        else:
            images = as_bytes(check_array(X, allow_nd=True, ensure_min_samples=fewest))
        return _Images(rows_of_array(images), None)

    def _vectors(self, X: Any, *, reset: bool) -> Rows:
        if isinstance(X, Tensor):
            X = _numpy(X)
        if self.image_shape is not None:
            raise ValueError("image_shape is for images, and these are embeddings; leave it out")
        table = validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32, np.float16],
            ensure_min_samples=2 if reset else 1,
            ensure_min_features=2 if reset else 1,
        )
        return rows_of_vectors(table, "X")

    def _check_form(self, shape: tuple[int, ...], reset: bool) -> None:
        """Refuse X that may be a single image, whose rows would be taken for images."""
        if reset:
            self._fit_shape = shape
        fit = self._fit_shape
        one = f"X has shape {shape}, which may be one image: give X[None], or "
        if len(shape) == 2 and self.image_shape is None:
            side = round(shape[1] ** 0.5)
            if (reset or fit is None) and shape[0] == shape[1]:
                raise ValueError(f"{one}image_shape=({side}, {side}) if each row is one")
            if fit is not None and len(fit) > 2 and shape[1] != np.prod(fit[1:]):
                raise ValueError(f"{one}rows of {np.prod(fit[1:])} numbers, as the fit was on")
        colour = fit is not None and len(fit) == 4
        grey = fit is not None and len(fit) == 3
        if len(shape) == 3 and (colour or (shape[0] == 3 and not grey)):
            raise ValueError(f"{one}(N, H, W, 1) for grey images")

    def _images(self, table: np.ndarray) -> np.ndarray:
        """Reshape the rows of a table to images. Raises ValueError if the shape is unknown."""
        length = table.shape[1]
        side = round(length**0.5)
        shape = (side, side) if self.image_shape is None else tuple(self.image_shape)
        if np.prod(shape) != length:
            raise ValueError(
                f"X has rows of {length} numbers, and image_shape={self.image_shape}: give the "
                "image_shape of the rows, as (H, W), (H, W, C) or (C, H, W)"
            )
        if table.size and table.min() < -HAIR:
            check_non_negative(table, type(self).__name__)
        return as_bytes(table).reshape(len(table), *shape)


def _data_settings(data: DataSettings, given: _Images) -> DataSettings:
    """Return the data settings for other images of the same kind."""
    place = {"source": "auto", "path": given.path, "classes": (), "download": False}
    return data.model_copy(update=place)


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=5)


def _seed(random_state: Any) -> int:
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError if the folder holds anything but this run."""
    if not holds_something(folder):
        return
    if not (folder / "recipe.json").exists():
        raise ValueError(f"folder={str(folder)!r} holds other files, but no run; give another")
    there = read_recipe(folder).model_dump(mode="json")
    if difference := first_difference(there, recipe.model_dump(mode="json")):
        raise ValueError(
            f"folder={str(folder)!r} holds a run with another recipe ({difference}); give another"
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; NumPy has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


# Terms of the command line, and what stands for them here.
_HERE = (
    (r"repair or remove it, or leave out such images with --set data\.skip_corrupt=true",
     "repair or remove it"),
    (r",? ?(or )?use another --out(, or --overwrite)?( to replace it)?( to write beside them)?",
     ", or give another folder"),
    (r"; use --overwrite", "; give another folder"),
    (r"repeat the command that (wrote it|made it|made the run), with --overwrite",
     "give another folder"),
    (r"repeat the command that made the run \(`snscc run` with --resume\)", "fit again"),
    (r"run the same command again \(`snscc run` with --resume\)", "fit again"),
    (r"device cuda: (.*); use cpu \(.*\)", r"device='cuda': \1; use device='cpu'"),
    (r"with --data PATH", "as X"),
    (r"give --data PATH", "give it as X"),
    (r"--image-size is", "image_size is"),
    (r"--encoder is", "encoder is"),
    (r"--clusters (\d+)", r"n_clusters=\1"),
    (r"--column NAME \(data\.column of a recipe\)", "settings=['data.column=NAME']"),
    (r"--set ([\w.]+=[^\s,;]+)", r"settings=['\1']"),
)  # fmt: skip


@contextmanager
def _value_errors() -> Iterator[None]:
    """Turn a UserError into a ValueError, as in scikit-learn."""
    try:
        yield
    except UserError as error:
        raise ValueError(_in_python(str(error))) from error


def _in_python(text: str) -> str:
    """Translate a message for the command line into terms of the estimator."""
    for pattern, here in _HERE:
        text = re.sub(pattern, here, text)
    return text
