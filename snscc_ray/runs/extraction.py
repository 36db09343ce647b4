"""A frozen encoder in a run: its features in Pretrain's place, and the network that reads them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from snscc_ray.config.settings import NO_ENCODER
from snscc_ray.core import distributed
from snscc_ray.core.clustering.mining import MinedNeighbors, mine
from snscc_ray.data.loading.bank import FeatureBank, open_bank
from snscc_ray.models.frozen import Adapter, FrozenNet, components_of, load_frozen
from snscc_ray.runs.banks import BANK, share_bank
from snscc_ray.runs.identity import bank_identity
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Monitor
from snscc_ray.training.stages.extract import extract, mix_neighbors, projection
from snscc_ray.training.stages.pretrain import measure_features, pretext_features


def compute_features(
    context: Context, fingerprint: str, folder: Path, beside: Path, monitor: Monitor
) -> tuple[FrozenNet, MinedNeighbors, dict[str, Any]]:
    """Compute a frozen encoder's features, mine the neighbours and measure them.

    fingerprint: of the images. folder: of the stage, which gets the bank. beside: a folder of
    runs, whose banks are shared. The augmented views of given embeddings are made from the
    neighbours. Returns the network, the neighbours and the figures. Raises UserError.
    """
    recipe, bank, frozen = context.recipe, context.data, None
    identity = bank_identity(recipe, fingerprint, mixed=context.mixed)
    if not isinstance(bank, FeatureBank):
        frozen, imported = load_frozen(recipe)
        for found in imported:
            monitor.line(str(found))
        if distributed.rank() == 0 and (owner := share_bank(folder / BANK, identity, beside)):
            monitor.line(f"features: found in {owner}, computed before")
        distributed.barrier()
        bank = extract(context, frozen, folder / BANK, identity, monitor)
    context = replace(context, data=bank)
    adapter = Adapter(bank.width, components_of(recipe, bank.width, len(bank)))
    compute = partial(projection, bank, adapter.out_features)
    adapter.project_on(*distributed.from_first(compute))
    network = context.to_device(FrozenNet(frozen, adapter))
    features_ND = pretext_features(context, network)
    mined = mine(features_ND, recipe.pretrain.mined_neighbors, context.count)
    if recipe.encoder.name == NO_ENCODER:
        mix_neighbors(context, mined, folder / BANK, identity)
    return network, mined, measure_features(context, features_ND, mined)


def on_features(context: Context, folder: Path) -> Context:
    """Return the context of Train and Boost: a frozen encoder's features stand for the images.

    folder: of the stage in Pretrain's place.
    """
    encoder = context.recipe.encoder
    given = isinstance(context.data, FeatureBank) and encoder.name != NO_ENCODER
    if given or not encoder.frozen:
        return context
    return replace(context, data=open_bank(folder / BANK, context.device))


def new_adapter(context: Context) -> Adapter:
    """Return the recipe's adapter for the features in `context`, without its projection."""
    recipe, bank = context.recipe, context.data
    assert isinstance(bank, FeatureBank)
    components = components_of(recipe, bank.width, len(bank))
    return Adapter(bank.width, components, recipe.train.adapter)
