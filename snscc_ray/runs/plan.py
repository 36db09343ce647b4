"""List the images of a recipe and check both, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import NO_ENCODER, STAGES, Recipe, StageName
from snscc_ray.core.display import Display
from snscc_ray.data.loading.order import smallest_batch
from snscc_ray.data.look import resolve_reading
from snscc_ray.data.rows import Rows
from snscc_ray.data.sources import list_rows
from snscc_ray.models.pretrained import check_encoder
from snscc_ray.texts import counted


@dataclass(frozen=True)
class Plan:
    """A recipe whose images are listed and can be trained on, as `check_plan` says."""

    recipe: Recipe
    rows: Rows
    workers: Sequence[int]
    stages: Sequence[StageName]

    def check(self, rows: int) -> None:
        """Raise UserError naming the field if so many of the images are too few."""
        for count in self.workers:
            check(self.recipe, rows, count, self.stages)


def make_plan(
    recipe: Recipe,
    workers: Sequence[int] = (1,),
    stages: Sequence[StageName] = STAGES,
    display: Display | None = None,
) -> Plan:
    """List the images of a recipe, look at some, and check both (see `check_plan`)."""
    display = display or Display(Console(quiet=True))
    rows = list_rows(recipe.data, display.finding("listing", "images"))
    data, rows = resolve_reading(recipe.data, rows, tell=display.counting("looking", "images"))
    return check_plan(recipe.model_copy(update={"data": data}), rows, workers, stages)


def check_plan(
    recipe: Recipe,
    rows: Rows,
    workers: Sequence[int] = (1,),
    stages: Sequence[StageName] = STAGES,
) -> Plan:
    """Check a recipe for the images that were listed for it.

    workers: every number of workers that may train. stages: those that are trained.
    Raises UserError naming the field.
    """
    check_kind(recipe, rows)
    plan = Plan(recipe, rows, workers, stages)
    plan.check(len(rows.ids))
    if stages:
        check_encoder(recipe, max(workers))
    return plan


def check_kind(recipe: Recipe, rows: Rows) -> None:
    """Refuse embeddings for an encoder, and images without one. Raises UserError."""
    without = recipe.encoder.name == NO_ENCODER
    if rows.vectors is not None and not without:
        raise UserError(
            f"{rows.place} holds embeddings, which need no encoder; use `snscc fit`, or for "
            "`snscc run` set encoder.name=none and encoder.frozen=true"
        )
    if rows.vectors is None and without:
        raise UserError(
            f"encoder.name=none is for embeddings, and {rows.place} holds images; name an encoder"
        )


def check(recipe: Recipe, rows: int, world_size: int, stages: Sequence[StageName] = STAGES) -> None:
    """Refuse a recipe that cannot train on so many rows. Raises UserError naming the field."""
    clusters = recipe.data.num_clusters
    if rows < clusters:
        raise UserError(
            f"data.num_clusters={clusters} is more than the {counted(rows, 'image')} there are; "
            "give more images, or use fewer clusters"
        )
    trained = [stage for stage in stages if not (stage == "pretrain" and recipe.encoder.frozen)]
    batches = {f"{stage}.batch_size": getattr(recipe, stage).batch_size for stage in trained}
    large = [field for field, batch in batches.items() if batch > rows]
    if large:
        smaller = max(2, rows // 4)
        mend = " ".join(f"--set {field}={smaller}" for field in large)
        raise UserError(
            f"{large[0]}={batches[large[0]]} is more than the {rows} images there are; use {mend}"
        )
    for field, batch in batches.items():
        if batch % world_size:
            raise UserError(
                f"{field}={batch} is global and cannot be split evenly among {world_size} workers; "
                f"use --set {field}={batch - batch % world_size or world_size}"
            )
        # The batches of an epoch have nearly equal sizes, which may be below the batch size.
        least = smallest_batch(rows, batch)
        if least < 2 * world_size:
            raise UserError(
                f"{field}={batch} splits {rows} images into batches of only {least} for "
                f"{counted(world_size, 'worker')}; use --set {field}={4 * world_size} or more"
            )
    neighbors: dict[StageName, tuple[str, int]] = {
        "pretrain": ("pretrain.mined_neighbors", recipe.pretrain.mined_neighbors),
        "train": ("train.num_neighbors", recipe.train.num_neighbors),
        "boost": ("boost.num_neighbors", recipe.boost.num_neighbors),
    }
    for stage in stages:
        field, count = neighbors[stage]
        if count >= rows:
            raise UserError(
                f"{field}={count} must be less than the {rows} images there are; lower it"
            )
