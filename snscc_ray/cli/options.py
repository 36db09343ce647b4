"""Options shared by several commands, and their handling."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from snscc_ray import texts
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import expanded

out = Console(markup=False, emoji=False)
SCALE = "Scale out"  # a panel of the help text

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
    """Parse 90s, 25m or 2h into seconds. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--budget {budget}: give a number and a unit, as in 90s, 25m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def place_of(data: str) -> str:
    """Return a URL unchanged and a path absolute: later commands may run in other folders."""
    return data if "://" in data else str(expanded(data).absolute())


def launcher() -> Any:
    """Import the module of runs on Ray. Raises UserError if Ray is not installed."""
    ready_for_ray()
    try:
        from snscc_ray.cluster import run as launch
    except ImportError as error:
        raise UserError(
            f"--workers needs Ray ({error}); pip install 'ray[data,train,tune]', or leave "
            "--workers out"
        ) from error
    return launch


def ready_for_ray() -> None:
    """Set the home folder and user name that Ray needs, if a container's user has none."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.mkdtemp(prefix="snscc")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def refuse_alone(**given: object) -> None:
    """Raise UserError for options that have no effect without Ray workers."""
    for name, value in given.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} needs Ray workers; add --workers N")


def say(text: str) -> None:
    """Print one line, unformatted."""
    texts.say(out, text)


def fail(message: str, status: int) -> NoReturn:
    print("snscc: " + texts.shown(" ".join(message.split())), file=sys.stderr)
    sys.exit(status)
