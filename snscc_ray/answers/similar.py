"""The images of a finished run that are most like some others, with a page of pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from torch import Tensor

from snscc_ray.answers.features import own_rows
from snscc_ray.answers.names import read_naming
from snscc_ray.answers.nearest import KnownImages, known_images
from snscc_ray.answers.predict import Model, check_finished, check_inputs, load_model
from snscc_ray.answers.report import sprites
from snscc_ray.answers.words import fits
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path
from snscc_ray.config.settings import NO_ENCODER, DataSettings
from snscc_ray.core.display import Display
from snscc_ray.core.storage import write_whole
from snscc_ray.core.tables import read_table
from snscc_ray.data.decode import Reading, Source, UnreadableImage, decode_into
from snscc_ray.data.given import rows_of_paths
from snscc_ray.data.loading.bank import bank_of
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.look import resolve_reading
from snscc_ray.data.names import Names
from snscc_ray.data.vectors import pictures_of, read_queries
from snscc_ray.runs.finished import ASSIGNMENTS
from snscc_ray.runs.folder import reading
from snscc_ray.texts import shown

_QUERIES = 50  # at most: a table for each is printed
# An image whose feature is farther than this from the one that the run kept has changed since.
# Half precision, or another device's, changes the cosine by much less.
_SAME = 0.99


@dataclass(frozen=True)
class SimilarRequest:
    """Which images to find in which run."""

    run: Path
    queries: tuple[str, ...]  # files, or ids of the run's own images
    count: int = 20  # images to list for each
    page: Path | None = None  # HTML file to write
    texts: tuple[str, ...] = ()  # words that the run's encoder knows


@dataclass(frozen=True)
class Similar:
    """An image of the run."""

    row: int
    id: str
    cluster: str  # its name, or its number
    similarity: float  # cosine of the features


@dataclass(frozen=True)
class Answer:
    """A query, its cluster or words, and the images most like it, the most similar first."""

    query: str
    cluster: str  # of a text: the encoder's words that it stands for
    row: int | None  # of a query that is one of the run's own images; it is not listed itself
    found: list[Similar]


@dataclass(frozen=True)
class _Query:
    name: str
    z_D: Tensor
    cluster: int
    row: int | None
    picture_CSS: Tensor | None  # of a file


def similar(request: SimilarRequest, console: Console, device: str = "auto") -> list[Answer]:
    """Find the images of a finished run that are most like each query, and write the page.

    A query is a file, or else the id of one of the run's own images. Texts come after them. Raises
    UserError; no page is written then. Pictures that cannot be shown are reported, on the page too.
    """
    display = Display(console)
    with reading(request.run):
        model = load_model(request.run, device)
        if model.caveat:
            display.line(model.caveat)
        table = read_table(request.run / ASSIGNMENTS, ["id", "cluster"])
        ids, clusters = Names(table["id"]), table["cluster"].to_numpy()
        naming = read_naming(request.run, model.recipe.data.num_clusters)
        given = [(text, _file(text), _row(ids, text)) for text in request.queries]
        _check(given, model)
        told = fits(request.run, model.recipe, request.texts, display) if request.texts else []
        # An image is most like itself: one more is found, and it is left out.
        stage, count, asked = check_finished(request.run), request.count + 1, len(given)
        known = known_images(request.run, stage, count, asked, model.device, display)
        queries = _queries(given, model, known, clusters, display)

        def listed(rows: list[int], cosines: list[float], own: int | None) -> list[Similar]:
            others = [pair for pair in zip(rows, cosines, strict=True) if pair[0] != own]
            return [
                Similar(row, ids[row], naming.label(int(clusters[row])), cosine)
                for row, cosine in others[: request.count]
            ]

        answers = []
        if queries:  # all at once: a search prepares all images of the run
            d_BK, rows_BK = known.nearest(torch.stack([query.z_D for query in queries]))
            cosine_BK = 1 - d_BK.square() / 2  # of unit vectors
        for number, query in enumerate(queries):
            found = listed(rows_BK[number].tolist(), cosine_BK[number].tolist(), query.row)
            answers.append(Answer(query.name, naming.label(query.cluster), query.row, found))
        for text, fit in zip(request.texts, told, strict=True):
            best = fit.cosine_N.topk(min(request.count, len(ids)))
            found = listed(best.indices.tolist(), best.values.tolist(), None)
            answers.append(Answer(text, ", ".join(fit.words), None, found))
        if request.page is not None:
            pictures, notes = _pictures(request.run, model, known, queries, answers, ids, display)
            for note in notes:
                display.line(note)
            page = _page(request.run, model, answers, pictures, notes)
            write_whole(request.page, partial(_write, page.encode("utf-8", "backslashreplace")))
    return answers


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


# ---------------------------------------------------------------------------------- the queries


def _file(text: str) -> Path | None:
    """Return the file of this name. Raises UserError for a folder."""
    path = as_path(text)
    try:
        if path.is_dir():
            raise UserError(
                f"{text} is a folder: give image files, or use `snscc predict RUN FOLDER`, which "
                "lists the nearest images for each image of a folder"
            )
        return path if path.exists() else None
    except (OSError, ValueError):  # no possible name of a file, but perhaps an id
        return None


def _row(ids: Names, text: str) -> int | None:
    row = pc.index(ids.array, pa.scalar(text, ids.array.type)).as_py()
    return None if row < 0 else int(row)


def _check(given: Sequence[tuple[str, Path | None, int | None]], model: Model) -> None:
    """Refuse a query that is neither a file nor an id, and one of another kind than the run's."""
    vectors = model.recipe.encoder.name == NO_ENCODER
    wanted = "a .npy file with embeddings" if vectors else "an image file"
    for text, file, row in given:
        if file is None and row is None:
            raise UserError(
                f"{text}: there is no such file, and no image of the run has this id: give "
                f"{wanted}, or an id in {ASSIGNMENTS}"
            )
        if file is not None and (file.suffix.lower() == ".npy") != vectors:
            kind = "embeddings" if vectors else "images"
            raise UserError(f"{text}: the run is on {kind}; give {wanted}, or an id of the run")


def _queries(
    given: Sequence[tuple[str, Path | None, int | None]],
    model: Model,
    known: KnownImages,
    clusters: np.ndarray,
    display: Display,
) -> list[_Query]:
    """Return the queries with their features. A file is preferred to an id. Raises UserError."""
    found: list[_Query] = []
    for text, file, row in given:
        if file is None:
            assert row is not None
            z_D = known.features_MD[row]
            found.append(_Query(text, z_D, int(clusters[row]), row, None))
        elif model.recipe.encoder.name == NO_ENCODER:
            found += _vectors(text, file, model)
        else:
            found.append(_image(text, file, model, display))
    if len(found) > _QUERIES:
        raise UserError(
            f"{len(found):,} queries are more than {_QUERIES}: give fewer, or use `snscc predict "
            "RUN DATA`, which lists the nearest for each in one file"
        )
    return found


def _vectors(text: str, file: Path, model: Model) -> list[_Query]:
    rows = read_queries(file)
    check_inputs(model, rows)
    assert rows.vectors is not None
    z_BD, p_BC = model.infer(bank_of(rows.vectors, model.device))
    names = [text] if len(z_BD) == 1 else [f"{text}:{number}" for number in range(len(z_BD))]
    best_B = p_BC.argmax(1).tolist()
    return [
        _Query(name, z_D, c, None, None) for name, z_D, c in zip(names, z_BD, best_B, strict=True)
    ]


def _image(text: str, file: Path, model: Model, display: Display) -> _Query:
    data, rows = resolve_reading(model.recipe.data, rows_of_paths([file]))
    for note in rows.notes:
        display.line(f"{text}: {note}")
    try:
        pixels_BCHW = _pixels(file, data, rows.reading)[None]
    except UnreadableImage as error:
        raise UserError(
            f"{text} cannot be read as an image ({error}): give another file, or the id of an "
            "image of the run"
        ) from error
    z_BD, p_BC = model.infer(ResidentData(torch.from_numpy(pixels_BCHW), model.device))
    return _Query(text, z_BD[0], int(p_BC[0].argmax()), None, _thumbnail(file, rows.reading))


# ---------------------------------------------------------------------------------- the pictures


def _pictures(
    run: Path,
    model: Model,
    known: KnownImages,
    queries: Sequence[_Query],
    answers: Sequence[Answer],
    ids: Names,
    display: Display,
) -> tuple[dict[int, Tensor], list[str]]:
    """Return pictures, uint8 (3, S, S), and sentences on those that cannot be shown.

    Their keys are the rows of the run's images, and -1, -2, … for the queries that are files.
    """
    wanted = {similar.row for answer in answers for similar in answer.found}
    wanted |= {query.row for query in queries if query.row is not None}
    rows, data = sorted(wanted), model.recipe.data
    pictures: dict[int, Tensor] = {}
    for number, query in enumerate(queries, 1):
        if query.picture_CSS is not None:
            pictures[-number] = query.picture_CSS
    try:
        if model.recipe.encoder.name == NO_ENCODER:
            held = pictures_of(data, rows)
            if held is None:
                return pictures, ["No pictures: the run is on embeddings, without images."]
            return pictures | dict(zip(rows, held, strict=True)), []
        listed = own_rows(run, model.recipe, display)
        places = pc.index_in(ids.take(np.array(rows)).array, value_set=listed.ids.array)
        row_of = dict(zip(places.to_pylist(), rows, strict=True))
        seen: dict[int, np.ndarray] = {}  # by row, as the network sees them
        tell, done, first = display.counting("pictures", "images"), 0, 0
        for batch in listed.batches:
            for place in row_of.keys() & set(range(first, first + len(batch))):
                row, source = row_of[place], batch[place - first]
                with suppress(UnreadableImage):
                    seen[row] = _pixels(source, data, listed.reading)
                    pictures[row] = _thumbnail(source, listed.reading)
                done += 1
                tell(done, len(rows))
            first += len(batch)
        display.finish()
        for row in _changed(seen, model, known):
            pictures.pop(row, None)
    except (UserError, OSError) as error:
        return pictures, [f"No pictures, because the images of the run cannot be read: {error}."]
    missing = len(rows) - len(pictures.keys() & wanted)
    note = f"{missing:,} of {len(rows):,} pictures are not shown: the images are gone or changed."
    return pictures, [note] if missing else []


def _pixels(source: Source, data: DataSettings, how: Reading) -> np.ndarray:
    """Decode an image as the run does, uint8 (C, S, S). Raises UnreadableImage."""
    pixels_CSS = np.empty((data.channels, data.image_size, data.image_size), np.uint8)
    decode_into(source, pixels_CSS, how)
    return pixels_CSS


def _changed(seen: dict[int, np.ndarray], model: Model, known: KnownImages) -> list[int]:
    """Return the rows whose images are not those that the run saw, by their features.

    All in one pass: the network computes a whole batch for a single image, too.
    """
    if not seen:
        return []
    pixels_BCHW = torch.from_numpy(np.stack([*seen.values()]))
    z_BD, _ = model.infer(ResidentData(pixels_BCHW, model.device))
    cosine_B = (z_BD * known.features_MD[[*seen]]).sum(1)
    return [row for row, cosine in zip(seen, cosine_B.tolist(), strict=True) if cosine < _SAME]


def _thumbnail(source: Source, how: Reading) -> Tensor:
    pixels_CSS = np.empty((3, sprites.LARGEST, sprites.LARGEST), np.uint8)
    decode_into(source, pixels_CSS, how)
    return torch.from_numpy(pixels_CSS)


# ---------------------------------------------------------------------------------- the page


def _page(
    run: Path,
    model: Model,
    answers: Sequence[Answer],
    pictures: dict[int, Tensor],
    notes: Sequence[str],
) -> str:
    """Return one HTML page. Names and ids may be any text; all is escaped."""
    packed = None
    if pictures:
        packed = sprites.pack([*pictures], torch.stack([*pictures.values()]), large=pictures)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "base64": _base64}
    own = resources.files("snscc_ray.answers")
    values: dict[str, Any] = {
        "run": run.name or run.resolve().name,
        "answers": answers,
        "noun": "embeddings" if model.recipe.encoder.name == NO_ENCODER else "images",
        "notes": notes,
        "places": packed.places if packed else {},
        "sheets": packed.sheets if packed else [],
        "style": Markup((own / "report" / "page.css").read_text("utf-8")),
    }
    template = (own / "similar.html.j2").read_text("utf-8")
    return environment.from_string(template).render(**values)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
