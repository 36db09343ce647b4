"""Words that a run's encoder was trained to tell apart: as names of clusters, and to search by."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from snscc_ray.answers.features import own_bank
from snscc_ray.answers.names import (
    Naming,
    Suggestion,
    parse,
    read_naming,
    save,
    with_suggestions,
)
from snscc_ray.answers.predict import check_finished
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import NO_ENCODER, Recipe
from snscc_ray.core import rng
from snscc_ray.core.display import Display
from snscc_ray.core.tables import read_table
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.models.frozen import encoder_widths
from snscc_ray.models.libraries import Vocabulary, vocabulary_of
from snscc_ray.runs.finished import ASSIGNMENTS
from snscc_ray.runs.folder import NAMES_FILE, read_recipe

# Below this confidence a suggestion is listed, but it does not become the name.
LEAST = 0.1
# Images whose features are compared: at most this many, or _EACH of every cluster.
_IMAGES, _EACH = 20_000, 50
_PART = 1024


class NoWords(UserError):
    """The run's encoder knows no words."""


@dataclass(frozen=True)
class Named:
    """The names of a run's clusters, their sizes, and the suggestions, if there are some."""

    naming: Naming
    sizes: tuple[int, ...]
    suggestions: tuple[Suggestion | None, ...]
    missing: str | None  # why there are no suggestions


def name_clusters(
    run: Path, display: Display, *, given: Path | None = None, overwrite: bool = False
) -> Named:
    """Name the clusters of a finished run, and write its names file.

    Names that a person has changed stay, unless `overwrite`. given: a person's own file; the names
    in it come first. Raises UserError, and writes nothing then: the run is not finished, a file of
    names is wrong, or there is nothing to write (NoWords).
    """
    check_finished(run)
    recipe = read_recipe(run)
    clusters = recipe.data.num_clusters
    theirs = Naming((None,) * clusters) if given is None else parse(given, clusters)
    if not overwrite:
        read_naming(run, clusters)  # a wrong file is told before the work
    column = read_table(run / ASSIGNMENTS, ["cluster"])["cluster"]
    clusters_N = torch.tensor(column.to_numpy(), dtype=torch.int64)
    suggestions: tuple[Suggestion | None, ...] = ()
    missing = None
    try:
        first, width, vocabulary = _vocabulary(recipe)
    except NoWords as error:
        if given is None and not (run / NAMES_FILE).exists():
            raise
        missing = str(error)
    else:
        bank = own_bank(run, torch.device("cpu")).columns(first, first + width)
        tell = display.counting("names", "images")
        suggestions = suggest(bank, clusters_N, clusters, vocabulary, tell)
        display.finish()
    sure = (s.word if s and s.confidence >= LEAST else None for s in suggestions)
    suggested = Naming(tuple(sure) if suggestions else (None,) * clusters)
    present = suggested if overwrite else with_suggestions(run, suggested)
    naming = Naming(tuple(a or b for a, b in zip(theirs.names, present.names, strict=True)))
    save(naming, run, suggestions)
    sizes = torch.bincount(clusters_N, minlength=clusters).tolist()
    return Named(naming, tuple(sizes), suggestions, missing)


def _vocabulary(recipe: Recipe) -> tuple[int, int, Vocabulary]:
    """Return the first encoder's vocabulary that has words, and which of the features are its.

    Raises NoWords, saying why.
    """
    if recipe.encoder.name == NO_ENCODER:
        raise NoWords("the run is on embeddings, of which no words are known")
    if not recipe.encoder.frozen:
        raise NoWords("the run has trained its encoder on its images, without words")
    first = 0
    for encoder, width in zip(recipe.encoder.each(), encoder_widths(recipe), strict=True):
        try:
            known = vocabulary_of(encoder.name) if encoder.weights == "default" else None
        except UserError as error:
            # The weights were fetched on another machine, and cannot be here.
            raise NoWords(str(error)) from error
        if known:
            return first, width, known
        first += width
    names = " and ".join(encoder.name for encoder in recipe.encoder.each())
    raise NoWords(f"the weights of {names} come without a classifier whose classes have words")


@torch.no_grad()
def suggest(
    bank: FeatureBank,
    clusters_N: Tensor,
    clusters: int,
    vocabulary: Vocabulary,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Suggestion | None, ...]:
    """Return a word for each cluster; None for an empty cluster, and if only one is in use.

    bank: features of the vocabulary's encoder, of length 1 (N rows). The word of a cluster is the
    one whose mean score in it is highest above its mean score in all images. A large set's images
    are drawn at random.
    """
    sizes_C = torch.bincount(clusters_N, minlength=clusters)
    if int((sizes_C > 0).sum()) < 2:
        return (None,) * clusters
    rows_C = _drawn(clusters_N, sizes_C)
    features_C = [bank.take(rows_n)[:, 0].float() for rows_n in rows_C]
    mean_CD = torch.stack([f.mean(0) if len(f) else f.new_zeros(bank.width) for f in features_C])
    mean_D = (sizes_C.double() / len(clusters_N)).float() @ mean_CD
    weight_DV = vocabulary.weight_VD.float().T
    best_C2 = ((mean_CD - mean_D) @ weight_DV).topk(2).indices.tolist()
    total, done = sum(map(len, features_C)), 0
    found: list[Suggestion | None] = []
    for features_nD, (best, second) in zip(features_C, best_C2, strict=True):
        first = 0
        for part_BD in features_nD.split(_PART):
            first += int((((part_BD - mean_D) @ weight_DV).argmax(1) == best).sum())
            tell(done := done + len(part_BD), total)
        words, number = vocabulary.words, len(features_nD)
        found.append(Suggestion(words[best], first / number, words[second]) if number else None)
    return tuple(found)


def _drawn(clusters_N: Tensor, sizes_C: Tensor) -> list[Tensor]:
    """Return rows of each cluster, drawn at random if there are many, in ascending order."""
    each = max(_IMAGES // len(sizes_C), _EACH)
    drawn_N = torch.randperm(len(clusters_N), generator=rng.generator("names"))
    by_cluster_N = drawn_N[clusters_N[drawn_N].argsort(stable=True)]
    return [rows_n[:each].sort().values for rows_n in by_cluster_N.split(sizes_C.tolist())]


# ------------------------------------------------------------------------------- search by words


@dataclass(frozen=True)
class Fit:
    """How well each image of a run fits a text: a cosine, in float32 on the CPU."""

    words: tuple[str, ...]  # of the encoder, that the text stands for
    cosine_N: Tensor


@torch.no_grad()
def fits(run: Path, recipe: Recipe, texts: Sequence[str], display: Display) -> list[Fit]:
    """Return how well each image of a finished run fits each text.

    The cosine of what is special of an image, its feature less the mean of all, with the weights of
    a word's class; of several words, the best. Raises UserError: the encoder knows no words
    (NoWords), or not these.
    """
    first, width, vocabulary = _vocabulary(recipe)
    chosen = [meant(text, vocabulary.words) for text in texts]
    bank = own_bank(run, torch.device("cpu")).columns(first, first + width)
    own_D = torch.zeros(width)
    for part_BVD in bank.slices(0, len(bank), _PART):
        own_D += part_BVD[:, 0].float().sum(0)
    mean_D = own_D / len(bank)
    weights = [F.normalize(vocabulary.weight_VD[places].float(), dim=1) for places in chosen]
    found: list[list[Tensor]] = [[] for _ in texts]
    tell, done = display.counting("words", "images"), 0
    for part_BVD in bank.slices(0, len(bank), _PART):
        special_BD = F.normalize(part_BVD[:, 0].float() - mean_D, dim=1)
        for cosines, weight_WD in zip(found, weights, strict=True):
            cosines.append((special_BD @ weight_WD.T).amax(1))
        tell(done := done + len(part_BVD), len(bank))
    display.finish()
    words = [tuple(vocabulary.words[place] for place in places) for places in chosen]
    return [Fit(own, torch.cat(parts)) for own, parts in zip(words, found, strict=True)]


def meant(text: str, words: Sequence[str]) -> list[int]:
    """Return the places of the words that a text stands for.

    That is the same word, in upper or lower case, or else all that hold each word of the text.
    Raises UserError if there is none.
    """
    asked = _parts(text)
    parts = [_parts(word) for word in words]
    if same := [place for place, own in enumerate(parts) if own == asked]:
        return same
    if asked and (holding := [place for place, own in enumerate(parts) if {*asked} <= {*own}]):
        return holding
    near = difflib.get_close_matches(text.casefold(), [word.casefold() for word in words], 3, 0.5)
    hint = f"; its nearest: {', '.join(near)}" if near else ""
    raise UserError(
        f"--text {text}: that is none of the {len(words):,} words that the run's encoder knows, "
        f"such as {words[0]} or {words[-1]}{hint}"
    )


def _parts(text: str) -> list[str]:
    """Return the words of a text in lower case, without the s of a plural."""
    return [part.removesuffix("s") for part in re.findall(r"\w+", text.casefold())]
