"""The images of a finished run that are nearest to new ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from snscc_ray.answers.features import (
    kept_features,
    may_keep,
    own_ids,
    own_images,
    stage_features,
)
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import StageName
from snscc_ray.core import checkpoints, storage
from snscc_ray.core.claim import claimed
from snscc_ray.core.clustering.index import Index, make_index, query
from snscc_ray.core.clustering.neighbors import knn
from snscc_ray.core.display import Display

# Up to so many images every new one is compared with all of them.
_EXACT_ROWS = 2**16
# Making an index of M images costs as much as comparing M / 64 new images with all of them (it has
# M / 256 cells), and 1,024 more, on which it measures itself.
_COST, _MEASURED = 1 / 64, 1024
# An index is made for at least so many neighbours, so that it can be kept.
_LEAST_NEIGHBOURS = 10
# Where the neighbours are spread over more than this share of the cells, an index saves little.
_LARGEST_SHARE = 0.4


@dataclass(frozen=True)
class KnownImages:
    """A run's own images, searched for the nearest ones."""

    ids: pa.Array
    features_MD: Tensor  # L2-normalised
    count: int  # images to list
    index: Index | None = None  # None: new images are compared with all of them

    def nearest(self, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return distances (B, K) and rows (B, K), nearest first, on the CPU."""
        count = min(self.count, len(self.ids))
        if self.index is None:
            d_BK, idx_BK = knn(self.features_MD, count, queries=z_BD)
        else:
            d_BK, idx_BK = query(self.index, self.features_MD, z_BD, count)
        return d_BK.cpu(), idx_BK.cpu()

    def on(self, device: torch.device) -> KnownImages:
        return replace(self, features_MD=self.features_MD.to(device))


class UnreadableRun(UserError):
    """The features of a run's own images are not at hand, and the images cannot be read."""


def known_images(
    run: Path, stage: StageName, count: int, asked: int, device: torch.device, display: Display
) -> KnownImages:
    """Return the run's own images with their features after a stage, for `asked` new images.

    Features that are not at hand are computed. Raises UnreadableRun, and other UserErrors.
    """
    ids = own_ids(run)
    features_MD = kept_features(run, stage, len(ids))
    if features_MD is None:
        display.line("computing the features of the run's own images once, to find the nearest")
        with claimed(run, display.line):
            try:
                own = own_images(run, device, display)
            except (UserError, OSError) as error:
                raise UnreadableRun(f"the images of the run cannot be read: {error}") from error
            features_MD = stage_features(own, stage)
    # Cached in half precision, they no longer have unit length.
    features_MD = F.normalize(features_MD, dim=1).to(device)
    index = None
    if len(ids) > _EXACT_ROWS and device.type == "cpu":
        index = _index(run, stage, features_MD, count, asked, display)
    if index is not None:
        display.line(
            f"nearest images are looked for in {index.searched:,} of {len(index.centres_CD):,} "
            f"cells of the run's images: {index.recall:.1%} of the nearest are found there (of "
            "the run's own)"
        )
    return KnownImages(ids.column, features_MD, count, index)


def _index(
    run: Path, stage: StageName, features_MD: Tensor, count: int, asked: int, display: Display
) -> Index | None:
    """Return the kept index, or make one if that pays for so many new images; else None."""
    path = run / stage / "index.pt"
    identity = storage.read_json(run / stage / "stage.json")["identity"]
    index = _kept(path, identity, len(features_MD), count)
    if index is None and asked > _COST * len(features_MD) + _MEASURED:
        display.line("making an index of the run's images, to find the nearest faster")
        index = make_index(
            features_MD,
            max(count, _LEAST_NEIGHBOURS),
            lambda done: display.count("index", int(100 * done), 100, "%"),
        )
        if may_keep(run, stage):
            with claimed(run, display.line):
                checkpoints.save(path, {"identity": identity, "index": asdict(index)})
    return index if index is not None and index.share <= _LARGEST_SHARE else None


def _kept(path: Path, identity: str, rows: int, count: int) -> Index | None:
    """Return the index that was kept for this stage; None if there is none, or it cannot serve."""
    if not path.exists():
        return None
    try:
        held = checkpoints.load(path)
    except UserError:
        return None  # damaged: it is made again
    if held["identity"] != identity:
        return None
    index = Index(**held["index"])
    return index if len(index.row_N) == rows and index.neighbours >= count else None
