"""Search spaces for `snscc sweep`, as short functions to read and to copy."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import Recipe
from tune_spaces.ablations import ablation_boost, ablation_train, pretext, train_longer
from tune_spaces.sensitivity import epsilon, gamma, grid, neighbors, sigma
from tune_spaces.space import Space

SPACES: dict[str, Callable[[Recipe], Space]] = {
    build.__name__.replace("_", "-"): build
    for build in (
        epsilon, gamma, sigma, neighbors, grid,
        ablation_train, ablation_boost, train_longer, pretext,
    )
}  # fmt: skip


def load(name: str) -> Callable[[Recipe], Space]:
    """Return the function that builds the space `name`, or the function in `FILE.py:function`.

    Raises UserError for an unknown name, with the nearest one, and for a missing file or function.
    Calling the result raises UserError if it does not return a Space.
    """
    if name in SPACES:
        return SPACES[name]
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        return _from_file(Path(file).expanduser(), function)
    if name.endswith(".py"):
        raise UserError(f"{name}: say which function of it makes the space, as in {name}:mine")
    near = difflib.get_close_matches(name, SPACES, 1)
    hint = f"did you mean {near[0]}?" if near else "there are " + ", ".join(SPACES)
    raise UserError(f"unknown space {name!r}: {hint}; your own is FILE.py:function")


def _from_file(file: Path, name: str) -> Callable[[Recipe], Space]:
    found = getattr(_module(file), name, None)
    if not callable(found):
        raise UserError(f"{file} has no function {name!r}; correct the name after the colon")

    def build(recipe: Recipe) -> Space:
        space = found(recipe)
        if not isinstance(space, Space):
            raise UserError(
                f"{file}:{name} returns {type(space).__name__}; it must return a "
                "tune_spaces.space.Space"
            )
        return space

    return build


def _module(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"there is no file {file}; a space of your own is FILE.py:function")
    name = f"tune_spaces_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look up their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return module
