"""What commands have in common: options, and what they do with them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from snscc_ray.errors import UserError

out = Console()
SCALE = "Scale out"  # a panel of the help

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="override any field of the recipe"),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="the Ray cluster to join: auto, or HOST:PORT  [default: RAY_ADDRESS, or Ray is "
        "started here]",
        rich_help_panel=SCALE,
    ),
]


def overrides_of(settings: list[str] | None, seed: int | None, data: str | None) -> list[str]:
    found = list(settings or [])
    if seed is not None:
        found.append(f"seed={seed}")
    if data is not None:
        found.append(f"data.path={json.dumps(place_of(data))}")
    return found


def seconds_of(budget: str) -> float:
    """90s, 25m or 2h. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--budget {budget}: give a number and a unit, as in 90s, 25m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def place_of(data: str) -> str:
    """A URL as it was given, a path in full: a run is looked at from other folders later."""
    return data if "://" in data else str(Path(data).expanduser().absolute())


def fail(message: str, status: int) -> NoReturn:
    print("snscc: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
