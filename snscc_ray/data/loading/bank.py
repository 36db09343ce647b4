"""A feature bank: cached features of a frozen encoder, as a dataset for Train and Boost.

It holds the features of each image's clean view and of V augmented views, in float16, in shards
that are memory-mapped: only the rows in use are in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.core import distributed, rng, storage
from snscc_ray.core.transfer import send
from snscc_ray.data.loading.order import batch_edges, shuffled, steps_of
from snscc_ray.data.loading.resident import Batch, Viewer

SHARD_ROWS = 512
_FILE = "bank.json"


@dataclass(frozen=True)
class BankShape:
    """Rows of a bank, augmented views per row, and numbers per view."""

    rows: int
    views: int
    width: int

    def edges(self) -> list[tuple[int, int]]:
        """First row and end of each shard."""
        return [(a, min(a + SHARD_ROWS, self.rows)) for a in range(0, self.rows, SHARD_ROWS)]


class FeatureBank:
    """Features, float16 (N, 1 + V, D): view 0 is the clean one."""

    order_name = "shuffled"

    def __init__(self, shards: Sequence[np.ndarray], device: torch.device) -> None:
        """shards: arrays (rows, 1 + V, D), in order; all but the last have equal lengths."""
        self._shards = shards
        self._rows_each = len(shards[0])
        self._device = device
        self.views, self.width = shards[0].shape[1] - 1, shards[0].shape[2]
        # A GPU would wait for every batch from the host.
        whole = device.type != "cpu"
        self._held = torch.from_numpy(np.concatenate(shards)).to(device) if whole else None

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)

    def steps(self, batch_size: int) -> int:
        return steps_of(len(self), batch_size)

    def epoch(
        self, batch_size: int, key: int, start: int = 0, viewer: Viewer | None = None
    ) -> Iterator[Batch]:
        """Yield this worker's share of each batch of one epoch, from step `start` on."""
        order = shuffled(len(self), key)
        edges = batch_edges(len(self), batch_size).tolist()
        for first, last in zip(edges[start:-1], edges[start + 1 :], strict=True):
            begin, end = distributed.own_share(last - first)
            host_rows_B = order[first + begin : first + end]
            features_BVD = self.take(host_rows_B)
            views = viewer(features_BVD, host_rows_B) if viewer else None
            rows_B = send(host_rows_B, self._device)
            yield Batch(features_BVD, rows_B, last - first, views, host_rows_B)

    def slices(self, first: int, last: int, batch_size: int) -> Iterator[Tensor]:
        """Yield features of rows first..last in order, for a clean pass."""
        for start in range(first, last, batch_size):
            yield self.take(torch.arange(start, min(start + batch_size, last)))

    def columns(self, first: int, last: int) -> FeatureBank:
        """Return the bank of features first..last, such as those of one encoder."""
        return FeatureBank([shard[:, :, first:last] for shard in self._shards], self._device)

    def take(self, rows_B: Tensor) -> Tensor:
        """Return the features of any rows, float16 (B, 1 + V, D) on the device."""
        if self._held is not None:
            return self._held.index_select(0, send(rows_B, self._device))
        rows = rows_B.numpy()
        taken = np.empty((len(rows), 1 + self.views, self.width), np.float16)
        shard_B, place_B = np.divmod(rows, self._rows_each)
        for number in np.unique(shard_B):
            here = shard_B == number
            taken[here] = self._shards[number][place_B[here]]
        return torch.from_numpy(taken)


def bank_of(features_ND: np.ndarray, device: torch.device) -> FeatureBank:
    """Return features in memory, float16 (N, D), as a bank without augmented views."""
    return FeatureBank([features_ND[:, None]], device)


def bank_views(
    features_BVD: Tensor, rows_B: Tensor, drawn: Sequence[bool], keys: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return views of cached features, float32 (B, D) each.

    drawn: for each view, whether to draw one of the augmented views by its key and the row, or to
    take the clean one. A bank without augmented views has clean ones only.
    """
    V = features_BVD.shape[1] - 1
    views = []
    for random, key in zip(drawn, keys, strict=True):
        if random and V:
            draw_B = rng.uniform(rows_B, key, 1)[:, 0]
            which_B = 1 + (draw_B * V).long().clamp(max=V - 1)
            here_B = torch.arange(len(rows_B), device=features_BVD.device)
            views.append(features_BVD[here_B, send(which_B, features_BVD.device)].float())
        else:
            views.append(features_BVD[:, 0].float())
    return tuple(views)


# ----------------------------------------------------------------------------------- the files


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.npy"


def write_shard(folder: Path, number: int, features_BVD: np.ndarray) -> None:
    """Write one shard whole or not at all. Raises UserError on a full disk."""
    content = BytesIO()
    np.save(content, np.ascontiguousarray(features_BVD, np.float16), allow_pickle=False)
    # NumPy's own write to a file hides why it failed.
    storage.write_whole(shard_path(folder, number), lambda file: file.write(content.getbuffer()))


def read_shard(folder: Path, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map one shard. Raises UserError if it is missing, damaged or of another shape."""
    path = shard_path(folder, number)
    held: np.ndarray | None
    try:
        if is_url(path):
            held = np.load(BytesIO(path.read_bytes()), allow_pickle=False)
        else:
            held = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        held = None
    if held is None or held.shape != shape or held.dtype != np.float16:
        raise _damaged(path)
    return held


def begin_bank(folder: Path, identity: str, shape: BankShape) -> bool:
    """Mark a folder as the bank of this identity. Returns whether it is complete.

    Removes shards of another bank, shards of a complete bank that were altered since, and files
    left by a kill during a write.
    """
    if not is_url(folder):
        for name in ("*.npy", _FILE):
            for left in folder.glob(f".{name}.????????"):
                left.unlink(missing_ok=True)
    if identity_of(folder) != identity:
        if folder.exists():
            for path in folder.glob("*.npy"):
                path.unlink()
        _note(folder, identity, shape, [])
        return False
    if identity_of(folder, complete=True) is None:
        return False
    if broken := _damaged_shards(folder, *_noted(folder)):
        for path in broken:
            path.unlink(missing_ok=True)
        _note(folder, identity, shape, [])
    return not broken


def finish_bank(folder: Path, identity: str, shape: BankShape) -> None:
    """Note the checksums of all shards, which makes the bank complete. Raises UserError."""
    sums = [zlib.crc32(shard.data) for shard in _shards(folder, shape)]
    _note(folder, identity, shape, sums)


def identity_of(folder: Path, *, complete: bool = False) -> str | None:
    """Return the identity of the bank in a folder; None: there is none, or it is incomplete."""
    try:
        held = storage.read_json(folder / _FILE)
        identity = str(held["identity"]) if held["checksums"] or not complete else None
    except (UserError, OSError, KeyError, TypeError):
        return None
    return identity


def open_bank(folder: Path, device: torch.device) -> FeatureBank:
    """Open a complete bank. Raises UserError if a shard is missing or was altered."""
    if identity_of(folder, complete=True) is None:
        raise _damaged(folder / _FILE)
    shape, checksums = _noted(folder)
    if broken := _damaged_shards(folder, shape, checksums):
        raise _damaged(broken[0])
    return FeatureBank(_shards(folder, shape), device)


def has_all_shards(folder: Path) -> bool:
    """Whether a folder holds a complete bank, as far as the names of its files tell."""
    if identity_of(folder, complete=True) is None:
        return False
    shape, _ = _noted(folder)
    return all(shard_path(folder, number).exists() for number, _ in enumerate(shape.edges()))


def _noted(folder: Path) -> tuple[BankShape, list[int]]:
    held = storage.read_json(folder / _FILE)
    return BankShape(held["rows"], held["views"], held["width"]), held["checksums"]


def _damaged_shards(folder: Path, shape: BankShape, checksums: list[int]) -> list[Path]:
    """Return the shards that are missing, of another shape or of another content."""
    broken = []
    for number, (first, end) in enumerate(shape.edges()):
        try:
            shard = read_shard(folder, number, (end - first, 1 + shape.views, shape.width))
            sound = number < len(checksums) and zlib.crc32(shard.data) == checksums[number]
        except UserError:
            sound = False
        if not sound:
            broken.append(shard_path(folder, number))
    return broken


def _shards(folder: Path, shape: BankShape) -> list[np.ndarray]:
    return [
        read_shard(folder, number, (end - first, 1 + shape.views, shape.width))
        for number, (first, end) in enumerate(shape.edges())
    ]


def _note(folder: Path, identity: str, shape: BankShape, checksums: list[int]) -> None:
    storage.write_json(
        folder / _FILE,
        {
            "identity": identity,
            "rows": shape.rows,
            "views": shape.views,
            "width": shape.width,
            "checksums": checksums,
        },
    )


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is missing or damaged: remove it, and repeat the command that made the run "
        "(`snscc run` with --resume), which computes it anew"
    )
