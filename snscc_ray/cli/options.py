"""What commands have in common: options, and what they do with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

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


def place_of(data: str) -> str:
    """A path or URL as it was given, with ~ for the home folder."""
    return data if "://" in data else str(Path(data).expanduser())


def fail(message: str, status: int) -> NoReturn:
    print("snscc: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
