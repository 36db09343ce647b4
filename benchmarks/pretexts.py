"""Pretext methods at equal cost: the same CPU seconds of training for each, on real images.

Every entry is the recipe `cifar10` with some settings changed. The engine's own loop trains it for
as many steps as fit the time, with complete warm-up and cosine schedules. The figures are k-NN
accuracy (20 neighbours, leave-one-out) and ACC of k-means, on the features of the clean images.

    python -m benchmarks.pretexts --data DIR [--seconds S] [--seeds 0 1 2] [--only NAME ...]
        [--set FIELD=VALUE] [--out FILE]

Rows already in FILE are kept and not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.epoch import _NoCheckpoints
from benchmarks.report import describe_machine, print_table, save
from snscc_ray.config import recipes
from snscc_ray.config.errors import TrainingError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe, SimclrView
from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.mining import mine
from snscc_ray.core.views import Normalize, make_view
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import Batch, ResidentData, Viewer
from snscc_ray.data.sources import load_images
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training.context import Context
from snscc_ray.training.engine import fit
from snscc_ray.training.stages.pretrain import Pretrain, pretext_features

_MEASURED_STEPS = 5
# Most views per pass: spaces their row numbers, so that no two views of a run share them.
_VIEWS_APART = 64

Loss = Callable[[Tensor, float], Tensor]


def pairs(z_VBD: Tensor, temperature: float) -> Tensor:
    """NT-Xent over V views: all other views of an image are positives, averaged."""
    V, B, _ = z_VBD.shape
    z = z_VBD.flatten(0, 1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    image = torch.arange(B).repeat(V)
    positive = (image[:, None] == image).fill_diagonal_(False)
    return -logits.log_softmax(1)[positive].mean()


def to_mean(z_VBD: Tensor, temperature: float) -> Tensor:
    """Each view has to identify the mean of its image's views among those of the batch."""
    V, B, _ = z_VBD.shape
    mean_BD = F.normalize(z_VBD.mean(0), dim=1)
    logits = z_VBD.flatten(0, 1) @ mean_BD.T / temperature
    return F.cross_entropy(logits, torch.arange(B).repeat(V))


def coding_rate(z_VBD: Tensor, temperature: float) -> Tensor:
    """EMP-SSL (Tong et al., 2023): spread the rows of each view, pull views to their mean."""
    _, B, D = z_VBD.shape
    gram_VDD = z_VBD.transpose(1, 2) @ z_VBD * (D / (B * 0.2))
    rate = torch.logdet(torch.eye(D) + gram_VDD).mean() / 2
    return -rate - 200 * F.cosine_similarity(z_VBD, z_VBD.mean(0, keepdim=True), dim=2).mean()


@dataclass(frozen=True)
class Entry:
    name: str
    settings: tuple[str, ...] = ()
    views: int = 2
    loss: Loss | None = None
    """None: the recipe's method."""
    small_views: int = 0
    """Additional views of small crops, at half the side."""


def _pretrain(**settings: object) -> tuple[str, ...]:
    return tuple(f"pretrain.{name}={json.dumps(value)}" for name, value in settings.items())


_SIMCLR = _pretrain(
    method="simclr",
    batch_size=256,
    optimizer="adam",
    learning_rate=1e-3,
    weight_decay=1e-4,
    temperature=0.2,
    projection_dim=128,
    projection_hidden=512,
    key_momentum=0.99,
)


def _simclr(name: str, views: int = 2, loss: Loss | None = None, **settings: object) -> Entry:
    return Entry(name, _SIMCLR + _pretrain(**settings), views, loss)


def _crops(low: float, high: float) -> dict[str, object]:
    return SimclrView(crop_scale=(low, high)).model_dump(mode="json")


ENTRIES = (
    _simclr("simclr"),
    _simclr("simclr, temperature .1", temperature=0.1),
    _simclr("simclr, temperature .5", temperature=0.5),
    _simclr("simclr, adam 3e-3", learning_rate=3e-3),
    _simclr("simclr, sgd .1", optimizer="sgd", learning_rate=0.1),
    _simclr("simclr, sgd .4", optimizer="sgd", learning_rate=0.4),
    _simclr("simclr, batch 128", batch_size=128),
    _simclr("simclr, batch 64", batch_size=64),
    _simclr("simclr, batch 512", batch_size=512),
    _simclr("simclr, projection 256 of 2048", projection_dim=256, projection_hidden=2048),
    _simclr("simclr, projection 64 of 128", projection_dim=64, projection_hidden=128),
    _simclr("simclr, crops from .08", view=_crops(0.08, 1)),
    _simclr("4 views, pairs", 4, pairs, batch_size=128),
    _simclr("4 views, pairs, batch 64", 4, pairs, batch_size=64),
    _simclr("4 views, mean", 4, to_mean, batch_size=128),
    _simclr("8 views, pairs, batch 64", 8, pairs, batch_size=64),
    _simclr("8 views, pairs, crops .25", 8, pairs, batch_size=64, view=_crops(0.25, 0.25)),
    _simclr("8 views, mean, crops .25", 8, to_mean, batch_size=64, view=_crops(0.25, 0.25)),
    _simclr("8 views, coding rate, crops .25", 8, coding_rate, batch_size=64,
            view=_crops(0.25, 0.25)),
    Entry("2 views and 4 small, pairs", _SIMCLR + _pretrain(batch_size=128), 2, pairs, 4),
    _simclr("moco", method="moco", queue_size=2048, key_momentum=0.99),
    Entry(
        "byol, wide heads",  # similar to ProPos
        _pretrain(method="byol", batch_size=512, optimizer="sgd", learning_rate=0.1,
                  weight_decay=5e-4, projection_dim=256, projection_hidden=4096, key_momentum=0.99),
    ),
    Entry(
        "byol, adam, small heads",
        _pretrain(method="byol", batch_size=128, optimizer="adam", learning_rate=1e-3,
                  weight_decay=1e-4, projection_dim=128, projection_hidden=512, key_momentum=0.97),
    ),
)  # fmt: skip


class LongEpoch(ResidentData):
    """One epoch of `total` steps over repeated passes: schedules then fit any number of steps."""

    def __init__(self, images_NCHW: Tensor, total: int) -> None:
        super().__init__(images_NCHW, torch.device("cpu"))
        self.total = total

    def steps(self, batch_size: int) -> int:
        return self.total

    def epoch(
        self, batch_size: int, key: int, start: int = 0, viewer: Viewer | None = None
    ) -> Iterator[Batch]:
        each = super().steps(batch_size)
        for step in range(0, self.total, each):
            apart = step // each * _VIEWS_APART * len(self)
            batches = super().epoch(batch_size, key + step)
            for batch, _ in zip(batches, range(self.total - step), strict=False):
                yield Batch(batch.inputs, batch.rows_B, batch.size, None, batch.rows_B + apart)


class ManyViews(Pretrain):
    """Pretrain with an entry's number of views, and its loss over all of them."""

    def __init__(self, context: Context, entry: Entry) -> None:
        super().__init__(context)
        self.entry = entry

    def viewer(self, epoch: int) -> Viewer:
        view, count, small = self.settings.view, self.entry.views, self.entry.small_views
        few = SimclrView(crop_scale=(0.1, 0.4))
        key, rows = self.context.key("pretrain", epoch), len(self.context.data)

        def views_of(images_BCHW: Tensor, rows_B: Tensor) -> tuple[Tensor, ...]:
            def some(first: int, number: int, kind: Any) -> Tensor:
                rows_VB = torch.cat([rows_B + rows * (first + one) for one in range(number)])
                images = images_BCHW.repeat(number, 1, 1, 1)
                return make_view(images, rows_VB, kind, key, self.context.normalize)

            large = some(0, count, view)
            return (large, F.avg_pool2d(some(count, small, few), 2)) if small else (large,)

        return views_of

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        assert self.entry.loss is not None
        z_VBD = torch.cat([forward(some) for some in views]).unflatten(0, (-1, batch.size))
        self._last = z_VBD[0].detach()
        return {"instance": self.entry.loss(z_VBD, self.settings.temperature)}


def stage_for(entry: Entry, recipe: Recipe, images: ImageSet, steps: int) -> Pretrain:
    assert recipe.data.mean is not None and recipe.data.std is not None
    context = Context(
        recipe,
        LongEpoch(images.images, steps),
        images.catalog.labels,
        Normalize(recipe.data.mean, recipe.data.std),
        torch.device("cpu"),
    )
    torch.manual_seed(recipe.seed)
    return ManyViews(context, entry) if entry.loss else Pretrain(context)


def train(stage: Pretrain) -> float:
    """Train by the engine's loop, to the end; return CPU seconds."""
    began = time.process_time()
    context = stage.context
    fit(stage, context, _NoCheckpoints(context.device), NullMonitor(), "")
    return time.process_time() - began


def measure(entry: Entry, recipe: Recipe, images: ImageSet, seconds: float) -> dict[str, Any]:
    """Return the figures of one entry, or the reason if it fails."""
    make = partial(stage_for, entry, recipe, images)
    figures: dict[str, Any] = {}
    try:
        train(make(1))
        pace = train(make(_MEASURED_STEPS)) / _MEASURED_STEPS
        figures["steps"] = max(1, round(seconds / pace))
        stage = make(figures["steps"])
        figures["cpu_seconds"] = train(stage)
    except TrainingError as error:
        return {**figures, "failure": str(error)}
    features_ND = pretext_features(stage.context, stage.network)
    labels_N = stage.context.labels_N
    assert labels_N is not None
    mined = mine(features_ND, metrics.KNN_NEIGHBORS)
    clusters_N = kmeans(features_ND, recipe.data.num_clusters, recipe.seed)[1]
    return {
        **figures,
        "spread": stage.end_epoch(0)["health/projection_spread"],
        "knn": metrics.knn_accuracy(labels_N, mined.neighbors_NK, mined.distances_NK),
        "kmeans": metrics.oracle(labels_N, clusters_N)["oracle/acc"],
    }


def recipe_for(entry: Entry, data: Path, settings: list[str], seed: int) -> Recipe:
    common = [f"data.path={json.dumps(str(data))}", "data.limit=5000", "data.image_size=16"]
    common += ["encoder.name=convnet", "encoder.width=16", "runtime.checkpoint_seconds=1e9"]
    common += ["pretrain.epochs=1", "pretrain.warmup_epochs=0.1", f"seed={seed}"]
    return override(recipes.get("cifar10"), [*common, *entry.settings, *settings])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: shards, or torchvision")
    parser.add_argument("--seconds", type=float, default=30, help="of CPU, for each row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these entries")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="F=V")
    parser.add_argument("--out", type=Path, help="save the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path | None = arguments.out
    rows = json.loads(out.read_text())["results"] if out and out.exists() else []
    images: ImageSet | None = None
    for seed in arguments.seeds:
        for entry in ENTRIES:
            if arguments.only and entry.name not in arguments.only:
                continue
            recipe = recipe_for(entry, arguments.data, arguments.settings, seed)
            asked = {
                "name": entry.name,
                "encoder": f"{recipe.encoder.name} {recipe.encoder.width}",
                "side": recipe.data.image_size,
                "images": recipe.data.limit,
                "seconds": arguments.seconds,
                "seed": seed,
            }
            settings = {"settings": recipe.pretrain.model_dump(mode="json")}
            if any({**row, **asked, **settings} == row for row in rows):
                continue
            images = images or load_images(recipe.data)
            row = asked | measure(entry, recipe, images, arguments.seconds)
            print_table([row])
            rows.append(row | settings | {"views": entry.views + entry.small_views})
            if out:
                save(out, describe_machine(1), rows)


if __name__ == "__main__":
    main()
