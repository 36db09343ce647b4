"""The table of a comparison, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from snscc_ray.compare.methods import title_of
from snscc_ray.compare.paper import DATA_SETS, SOURCE, Printed, printed
from snscc_ray.config.settings import Recipe
from snscc_ray.core.clustering import metrics
from snscc_ray.core.storage import write_whole
from snscc_ray.texts import in_markdown

ORACLE = {"oracle/acc": "ACC", "oracle/nmi": "NMI", "oracle/ari": "ARI"}
HEALTH = {
    "health/score": "score",
    "health/neighbor_agreement": "agreement",
    "health/balance": "balance",
}
_USED = "health/clusters_in_use"


@dataclass(frozen=True)
class Row:
    """One method; without figures if it failed."""

    method: str
    figures: dict[str, float] = field(default_factory=dict)
    epochs: str = ""
    seconds: float | None = None
    note: str = ""
    frozen: bool = False  # on the features of a frozen encoder

    @property
    def title(self) -> str:
        return title_of(self.method, frozen=self.frozen)


def figures_of(
    clusters_N: Tensor, labels_N: Tensor | None, neighbors_NK: Tensor | None, clusters: int
) -> dict[str, float]:
    """Return the oracle figures if there are labels, else the label-free ones.

    Without mined neighbours (before Pretrain has run), agreement and score are left out.
    """
    alone = neighbors_NK is None
    nearest_NK = clusters_N.new_empty(len(clusters_N), 0) if neighbors_NK is None else neighbors_NK
    health = metrics.health(clusters_N, nearest_NK, clusters)
    if labels_N is not None:
        return metrics.oracle(labels_N, clusters_N) | {_USED: health[_USED]}
    return {
        name: value
        for name, value in health.items()
        if not alone or name in ("health/balance", _USED)
    }


def columns(rows: list[Row]) -> dict[str, str]:
    """Return names and headings of the measured figures, which are of one kind in all rows."""
    labelled = any("oracle/acc" in row.figures for row in rows)
    return ORACLE if labelled else HEALTH


def cells(row: Row, shown: dict[str, str]) -> list[str]:
    """Return title, measured figures, clusters used, epochs and seconds; a dash if missing."""
    figures = [f"{row.figures[name]:.3f}" if name in row.figures else "-" for name in shown]
    used = f"{int(row.figures[_USED])}" if _USED in row.figures else "-"
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    return [row.title, *figures, used, row.epochs or "-", seconds]


def line(row: Row) -> str:
    """Return the line to print when a method has ended."""
    if row.seconds is None:
        return row.note
    shown = {**ORACLE, **HEALTH}
    figures = [f"{shown[name]} {value:.3f}" for name, value in row.figures.items() if name in shown]
    return f"{' '.join(figures)}, {row.seconds:.1f} s"


def write_table(folder: Path, recipe: Recipe, rows: list[Row], images: int) -> None:
    """Write compare.csv and compare.md, each atomically."""
    for name, text in (
        ("compare.csv", as_csv(recipe, rows)),
        ("compare.md", as_markdown(recipe, rows, images)),
    ):
        content = text.encode()
        write_whole(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]


def as_csv(recipe: Recipe, rows: list[Row]) -> str:
    """Format as CSV: a line per method, an empty cell for a missing value."""
    shown = columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    beside = [f"paper_{heading.lower()}" for heading in ORACLE.values()]
    headings = [heading.lower() for heading in shown.values()]
    writer.writerow(["method", *headings, "clusters", "epochs", "seconds", "note", *beside])
    for row in rows:
        figures = [row.figures.get(name, "") for name in (*shown, _USED)]
        theirs = _printed(row, recipe)
        seconds = "" if row.seconds is None else row.seconds
        rest = ["" if value is None else value for value in theirs]
        writer.writerow([row.method, *figures, row.epochs, seconds, row.note, *rest])
    return text.getvalue()


def as_markdown(recipe: Recipe, rows: list[Row], images: int) -> str:
    """Format as Markdown, with notes for judging the figures."""
    shown = columns(rows)
    frozen = recipe.encoder.frozen
    beside = recipe.name.startswith(DATA_SETS) and not frozen
    headings = ["method", *shown.values(), "clusters", "epochs", "seconds"]
    headings += ["paper ACC", "NMI", "ARI"] * beside + ["note"]
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        theirs = _printed(row, recipe)
        paper = ["-" if value is None else f"{value:.3f}" for value in theirs] * beside
        lines.append([*cells(row, shown), *paper, in_markdown(row.note)])
    text = [
        f"# {recipe.name}: {images:,} images, {recipe.data.num_clusters} clusters, "
        f"seed {recipe.seed}",
        "",
        *("| " + " | ".join(parts) + " |" for parts in lines),
        "",
        *(_about_frozen(recipe) if frozen else _about_trained(recipe)),
    ]
    if beside:
        text += ["", f"Paper: {SOURCE}; with other encoders and settings, on the whole dataset."]
    return "\n".join(text) + "\n"


_SHARED = (
    "`seconds` includes parts shared with other methods. `clusters` counts those with at least a "
    "tenth of an equal share."
)


def _about_trained(recipe: Recipe) -> list[str]:
    train = recipe.train
    ours = recipe.pretrain.epochs + train.epochs + recipe.boost.epochs
    return [
        f"All deep methods use the encoder {recipe.encoder.name}. Networks train with the recipe's "
        f"Train settings (batch size {train.batch_size}, epochs {train.epochs}, {train.optimizer} "
        f"at {train.learning_rate:g}); Pretrain, Boost and SCAN's self-labelling (as Boost) have "
        "their own. `epochs` lists the networks in the order of their training. " + _SHARED,
        "",
        f"A method from scratch trains for {train.epochs} epochs, SNSCC for {ours} in all. To give "
        f"them as many, use `--set train.epochs={ours} --methods iic,pica,cc` with another folder.",
    ]


def _about_frozen(recipe: Recipe) -> list[str]:
    train, encoders = recipe.train, recipe.encoder.each()
    names = " + ".join(part.name for part in encoders)
    components = recipe.encoder.components
    kept = f"at most {components} principal components" if components else "all components"
    several = "; TURTLE gets those of each encoder apart" if len(encoders) > 1 else ""
    return [
        f"All methods work on the same features, computed once by the frozen encoder {names}: "
        f"centred, {kept}, of length 1, whitened within neighbours and views{several}. SNSCC and "
        f"SCAN train with the recipe's Train settings (batch size {train.batch_size}, epochs "
        f"{train.epochs}, {train.optimizer} at {train.learning_rate:g}) and then its Boost "
        "settings; they also use the features of augmented images. TEMI and TURTLE train with "
        "settings of their own. " + _SHARED,
    ]


def _printed(row: Row, recipe: Recipe) -> Printed:
    """Return the paper's figures; it has none for features of a trained encoder."""
    found = None if row.frozen else printed(row.method, recipe.name)
    return found or (None, None, None)
