"""The content of a report as plain values, as stored in report.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snscc_ray.answers.features import RunImages
from snscc_ray.answers.names import Naming
from snscc_ray.answers.report import pick
from snscc_ray.answers.report.embed import embed, seconds_of_maps
from snscc_ray.answers.report.facts import Facts
from snscc_ray.answers.report.moved import Common, moved
from snscc_ray.answers.report.trust import TOLD_BY_FIGURES, judge
from snscc_ray.answers.report.words import FIGURES, in_words
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.data.imageset import Catalog

GENERATOR = "snscc report"  # marks a file as a report
_SKIPPED = 1000  # most skipped images listed by name
_IDENTICAL_GROUPS, _IDENTICAL_EACH = 20, 6
_CONFUSION = 40  # most classes in a readable table


def build(
    own: RunImages,
    facts: Facts,
    features: Callable[[StageName], Tensor],
    mined: MinedNeighbors,
    digests: np.ndarray,
    naming: Naming,
    common: Common | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Build the content.

    features: returns a stage's features, (N, D). digests: bytes (N, B), equal for equal images.
    common: the images in common with another run. tell: receives a message before each slow step.
    """
    seed, recipe = own.recipe.seed, own.recipe
    stages = _mapped_stages(recipe, list(facts.stages))
    clusters_N = facts.clusters_N
    sampled = pick.sample(len(own.catalog), seed)
    points = {}
    for stage in stages:
        tell(f"features and t-SNE of {len(sampled):,} images after {stage}")
        points[stage] = embed(features(stage)[sampled], seed)
    assert facts.second_N is not None and facts.second_confidence_N is not None
    margin_N = facts.confidence_N - facts.second_confidence_N
    clusters = recipe.data.num_clusters
    tell("images of each cluster, borders and duplicates")
    galleries = pick.galleries(features(stages[-1]), margin_N, clusters_N, clusters, seed)
    borders, pairs = pick.borders(
        clusters_N,
        facts.second_N,
        facts.confidence_N,
        facts.second_confidence_N,
        np.unique([naming.label(c) for c in range(clusters)], return_inverse=True)[1],
    )
    content: dict[str, Any] = {
        "generator": GENERATOR,
        "run": own.folder.name or own.folder.resolve().name,
        "summary": _summary(own, facts),
        "trust": _trust(facts, recipe),
        "stages": facts.stages,
        "names": [naming.title(cluster) for cluster in range(clusters)],
        "clusters": _clusters(facts, naming),
        "galleries": [vars(gallery) for gallery in galleries],
        "borders": [vars(border) for border in borders],
        "borders_total": pairs,
        "moved": common and moved(common, seed, _CONFUSION),
        "neighbors": _neighbors(mined, galleries, recipe.train.num_neighbors),
        "health": _health(facts),
        "warnings": facts.warnings,
        "duplicates": _duplicates(mined, digests),
        "outliers": _outliers(mined),
        "confusion": _confusion(own.catalog, clusters_N),
        "class_names": class_names(own.catalog),
        "number": facts.number and facts.number.model_dump(),
        "picked": facts.picked and facts.picked.model_dump()["picked"],
        "scatter": {"rows": sampled, "points": points, "fixed": _is_fixed(recipe)},
    }
    content["images"] = _images(own.catalog, facts, shown_rows(content))
    return content


def expected_seconds(recipe: Recipe, images: int) -> float:
    """Estimate the seconds of a report here, most of which are spent on the maps."""
    maps = len(_mapped_stages(recipe, STAGES))
    return seconds_of_maps(min(images, pick.SAMPLED), maps)


def _mapped_stages(recipe: Recipe, stages: Sequence[StageName]) -> list[StageName]:
    """Return the stages after which the features are mapped: the first if they never change."""
    return list(stages[:1] if _is_fixed(recipe) else stages)


def _is_fixed(recipe: Recipe) -> bool:
    """Whether Train and Boost leave the features as they are."""
    return recipe.encoder.frozen and recipe.train.adapter == "none"


def shown_rows(content: dict[str, Any]) -> list[int]:
    """Return every row whose image the page shows, ascending."""
    return sorted(large_rows(content) | set(content["scatter"]["rows"]))


def large_rows(content: dict[str, Any]) -> set[int]:
    """Return every row whose image the page shows outside the maps."""
    rows: set[int] = set()
    for part in (*content["borders"], *(content["moved"] or {"moves": []})["moves"]):
        rows |= set(part["rows"])
    for gallery in content["galleries"]:
        rows |= {*gallery["typical"], *gallery["doubtful"], *gallery["random"]}
    for line in content["neighbors"]:
        rows |= {line["row"], *(near["row"] for near in line["near"])}
    for group in content["duplicates"]["identical"]:
        rows |= set(group["rows"])
    for pair in content["duplicates"]["pairs"]:
        rows |= {pair["a"], pair["b"]}
    return rows | {line["row"] for line in content["outliers"]}


def class_names(catalog: Catalog) -> list[str] | None:
    if catalog.labels is None:
        return None
    if catalog.class_names is not None:
        return list(catalog.class_names)
    return [str(label) for label in range(int(catalog.labels.max()) + 1)]


def _summary(own: RunImages, facts: Facts) -> dict[str, Any]:
    skipped = own.catalog.skipped
    return {
        "images": len(own.catalog),
        "clusters": own.recipe.data.num_clusters,
        "skipped": [{"id": name, "reason": reason} for name, reason in skipped[:_SKIPPED]],
        "skipped_total": len(skipped),
        "notes": facts.notes,
        "words": in_words(own.recipe, len(own.catalog)),
        "recipe": own.recipe.model_dump(mode="json"),
        "versions": facts.versions,
        "seconds": {stage: figures["seconds"] for stage, figures in facts.stages.items()},
    }


def _trust(facts: Facts, recipe: Recipe) -> dict[str, Any]:
    warnings = [
        f"{line['stage']}, epoch {line['epoch'] + 1}: {line['warning']}"
        for line in facts.warnings
        if not line["warning"].startswith(TOLD_BY_FIGURES)
    ]
    trust = judge(
        facts.last_figures(),
        recipe.data.num_clusters,
        warnings,
        max_imbalance=recipe.train.max_imbalance,
    )
    sentences = [vars(sentence) for sentence in trust.sentences]
    return {"verdict": trust.verdict, "summary": trust.summary, "sentences": sentences}


def _clusters(facts: Facts, naming: Naming) -> list[dict[str, Any]]:
    """Return what is shown of each cluster; `group` lists the clusters with the same label."""
    num_clusters, groups = len(naming.names), naming.groups()
    sizes_C = torch.bincount(facts.clusters_N, minlength=num_clusters)
    sums_C = torch.bincount(facts.clusters_N, facts.confidence_N, minlength=num_clusters)
    return [
        {
            "cluster": cluster,
            "label": naming.label(cluster),
            "group": groups[naming.label(cluster)],
            "size": size,
            "share": size / len(facts.clusters_N),
            "confidence": total / size if size else None,
        }
        for cluster, (size, total) in enumerate(zip(sizes_C.tolist(), sums_C.tolist(), strict=True))
    ]


def _neighbors(
    mined: MinedNeighbors, galleries: list[pick.Gallery], num_neighbors: int
) -> list[dict[str, Any]]:
    K = pick.neighbors_shown(mined, num_neighbors)
    found = []
    for row in pick.with_neighbors(galleries):
        near = zip(
            mined.neighbors_NK[row, :K].tolist(),
            mined.confidence_NK[row, :K].tolist(),
            mined.distances_NK[row, :K].tolist(),
            strict=True,
        )
        lines = [{"row": n, "confidence": s, "distance": d} for n, s, d in near]
        found.append({"row": row, "near": lines})
    return found


def _health(facts: Facts) -> dict[str, dict[str, list[tuple[int, float | None]]]]:
    """Return each stage's figures by epoch, counted from 1."""
    return {
        stage: {
            name: [(line["epoch"] + 1, line.get(name)) for line in lines]
            for name in FIGURES
            if any(line.get(name) is not None for line in lines)
        }
        for stage, lines in facts.epochs.items()
        if lines
    }


def _duplicates(mined: MinedNeighbors, digests: np.ndarray) -> dict[str, Any]:
    images_N = pick.numbered(digests)
    groups = pick.identical(images_N)
    pairs, near = pick.close_pairs(mined, images_N)
    return {
        "identical": [
            {"rows": group[:_IDENTICAL_EACH], "images": len(group)}
            for group in groups[:_IDENTICAL_GROUPS]
        ],
        "identical_total": len(groups),
        "pairs": [vars(pair) for pair in pairs],
        "near_total": near,
        "threshold": pick.NEAR,
    }


def _outliers(mined: MinedNeighbors) -> list[dict[str, Any]]:
    rows, mean_N = pick.outliers(mined)
    return [{"row": row, "distance": float(mean_N[row])} for row in rows]


def _confusion(catalog: Catalog, clusters_N: Tensor) -> dict[str, Any] | None:
    """Return the confusion table, with clusters in the order of the labels they match."""
    if catalog.labels is None:
        return None
    counts, matched = metrics.confusion(catalog.labels, clusters_N)
    if max(counts.shape) > _CONFUSION:
        # Too large to read: list only the matched cluster of each label.
        return {"clusters": None, "lines": _matches(counts, matched)}
    order = [cluster for cluster in matched if cluster is not None]
    order += [cluster for cluster in range(counts.shape[1]) if cluster not in order]
    lines = [
        {"label": label, "cluster": cluster, "counts": counts[label, order].tolist()}
        for label, cluster in enumerate(matched)
    ]
    return {"clusters": order, "lines": lines}


def _matches(counts: np.ndarray, matched: list[int | None]) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "cluster": cluster,
            "found": 0 if cluster is None else int(counts[label, cluster]),
            "images": int(counts[label].sum()),
        }
        for label, cluster in enumerate(matched)
    ]


def _images(catalog: Catalog, facts: Facts, rows: list[int]) -> dict[int, dict[str, Any]]:
    """Return id, cluster and confidence of each image shown, and its label if there is one."""
    assert facts.second_N is not None and facts.second_confidence_N is not None
    found = {}
    for row in rows:
        found[row] = {
            "id": catalog.ids[row],
            "cluster": int(facts.clusters_N[row]),
            "confidence": round(float(facts.confidence_N[row]), 4),
            "second": int(facts.second_N[row]),
            "second_confidence": round(float(facts.second_confidence_N[row]), 4),
        }
        if catalog.labels is not None:
            found[row]["label"] = int(catalog.labels[row])
    return found
