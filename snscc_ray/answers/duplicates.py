"""Groups of images that show the same picture, and which one of each to keep.

Candidates are equal files and the neighbours that the run mined. A candidate counts only if its
pixels are alike (`alike`), or, of embeddings, which have none, if the features are almost equal.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from snscc_ray.answers.alike import SIDE, TINTS, same_colours, similarity, small_copies
from snscc_ray.answers.features import own_ids, rows_now
from snscc_ray.answers.predict import check_finished
from snscc_ray.answers.report.pick import NEAR, identical, numbered, pairs_of
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.config.settings import NO_ENCODER, Recipe
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.display import Display
from snscc_ray.core.storage import write_whole
from snscc_ray.data.decode import (
    Reading,
    Source,
    UnreadableImage,
    available_cores,
    content_of,
    whole_image,
)
from snscc_ray.data.loading.survey import in_threads
from snscc_ray.data.names import Names
from snscc_ray.data.rows import Rows
from snscc_ray.runs.finished import NEIGHBORS
from snscc_ray.runs.folder import read_recipe, reading

ALIKE = 0.85  # least similarity of near-duplicates by their pixels; see docs/sort.md
COLUMNS = ("group", "id", "keep", "why", "similarity", "width", "height", "bytes")
# Mined neighbours of a row that are compared with it.
_CANDIDATES = 10
_DIGEST = 16
_PAIRS = 1024  # compared between two reports of progress


T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """One image of a group. `similarity` is to the one to keep; sizes are None for embeddings."""

    group: int
    id: str
    keep: bool
    why: str
    similarity: float
    width: int | None = None
    height: int | None = None
    size: int | None = None  # bytes


@dataclass(frozen=True)
class Duplicates:
    """The groups in the order of their first image, what was left out, and what was assumed."""

    lines: list[Line]
    left: list[tuple[str, str]]  # (id, reason)
    notes: list[str]


@dataclass(frozen=True)
class _Look:
    """What is known of an image; of a member of a group also its sharpness and pixels."""

    width: int
    height: int
    size: int  # bytes
    digest: bytes  # of the file
    sharpness: float = 0.0
    pixels: bytes = b""


def find_duplicates(run: Path, display: Display) -> Duplicates:
    """Find the near-duplicates among the images of a finished run. Raises UserError.

    Small grey copies are in a temporary file (4 KB per image), and a few numbers of each in memory.
    """
    with reading(run):
        check_finished(run)
        recipe, ids = read_recipe(run), own_ids(run)
        mined = MinedNeighbors.load(run / "pretrain" / NEIGHBORS)
        if recipe.encoder.name == NO_ENCODER:
            return _by_features(ids, mined)
        return _by_pixels(run, recipe, ids, mined, display)


def write_duplicates(lines: Sequence[Line], file: Path) -> None:
    """Write the lines as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for line in lines:
        keep = "yes" if line.keep else "no"
        sizes = (line.width, line.height, line.size)
        table.writerow((line.group, line.id, keep, line.why, line.similarity, *sizes))
    write_whole(file, lambda opened: opened.write(text.getvalue().encode()))


# ------------------------------------------------------------------------------------- embeddings


def _by_features(ids: Names, mined: MinedNeighbors) -> Duplicates:
    close = mined.distances_NK.numpy().reshape(-1) <= np.sqrt(2 * (1 - NEAR))
    low, high, d = pairs_of(mined, np.arange(len(ids)), np.flatnonzero(close))
    pairs = zip(low.tolist(), high.tolist(), (1 - d**2 / 2).tolist(), strict=True)
    known: dict[tuple[int, int], float] = {(a, b): cosine for a, b, cosine in pairs}

    def alike(a: int, b: int) -> float:
        return known.get((min(a, b), max(a, b)), 0.0)

    lines = []
    groups = _stars(known, key=lambda row: row, alike=alike, least=NEAR)
    for number, members in enumerate(groups):
        for row, cosine in members:
            why = "the first" if row == members[0][0] else "almost equal features"
            lines.append(Line(number, ids[row], row == members[0][0], why, round(cosine, 4)))
    note = (
        f"the run is on embeddings: duplicates are those whose features almost agree (cosine "
        f"{NEAR} or more), and no picture was compared; look at them before you remove any"
    )
    return Duplicates(lines, [], [note])


# ----------------------------------------------------------------------------------------- pixels


def _by_pixels(
    run: Path, recipe: Recipe, ids: Names, mined: MinedNeighbors, display: Display
) -> Duplicates:
    rows = rows_now(run, recipe, display)
    number = {name: row for row, name in enumerate(ids)}
    left = [(name, "it is gone") for name in sorted(number.keys() - set(rows.ids))]
    looks: dict[int, _Look] = {}
    with tempfile.TemporaryFile() as file:
        grey_NHW = np.memmap(file, np.uint8, "w+", shape=(len(ids), SIDE, SIDE))
        tints_NT = np.zeros((len(ids), TINTS), np.uint8)
        tell = display.counting("looking at", "images")
        found = _each(rows, number, None, lambda source: _look(source, rows.reading))
        there = len(ids) - len(left)
        for done, (row, look) in enumerate(found, 1):
            if isinstance(look, str):
                left.append((ids[row], look))
            else:
                looks[row], grey_NHW[row], tints_NT[row] = look
            tell(done, there)
        display.finish()

        def compare(low: np.ndarray, high: np.ndarray) -> np.ndarray:
            a, b = (torch.from_numpy(grey_NHW[rows]) for rows in (low, high))
            # Of two images, the whole one must be shifted to the cropped one.
            found = torch.maximum(similarity(a, b), similarity(b, a)).numpy()
            return np.where(same_colours(tints_NT[low], tints_NT[high]), found, 0)

        known = _alike_pairs(mined, looks, compare, display)
        members = {row for pair in known for row in pair}
        tell = display.counting("sharpness", "images")
        closely = _each(rows, number, members, lambda source: _look_closely(source, rows.reading))
        for done, (row, close) in enumerate(closely, 1):
            if isinstance(close, str):
                raise UserError(f"{ids[row]} changed while it was read: run the same command again")
            looks[row] = close
            tell(done, len(members))
        display.finish()
        ages = {row: _age(rows, where) for where, row in _rows_of(rows, number, members)}

        def alike(a: int, b: int) -> float:
            if looks[a].digest == looks[b].digest or looks[a].pixels == looks[b].pixels:
                return 1.0
            pair = (min(a, b), max(a, b))
            if pair not in known:
                known[pair] = float(compare(np.array([a]), np.array([b]))[0])
            return known[pair]

        def rank(row: int) -> tuple[int, float, float, str]:
            look = looks[row]
            return -look.width * look.height, -look.sharpness, ages[row], ids[row]

        groups = _stars(dict(known), rank, alike, ALIKE)
    return Duplicates(_lines(groups, ids, looks, ages), left, [])


def _lines(
    groups: Sequence[Sequence[tuple[int, float]]],
    ids: Names,
    looks: Mapping[int, _Look],
    ages: Mapping[int, float],
) -> list[Line]:
    lines = []
    for group, stars in enumerate(groups):
        first, second = stars[0][0], stars[1][0]
        for row, score in stars:
            look = looks[row]
            if row == first:
                why = _why_kept(look, looks[second], ages[row] < ages[second])
            else:
                why = _why_not(look, looks[first], ages[row] > ages[first])
            sizes = (look.width, look.height, look.size)
            lines.append(Line(group, ids[row], row == first, why, round(score, 4), *sizes))
    return lines


def _alike_pairs(
    mined: MinedNeighbors,
    looks: Mapping[int, _Look],
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
    display: Display,
) -> dict[tuple[int, int], float]:
    """Return the similarity of each pair of near-duplicates, lower row first."""
    N, K = mined.neighbors_NK.shape
    digests_ND = np.zeros((N, _DIGEST), np.uint8)
    readable = np.zeros(N, bool)
    for row, look in looks.items():
        digests_ND[row] = np.frombuffer(look.digest, np.uint8)
        readable[row] = True
    images_N = numbered(digests_ND)
    known: dict[tuple[int, int], float] = {}
    for group in identical(images_N):
        if readable[group[0]]:
            known |= {(group[0], other): 1.0 for other in group[1:]}
    nearest = np.arange(N * K).reshape(N, K)[:, :_CANDIDATES].reshape(-1)
    low, high, _ = pairs_of(mined, images_N, nearest)
    both = readable[low] & readable[high]
    low, high = low[both], high[both]
    tell = display.counting("comparing", "pairs")
    for first in range(0, len(low), _PAIRS):
        a, b = low[first : first + _PAIRS], high[first : first + _PAIRS]
        for x, y, score in zip(a.tolist(), b.tolist(), compare(a, b).tolist(), strict=True):
            if score >= ALIKE:
                known[x, y] = score
        tell(first + len(a), len(low))
    display.finish()
    return known


def _stars(
    pairs: Mapping[tuple[int, int], float],
    key: Callable[[int], object],
    alike: Callable[[int, int], float],
    least: float,
) -> list[list[tuple[int, float]]]:
    """Group rows around the one to keep, which comes first; each is alike to that one itself.

    A chain of images, each like the next, is not one group: its ends may be different pictures.
    key: orders the rows by which to keep. Returns (row, similarity to the first) per group.
    """
    found = []
    for members in _connected(pairs):
        left = sorted(members, key=key)  # type: ignore[arg-type]
        while len(left) > 1:
            kept, *others = left
            scores = {row: alike(kept, row) for row in others}
            own = [row for row in others if scores[row] >= least]
            if own:
                found.append([(kept, 1.0), *((row, scores[row]) for row in own)])
            left = [row for row in others if scores[row] < least]
    return sorted(found, key=lambda group: min(row for row, _ in group))


def _connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the rows that pairs connect, a list for each connected set."""
    above: dict[int, int] = {}

    def top(row: int) -> int:
        while above.setdefault(row, row) != row:
            above[row] = above[above[row]]
            row = above[row]
        return row

    for a, b in pairs:
        above[top(a)] = top(b)
    sets: dict[int, list[int]] = {}
    for row in above:
        sets.setdefault(top(row), []).append(row)
    return [*sets.values()]


def _rows_of(
    rows: Rows, number: Mapping[str, int], wanted: set[int] | None
) -> Iterator[tuple[int, int]]:
    """Yield the place in the source and the row of the run of each wanted image (None: all)."""
    for place, name in enumerate(rows.ids):
        row = number.get(name)
        if row is not None and (wanted is None or row in wanted):
            yield place, row


def _each(
    rows: Rows,
    number: Mapping[str, int],
    wanted: set[int] | None,
    work: Callable[[Source], T],
) -> Iterator[tuple[int, T | str]]:
    """Yield the row of the run and the work's result, or why the image is unreadable.

    The images are read in the order of the source, by one thread per core.
    """

    def batches() -> Iterator[list[tuple[int, Source]]]:
        places = _rows_of(rows, number, wanted)
        place, row = next(places, (-1, -1))
        first = 0
        for batch in rows.batches:
            held = []
            while first <= place < first + len(batch):
                held.append((row, batch[place - first]))
                place, row = next(places, (-1, -1))
            first += len(batch)
            if held:
                yield held

    def worked(batch: list[tuple[int, Source]]) -> list[tuple[int, T | str]]:
        done: list[tuple[int, T | str]] = []
        for row, source in batch:
            try:
                done.append((row, work(source)))
            except UnreadableImage as error:
                done.append((row, str(error)))
            except OSError as error:
                done.append((row, error.strerror or str(error)))
        return done

    cores = available_cores()
    with closing(in_threads(worked, batches(), cores, cores + 1)) as parts:
        for part in parts:
            yield from part


def _look(source: Source, reading: Reading) -> tuple[_Look, np.ndarray, np.ndarray]:
    content = content_of(source)
    image, (width, height) = whole_image(content, reading, SIDE)
    look = _Look(width, height, len(_raw(content)), _hash(_raw(content)))
    return look, *small_copies(image)


def _look_closely(source: Source, reading: Reading) -> _Look:
    """Decode an image in full. Sharpness: mean square of the Laplacian of the grey values."""
    content = content_of(source)
    image, (width, height) = whole_image(content, reading)
    grey_HW = np.asarray(image.convert("L"), np.float32)
    inner = grey_HW[1:-1, 1:-1]
    around = grey_HW[:-2, 1:-1] + grey_HW[2:, 1:-1] + grey_HW[1:-1, :-2] + grey_HW[1:-1, 2:]
    sharpness = float(np.square(4 * inner - around).mean()) if inner.size else 0.0
    raw, pixels = _raw(content), _hash(repr(image.size).encode() + image.tobytes())
    return _Look(width, height, len(raw), _hash(raw), sharpness, pixels)


def _raw(content: bytes | np.ndarray) -> bytes:
    return content if isinstance(content, bytes) else content.tobytes()


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _age(rows: Rows, place: int) -> float:
    """Return when a file was last changed, in ns; inf where there is no file on this machine."""
    if rows.files is None or is_url(rows.place):
        return float("inf")
    return float(rows.files[place].stat().st_mtime_ns)


def _why_kept(kept: _Look, second: _Look, older: bool) -> str:
    if kept.width * kept.height > second.width * second.height:
        return "the largest"
    if kept.sharpness > second.sharpness:
        return "the sharpest of the largest"
    return "the oldest of equal ones" if older else "the first of equal ones"


def _why_not(look: _Look, kept: _Look, newer: bool) -> str:
    if look.digest == kept.digest:
        return "the same file" + ", newer" * newer
    if look.pixels == kept.pixels:
        return "the same pixels" + ", newer" * newer
    if look.width * look.height < kept.width * kept.height:
        return "smaller"
    if look.sharpness < kept.sharpness:
        return "less sharp"
    return "newer" if newer else "equal"
