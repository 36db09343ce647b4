"""k nearest neighbours in a batch (Eqs. 3 and 6) and in a whole dataset (mined neighbours).

Every search has two steps. A matrix product finds candidates, fast but rounded. Differences then
give their distances exactly: identical rows are at distance 0, and Eq. 2's radius is not noise.
Nothing here has a gradient. Suffixes as in `snscc_ray.core.losses`; R is the number of candidates
per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from snscc_ray.config.errors import UserError
from snscc_ray.core import distributed
from snscc_ray.core.checkpoints import AGAIN
from snscc_ray.core.losses.neighbors import soft_confidence
from snscc_ray.core.tables import write_table
from snscc_ray.texts import counted

# Candidates beyond k, because the product's rounding may swap close ones.
_SPARE = 8
# Columns per group; `_smallest` compares the groups' minima first.
_GROUP = 64
# Scores held at once while mining: 128 MB.
_SCORES = 2**25


@torch.no_grad()
def pairwise_distances(z_BD: Tensor, ref_MD: Tensor) -> Tensor:
    """Euclidean distances (B, M), by differences: exactly 0 between identical rows."""
    return torch.cdist(z_BD, ref_MD, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def batch_neighbors(
    z_BD: Tensor,
    ref_MD: Tensor,
    k: int,
    *,
    same_rows: bool,
    allowed_BM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the K nearest rows of `ref` for each row of `z`: (d_BK, idx_BK), nearest first.

    With `same_rows`, z and ref are the same rows, and no row is its own neighbour. K is k, or the
    number of available rows if that is smaller. `allowed_BM` (bool) says which pairs may be
    neighbours; if a row has fewer than K, the rest have d = inf (confidence 0) and a valid but
    meaningless index. Ties go to the lower index, unless more than k + 8 rows tie.
    Raises ValueError if k < 1, or if the sizes differ with `same_rows`.
    """
    B, M = len(z_BD), len(ref_MD)
    if same_rows and B != M:
        raise ValueError(f"same_rows needs as many rows in z as in ref, got {B} and {M}")
    _check_k(k)
    K = max(min(k, M - same_rows), 0)
    centre_D = _centre(ref_MD)
    centred_MD = ref_MD - centre_D
    score_BM = _scores(z_BD - centre_D, centred_MD, centred_MD.square().sum(dim=1))
    if allowed_BM is not None:
        score_BM.masked_fill_(~allowed_BM, torch.inf)
    if same_rows:
        score_BM.fill_diagonal_(torch.inf)
    score_BR, idx_BR = score_BM.topk(min(K + _SPARE, M), dim=1, largest=False, sorted=False)
    return _nearest(z_BD, ref_MD, idx_BR, torch.isposinf(score_BR), K)


def local_radius(d_BK: Tensor) -> Tensor:
    """Def. 1: r_B, the distance to the nearest neighbour; inf for a row without neighbours."""
    if d_BK.shape[1] == 0:
        return d_BK.new_full((len(d_BK),), torch.inf)
    return d_BK.amin(dim=1)


@torch.no_grad()
def global_radius(z_BD: Tensor, zaug_BD: Tensor) -> Tensor:
    """Eq. 4: r_B, the distance of each row to its own augmented view."""
    d_B: Tensor = torch.linalg.vector_norm(z_BD - zaug_BD, dim=1)
    return d_B


@torch.no_grad()
def knn(
    features_ND: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    backend: Literal["auto", "faiss", "torch"] = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of the dataset: (d_NK float32, idx_NK int64), nearest first.

    Searches for each row of `queries`, or of the dataset itself (its `rows` first..last); in the
    second case no row is its own neighbour, but its duplicates may be. Results are on the device
    of the features. Works in float32 on `chunk` queries at a time (None: up to 1,024, as 128 MB of
    scores allow), never on an N × N matrix. `faiss` searches on the CPU; `auto` is faiss for a
    dataset on the CPU if it is installed (faster on idle cores, benchmarks/mining.py), and torch
    otherwise. Ties go to the lower index, unless more than k + 8 rows tie.
    Raises ValueError if k < 1, a row has fewer than k others, or a feature is not finite;
    ImportError if `faiss` is requested but not installed.
    """
    _check_k(k)
    not_self = queries is None
    others = len(features_ND) - not_self
    if others < k:
        raise ValueError(
            f"{counted(k, 'neighbour')} asked for, but a row has {counted(max(others, 0), 'other')}"
        )
    ref_MD = features_ND.float()
    begin, end = rows or (0, others + 1)
    z_ND = ref_MD[begin:end] if queries is None else queries.float()
    N, M, R = len(z_ND), len(ref_MD), min(k + _SPARE + not_self, len(ref_MD))
    chunk = chunk or min(max(_SCORES // M, 1), 1024)
    centre_D = _centre(ref_MD)
    if not centre_D.isfinite().all():
        raise ValueError("the features hold a NaN or an infinity, so no neighbours can be found")
    centred_MD = ref_MD - centre_D
    if _use_faiss(backend, ref_MD.device):
        search = _faiss_search(centred_MD, R)
    else:
        search = _torch_search(centred_MD, R, chunk)
    d_NK = ref_MD.new_empty(N, k)
    idx_NK = torch.empty(N, k, dtype=torch.long, device=ref_MD.device)
    for row_B in torch.arange(N, device=ref_MD.device).split(chunk):
        z_BD = z_ND[row_B]
        idx_BR = search(z_BD - centre_D)
        self_BR = idx_BR == (begin + row_B[:, None] if not_self else -1)
        d_NK[row_B], idx_NK[row_B] = _nearest(z_BD, ref_MD, idx_BR, self_BR, k)
    return d_NK, idx_NK


def place_drawn(chance_BK: Tensor, draw_B1: Tensor) -> Tensor:
    """Return the place (B, 1) of one of K neighbours, drawn by its chance.

    chance_BK: sums to 1 per row. draw_B1: uniform in [0, 1).
    """
    place_B1 = torch.searchsorted(chance_BK.cumsum(1), draw_B1, right=True)
    return place_B1.clamp(max=chance_BK.shape[1] - 1)


@dataclass(frozen=True, eq=False)
class MinedNeighbors:
    """The K nearest rows of each row of a dataset, with Eq. 2's confidence; tensors on the CPU."""

    neighbors_NK: Tensor  # int32, nearest first
    distances_NK: Tensor  # float32
    confidence_NK: Tensor  # float32

    def save(self, path: Path) -> None:
        """Write one Parquet file, whole or not at all: per row three lists of length K."""
        N, K = self.neighbors_NK.shape
        lists = [
            pa.FixedSizeListArray.from_arrays(tensor.reshape(-1).numpy(), K)
            for tensor in (self.neighbors_NK, self.distances_NK, self.confidence_NK)
        ]
        table = pa.table([np.arange(N, dtype=np.int32), *lists], names=list(_schema(K)))
        write_table(path, table)

    @classmethod
    def load(cls, path: Path) -> MinedNeighbors:
        """Read a file of `save`. Raises UserError if it is missing, truncated or foreign."""
        try:
            with path.open("rb") as file:
                table = pq.ParquetFile(file, page_checksum_verification=True).read()
        except FileNotFoundError:
            raise UserError(f"no mined neighbours at {path}: {AGAIN}") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged or not a Parquet file: {AGAIN}") from error
        types = {name: table.schema.field(name).type for name in table.column_names}
        K = getattr(types.get("neighbors"), "list_size", 0)
        if types != _schema(K):
            raise UserError(f"{path} does not hold mined neighbours: {AGAIN}")
        lists = [
            torch.from_numpy(np.array(table[name].combine_chunks().flatten())).reshape(-1, K)
            for name in ("neighbors", "distances", "confidence")
        ]
        return cls(*lists)


def _schema(K: int) -> dict[str, pa.DataType]:
    return {
        "row": pa.int32(),
        "neighbors": pa.list_(pa.int32(), K),
        "distances": pa.list_(pa.float32(), K),
        "confidence": pa.list_(pa.float32(), K),
    }


def mine(features_ND: Tensor, k: int) -> MinedNeighbors:
    """Find the k nearest rows of each row in the dataset, with the local radius (Def. 1, Eq. 2).

    Every process holds all features and searches for its share of the rows; all get all results.
    Raises ValueError if k < 1 or there are at most k rows.
    """
    N = len(features_ND)
    found = knn(features_ND, k, rows=distributed.own_share(N))
    d_NK, idx_NK = (distributed.gather(part, N) for part in found)
    s_NK = soft_confidence(d_NK, local_radius(d_NK))
    return MinedNeighbors(idx_NK.int().cpu(), d_NK.cpu(), s_NK.cpu())


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _centre(ref_MD: Tensor) -> Tensor:
    """The mean row; subtracting it leaves distances unchanged and affects only rounding."""
    return ref_MD.sum(dim=0) / max(len(ref_MD), 1)


def _scores(z_BD: Tensor, ref_MD: Tensor, square_M: Tensor, out: Tensor | None = None) -> Tensor:
    """‖ref‖² - 2 <z, ref>, (B, M), in the inputs' dtype: orders each row as the distance does."""
    with torch.autocast(z_BD.device.type, enabled=False):
        return torch.addmm(square_M, z_BD, ref_MD.T, alpha=-2, out=out)


def _smallest(score_BM: Tensor, R: int) -> Tensor:
    """Return the indices (B, R) of the R smallest scores of each row, unordered.

    The R smallest lie in the R groups of columns with the smallest minima, or in the columns left
    over from the groups. A minimum is several times cheaper than a search.
    """
    B, M = score_BM.shape
    groups = M // _GROUP
    if groups <= 2 * R:
        return score_BM.topk(R, dim=1, largest=False, sorted=False).indices
    grouped = score_BM[:, : groups * _GROUP].unflatten(1, (groups, _GROUP))
    best_BR = grouped.amin(dim=2).topk(R, dim=1, largest=False, sorted=False).indices
    within = torch.arange(_GROUP, device=score_BM.device)
    rest = torch.arange(groups * _GROUP, M, device=score_BM.device).expand(B, -1)
    idx = torch.cat([(best_BR[:, :, None] * _GROUP + within).flatten(1), rest], dim=1)
    return idx.gather(1, score_BM.gather(1, idx).topk(R, dim=1, largest=False).indices)


def describe_faiss() -> str:
    """Describe faiss: its version and number of GPUs, or why it cannot be used."""
    try:
        import faiss
    except ImportError as error:
        return f"not there ({error}); torch finds the neighbours"
    return f"{faiss.__version__}, {faiss.get_num_gpus()} GPUs"


def _use_faiss(backend: str, device: torch.device) -> bool:
    if backend == "torch" or (backend == "auto" and device.type != "cpu"):
        return False
    try:
        import faiss  # noqa: F401
    except ImportError:
        if backend == "faiss":
            raise
        return False
    return True


def _torch_search(ref_MD: Tensor, R: int, chunk: int) -> Callable[[Tensor], Tensor]:
    """Return a function that maps up to `chunk` rows to R candidates each, (B, R)."""
    square_M = ref_MD.square().sum(dim=1)
    room = ref_MD.new_empty(chunk, len(ref_MD))  # reused: new pages per chunk cost as much again
    return lambda z_BD: _smallest(_scores(z_BD, ref_MD, square_M, room[: len(z_BD)]), R)


def _faiss_search(ref_MD: Tensor, R: int) -> Callable[[Tensor], Tensor]:
    """Like `_torch_search`, by faiss on the CPU."""
    import faiss

    ref = ref_MD.cpu().numpy()

    def search(z_BD: Tensor) -> Tensor:
        _, idx_BR = faiss.knn(z_BD.cpu().numpy(), ref, R)
        return torch.from_numpy(idx_BR).to(z_BD.device)

    return search


def _nearest(
    z_BD: Tensor, ref_MD: Tensor, idx_BR: Tensor, excluded_BR: Tensor, K: int
) -> tuple[Tensor, Tensor]:
    """The K nearest of R candidates by exact distance, (d_BK, idx_BK); d = inf where excluded."""
    idx_BR, order = idx_BR.sort(dim=1)
    d_BR = torch.linalg.vector_norm(ref_MD[idx_BR].sub_(z_BD[:, None]), dim=2)
    d_BR.masked_fill_(excluded_BR.gather(1, order), torch.inf)
    d_BR, order = d_BR.sort(dim=1, stable=True)
    return d_BR[:, :K], idx_BR.gather(1, order)[:, :K]
