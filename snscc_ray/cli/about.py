"""`snscc recipes` and `snscc doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from snscc_ray.cli.options import out
from snscc_ray.config import recipes


def list_recipes(
    name: Annotated[str | None, typer.Argument(help="print this one as JSON")] = None,
) -> None:
    """List the recipes, or print one as JSON.

    Examples:

        snscc recipes

        snscc recipes cifar10
    """
    if name is not None:
        print(recipes.get(name).model_dump_json(indent=2))
        return
    table = Table("recipe", "what", box=None)
    for key, build in recipes.RECIPES.items():
        table.add_row(key, (build.__doc__ or "").strip())
    out.print(table)


def doctor() -> None:
    """Show what this machine offers and what a run would use.

    Example:

        snscc doctor
    """
    from snscc_ray.cli.doctor import examine

    table = Table(box=None, show_header=False)
    for name, finding in examine():
        table.add_row(name, finding)
    out.print(table)
