"""`snscc report`: a finished run as one HTML page, with the same content as JSON beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import IO

from torch import Tensor

from snscc_ray.answers.features import RunImages, own_ids, own_images, stage_features
from snscc_ray.answers.names import read_naming
from snscc_ray.answers.predict import check_finished, load_model
from snscc_ray.answers.report import sprites
from snscc_ray.answers.report.content import GENERATOR, build, large_rows, shown_rows
from snscc_ray.answers.report.facts import Facts, read_facts
from snscc_ray.answers.report.moved import common_images
from snscc_ray.answers.report.page import render
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import StageName
from snscc_ray.core import storage
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.data.loading.resident import Images
from snscc_ray.data.vectors import pictures_of
from snscc_ray.runs.finished import second_choice
from snscc_ray.runs.folder import read_recipe
from snscc_ray.training.workers import choose_device

_MARK_BYTES = 1000  # GENERATOR stands within the first bytes of a report


def report(
    run: Path,
    out: Path,
    display: Display,
    *,
    device: str = "auto",
    against: Path | None = None,
    loaded: tuple[Catalog, Images] | None = None,
) -> Path:
    """Write the page, and its numbers as a .json file beside it; return the path of the latter.

    against: another run, whose clusters are compared with those of this one.
    loaded: the run's images, if they are at hand; None: they are read again.
    Raises UserError if a run is not finished, the runs have no image in common, the images are
    gone, or `out` is some other file.
    Nothing is written then, except features, which are cached for the next call.
    """
    data_file = out.with_suffix(".json")
    for path in (out, data_file):
        _check_ours(path)
    chosen = choose_device(device)
    check_finished(run)
    facts = read_facts(run)
    naming = read_naming(run, read_recipe(run).data.num_clusters)
    common = None
    if against is not None:
        common = common_images(against, own_ids(run), facts.clusters_N)
    mined = MinedNeighbors.load(run / "pretrain" / "neighbors.parquet")
    if loaded is None:
        own = own_images(run, chosen, display)
    else:
        own = RunImages(run, read_recipe(run), *loaded, chosen)
    if facts.second_N is None:
        facts = _with_second(facts, own, display)
    digests = sprites.row_digests(own.data, display.counting("compare", "images"))
    display.finish()

    # The last stage's features are used twice in a row; all stages' may not fit in memory.
    @lru_cache(maxsize=1)
    def features(stage: StageName) -> Tensor:
        return stage_features(own, stage)

    content = build(own, facts, features, mined, digests, naming, common, display.line)
    display.line("thumbnails")
    rows = shown_rows(content)
    if isinstance(own.data, FeatureBank):
        pictures = pictures_of(own.recipe.data, rows)
    else:
        pictures = sprites.take(own.data, rows, display.counting("thumbnails", "images"))
        display.finish()
    large = large_rows(content)
    page = render(content, None if pictures is None else sprites.pack(rows, pictures, large))
    storage.write_json(data_file, content)
    storage.write_whole(out, partial(_write, page.encode("utf-8", "backslashreplace")))
    return data_file


def _with_second(facts: Facts, own: RunImages, display: Display) -> Facts:
    """Predict the second-choice clusters of a run from before they were kept."""
    model = load_model(own.folder, own.device.type)
    if model.caveat:
        display.line(model.caveat)
    display.line(f"predicting {len(own.catalog):,} images")
    p_NC = model.probabilities(own.inputs)
    second_N, confidence_N = second_choice(p_NC, facts.clusters_N)
    return replace(facts, second_N=second_N, second_confidence_N=confidence_N.double())


def _check_ours(path: Path) -> None:
    """Raise UserError if the path exists and is not a report."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give --out a file, such as report.html")
    if path.exists():
        with path.open("rb") as file:
            ours = GENERATOR.encode() in file.read(_MARK_BYTES)
        if not ours:
            raise UserError(f"{path} exists and is not a report; give another --out")


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)
