"""The rows that a method clusters: pixels, or an encoder's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from snscc_ray.compare.methods.ours import Pretext, pretext
from snscc_ray.compare.study import Features, Study
from snscc_ray.data.loading.bank import FeatureBank
from snscc_ray.models.frozen import Adapter, components_of, encoder_widths
from snscc_ray.training.stages.extract import projection
from snscc_ray.training.stages.pretrain import pretext_features


def rows_of(study: Study) -> Tensor:
    """Return the features of a frozen encoder, (N, D) on the device, or else the pixels."""
    return features_of(study).rows_ND if study.frozen else study.pixels()


def features_of(study: Study) -> Features:
    """Return the features of a frozen encoder, or of our Pretrain.

    All methods get the same tensors. The first to ask has them computed, unless an earlier run of
    the comparison did; `study.seconds` gets the time for every method.
    """
    if study.shared:
        (found,) = study.shared
        study.seconds.append(found.seconds)
        return found
    start = pretext(study)
    rows_ND = pretext_features(start.context, start.network)
    found = Features(start.context, rows_ND, _spaces(start, rows_ND), study.seconds[-1])
    study.shared.append(found)
    return found


@torch.no_grad()
def _spaces(start: Pretext, rows_ND: Tensor) -> tuple[Tensor, ...]:
    """Return the features of each frozen encoder, centred and projected as those of all are."""
    recipe, bank = start.context.recipe, start.context.data
    if not (isinstance(bank, FeatureBank) and recipe.encoder.further):
        return (rows_ND,)
    spaces, first = [], 0
    for width in encoder_widths(recipe):
        part = bank.columns(first, first + width)
        adapter = Adapter(width, components_of(recipe, width, len(part)))
        adapter.project_on(*projection(part, adapter.out_features))
        adapter.to(start.context.device)
        parts = [adapter(z_BVD[:, 0]) for z_BVD in part.slices(0, len(part), 1024)]
        spaces.append(F.normalize(torch.cat(parts), dim=1))
        first += width
    return tuple(spaces)
