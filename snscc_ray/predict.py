"""New images through a finished run: the clusters that it would have put them in.

The network, the normalisation and the clean pass are those of training, so an image of the run's
own set gets the very cluster that assignments.parquet says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor

from snscc_ray import checkpoints
from snscc_ray.checkpoints import write_whole
from snscc_ray.config import DataSettings, Recipe, StageName
from snscc_ray.data.imageset import Catalog
from snscc_ray.data.resident import Images
from snscc_ray.data.sources import list_rows
from snscc_ray.encoders import ClusterHeads, ClusterNet, build_encoder, out_features
from snscc_ray.errors import UserError
from snscc_ray.local import bring, mode_for
from snscc_ray.monitor import Display
from snscc_ray.run_folder import read_recipe
from snscc_ray.stages.context import Context
from snscc_ray.stages.train import probabilities
from snscc_ray.views import Normalize
from snscc_ray.workers import choose_device

_CLUSTERING: tuple[StageName, ...] = ("boost", "train")  # the last one there is counts


@dataclass(frozen=True)
class Model:
    """What a finished run has learned."""

    recipe: Recipe
    network: ClusterNet
    normalize: Normalize
    device: torch.device

    def probabilities(self, images: Images) -> Tensor:
        """Cluster probabilities of images in their order, (N, C) float32 on the CPU."""
        context = Context(self.recipe, images, None, self.normalize, self.device)
        return probabilities(context, self.network)[:, 0]


def load_model(folder: Path, device: str = "auto") -> Model:
    """The network of a run's last stage. Raises UserError for a run that is not finished."""
    recipe = read_recipe(folder)
    if not (folder / "metrics.json").exists():
        raise UserError(
            f"{folder} holds a run that is not finished; `snscc run --resume --out {folder}` goes "
            "on with it"
        )
    stage = next((s for s in _CLUSTERING if (folder / s / "final.pt").exists()), None)
    if stage is None:
        raise UserError(f"{folder} holds no Train stage, so there are no clusters to predict")
    chosen = choose_device(device)
    path = folder / stage / "final.pt"
    held = checkpoints.load(path, chosen)
    if "normalize" not in held:
        raise UserError(f"{path} was written by an older version; run the recipe again")
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    clusters = recipe.data.num_clusters
    heads = ClusterHeads(recipe.train, out_features(encoder), clusters, heads=1)
    network = ClusterNet(encoder, heads)
    checkpoints.load_weights(network, held["network"], path)
    network.to(chosen, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = (tuple(held["normalize"][name]) for name in ("mean", "std"))
    return Model(recipe, network, Normalize(mean, std), chosen)


def predict(
    run: Path, source: str, out: Path, console: Console, *, device: str = "auto", top: int = 3
) -> tuple[Catalog, pa.Table]:
    """Cluster the images in a folder or in Parquet shards, and write a row for each to `out`.

    Columns: id, cluster, confidence, and the `top` clusters with their confidences. Unreadable
    images are left out and said. Raises UserError; nothing is written then.
    """
    model = load_model(run, device)
    display = Display(console)
    settings = _settings(model.recipe, source)
    rows = list_rows(settings)
    mode = mode_for(settings, rows, model.device, display)
    images, data = bring(settings, rows, mode, model.device, display)
    for identifier, reason in images.skipped:
        display.line(f"left out {identifier}: {reason}")
    p_NC = model.probabilities(data)
    table = _table(images.ids, p_NC, min(top, p_NC.shape[1]))
    write_whole(out, lambda file: pq.write_table(table, file))
    return images, table


def _settings(recipe: Recipe, source: str) -> DataSettings:
    """The run's own form of images, from another place."""
    return recipe.data.model_copy(
        update={
            "source": "auto",
            "path": source,
            "classes": (),
            "download": False,
            "folders_are_labels": False,
            "skip_corrupt": True,
            "limit": None,
        }
    )


def _table(ids: list[str], p_NC: Tensor, top: int) -> pa.Table:
    # Sorted, not topk: of equal probabilities the first cluster stands first, as in training.
    order_NC = p_NC.argsort(dim=1, descending=True, stable=True)[:, :top]
    sorted_NC = p_NC.gather(1, order_NC)
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "cluster": pa.array(order_NC[:, 0].int().numpy()),
            "confidence": pa.array(sorted_NC[:, 0].numpy()),
            "top_clusters": pa.array(order_NC.int().tolist(), pa.list_(pa.int32())),
            "top_confidences": pa.array(sorted_NC.tolist(), pa.list_(pa.float32())),
        }
    )
