"""Apply `FIELD=VALUE` overrides to a Recipe, and report invalid ones."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import Recipe


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return the recipe with `FIELD=VALUE` overrides, such as `train.num_neighbors=20`.

    A value is read as JSON if it is valid JSON, and as text otherwise. Raises UserError naming
    the field, the value and what is allowed.
    """
    values = recipe.model_dump()
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write FIELD=VALUE, as in train.num_neighbors=20")
        _assign(values, field.strip(), _parse(text.strip()))
    return validate(values)


def validate(values: dict[str, Any]) -> Recipe:
    """Build a Recipe from plain values. Raises UserError for the first invalid field."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic adds the tag of a tagged union to `loc`, but the user never wrote it.
        place = ".".join(str(part) for part in first["loc"] if part not in ("simclr", "strong"))
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], dict) else f"={json.dumps(first['input'])}"
        where = f"{place}{given}: " if place else ""
        raise UserError(f"{where}{message[0].lower()}{message[1:]}") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assign(values: dict[str, Any], field: str, value: Any) -> None:
    *parents, last = field.split(".")
    place: Any = values
    for parent in parents:
        if isinstance(place, dict) and place.get(parent, 0) is None:
            whole = field.rpartition(".")[0]
            raise UserError(f"{field}: {whole} is empty; set it whole, as JSON")
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        known = _fields(values)
        near = difflib.get_close_matches(field, known, 1)
        hint = f"did you mean {near[0]}?" if near else "`snscc recipes NAME` lists the fields"
        raise UserError(f"unknown field {field!r}: {hint}")
    place[last] = value


def _fields(values: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in values.items():
        names.append(prefix + name)
        if isinstance(value, dict):
            names += _fields(value, f"{prefix}{name}.")
    return names
