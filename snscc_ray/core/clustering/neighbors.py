"""k nearest neighbours in a batch (Eqs. 3 and 6) and in a whole dataset.

Every search has two steps. A matrix product finds candidates, fast but rounded. Differences then
give their distances exactly: identical rows are at distance 0, and Eq. 2's radius is not noise.
In a dataset, rows for which rounding may have hidden a candidate are searched again in float64.
Nothing here has a gradient. Suffixes as in `snscc_ray.core.losses`; R is the number of candidates
per row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from snscc_ray.core.threads import mapping
from snscc_ray.texts import counted

# Candidates beyond k, because the product's rounding may swap close ones.
SPARE = 8
# Columns per group; `smallest` compares the groups' minima first.
_GROUP = 64
# Relative error of a product's entry, per root of its length, with a margin of four.
_ROUNDING = 4 * 2.0**-24
_BLOCK = 2**14  # rows that are in float64 at a time
# Scores that each thread holds at a time: 32 MB on a CPU, 128 MB on a GPU.
_SCORES = {"cpu": 2**23, "cuda": 2**25}


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
    check_k(k)
    K = max(min(k, M - same_rows), 0)
    centre_D = _centre(ref_MD)
    centred_MD = ref_MD - centre_D
    score_BM = scores(z_BD - centre_D, centred_MD, centred_MD.square().sum(dim=1))
    if allowed_BM is not None:
        score_BM.masked_fill_(~allowed_BM, torch.inf)
    if same_rows:
        score_BM.fill_diagonal_(torch.inf)
    score_BR, idx_BR = score_BM.topk(min(K + SPARE, M), dim=1, largest=False, sorted=False)
    return nearest_of(z_BD, ref_MD, idx_BR, torch.isposinf(score_BR), K)


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
    backend: Literal["torch", "faiss"] = "torch",
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of the dataset: (d_NK float32, idx_NK int64), nearest first.

    Searches for each row of `queries`, or of the dataset itself (its `rows` first..last); in the
    second case no row is its own neighbour, but its duplicates may be. Results are on the device
    of the features. Works in float32 on `chunk` queries at a time (None: up to 1,024), never on an
    N × N matrix; on a CPU every core has its own chunk. Ties go to the lower index, unless more
    than k + 8 rows tie. backend: faiss searches on the CPU; it is no faster (docs/log.md).
    progress: called with the number of rows done, and of all rows.
    Raises ValueError if k < 1, a row has fewer than k others, or a feature is not finite;
    ImportError if `faiss` is requested but not installed.
    """
    check_k(k)
    not_self = queries is None
    others = len(features_ND) - not_self
    if others < k:
        raise ValueError(
            f"{counted(k, 'neighbour')} asked for, but a row has {counted(max(others, 0), 'other')}"
        )
    ref_MD = features_ND.float()
    begin, end = rows or (0, others + 1)
    z_ND = ref_MD[begin:end] if queries is None else queries.float()
    N, M, R = len(z_ND), len(ref_MD), min(k + SPARE + not_self, len(ref_MD))
    chunk = chunk or min(max(_SCORES[ref_MD.device.type] // M, 1), 1024)
    centre_D = _centre(ref_MD)
    if not centre_D.isfinite().all():
        raise ValueError("the features hold a NaN or an infinity, so no neighbours can be found")
    centred_MD = ref_MD - centre_D
    search = _SEARCHES[backend](centred_MD, R, chunk)

    largest = centred_MD.square().sum(1).amax()

    def nearest(row_B: Tensor) -> tuple[Tensor, Tensor]:
        z_BD = z_ND[row_B]
        own_B = begin + row_B if not_self else torch.full_like(row_B, -1)
        idx_BR, beyond_B = search(z_BD - centre_D)
        d_BK, idx_BK = nearest_of(z_BD, ref_MD, idx_BR, idx_BR == own_B[:, None], k)
        again = unsure(d_BK, beyond_B, z_BD - centre_D, largest)
        if len(again):
            idx_BR = precise(z_BD[again] - centre_D, centred_MD, R)
            found = nearest_of(z_BD[again], ref_MD, idx_BR, idx_BR == own_B[again, None], k)
            d_BK[again], idx_BK[again] = found
        return d_BK, idx_BK

    d_NK = ref_MD.new_empty(N, k)
    idx_NK = torch.empty(N, k, dtype=torch.long, device=ref_MD.device)
    parts = torch.arange(N, device=ref_MD.device).split(chunk)
    with mapping(ref_MD.device) as mapped:
        for row_B, (d_BK, idx_BK) in zip(parts, mapped(nearest, parts), strict=True):
            d_NK[row_B], idx_NK[row_B] = d_BK, idx_BK
            if progress is not None and len(row_B):
                progress(int(row_B[-1]) + 1, N)
    return d_NK, idx_NK


def place_drawn(chance_BK: Tensor, draw_B1: Tensor) -> Tensor:
    """Return the place (B, 1) of one of K neighbours, drawn by its chance.

    chance_BK: sums to 1 per row. draw_B1: uniform in [0, 1).
    """
    place_B1 = torch.searchsorted(chance_BK.cumsum(1), draw_B1, right=True)
    return place_B1.clamp(max=chance_BK.shape[1] - 1)


def check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _centre(ref_MD: Tensor) -> Tensor:
    """The mean row; subtracting it leaves distances unchanged and affects only rounding."""
    return ref_MD.sum(dim=0) / max(len(ref_MD), 1)


def scores(z_BD: Tensor, ref_MD: Tensor, square_M: Tensor, out: Tensor | None = None) -> Tensor:
    """‖ref‖² - 2 <z, ref>, (B, M), in the inputs' dtype: orders each row as the distance does."""
    with torch.autocast(z_BD.device.type, enabled=False):
        return torch.addmm(square_M, z_BD, ref_MD.T, alpha=-2, out=out)


def smallest(score_BM: Tensor, R: int) -> Tensor:
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


def candidates(
    z_BD: Tensor, ref_MD: Tensor, square_M: Tensor, R: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return R rows of `ref` near each row, (B, R), and the rest of `best_of`."""
    return best_of(scores(z_BD, ref_MD, square_M, out), z_BD, R)


def best_of(score_BM: Tensor, z_BD: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Return the columns (B, R) of the R best scores of each row, and the least squared distance of
    all other columns (B,), as rounded; inf if there are none."""
    idx_BR = smallest(score_BM, R)
    beyond_B = score_BM.gather(1, idx_BR).amax(1) + z_BD.square().sum(1)
    return idx_BR, beyond_B if score_BM.shape[1] > R else torch.full_like(beyond_B, torch.inf)


def unsure(d_BK: Tensor, beyond_B: Tensor, z_BD: Tensor, largest: Tensor) -> Tensor:
    """Return the rows whose K-th neighbour may be farther than a row that is no candidate.

    beyond_B: of `candidates`, wrong by the rounding of a product. largest: squared length of the
    longest row. Nothing is nearer than distance 0.
    """
    slack_B = _ROUNDING * z_BD.shape[1] ** 0.5 * (z_BD.square().sum(1) + largest)
    last_B = d_BK[:, -1]
    may_be: Tensor = (last_B.square() > beyond_B - slack_B) & (last_B > 0)
    return may_be.nonzero()[:, 0]


def precise(z_BD: Tensor, ref_MD: Tensor, R: int) -> Tensor:
    """Return R rows of `ref` near each row, (B, R), in float64; a few rows at a time."""

    def scores_of(part_BD: Tensor) -> Iterator[Tensor]:
        for block_MD in ref_MD.split(_BLOCK):  # not all at once: twice the memory
            exact_MD = block_MD.double()
            yield scores(part_BD, exact_MD, exact_MD.square().sum(1))

    parts = z_BD.double().split(max(1, _SCORES["cpu"] // len(ref_MD)))
    return torch.cat([smallest(torch.cat(list(scores_of(part)), dim=1), R) for part in parts])


def _torch_search(ref_MD: Tensor, R: int, chunk: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function that maps up to `chunk` rows to their `candidates`."""
    square_M = ref_MD.square().sum(dim=1)
    own = threading.local()  # scores, reused: new pages for each chunk cost as much again

    def search(z_BD: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(own, "scores"):
            own.scores = ref_MD.new_empty(chunk, len(ref_MD))
        return candidates(z_BD, ref_MD, square_M, R, own.scores[: len(z_BD)])

    return search


def _faiss_search(ref_MD: Tensor, R: int, chunk: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Like `_torch_search`, by faiss on the CPU."""
    import faiss

    ref = ref_MD.cpu().numpy()

    def search(z_BD: Tensor) -> tuple[Tensor, Tensor]:
        square_BR, idx_BR = faiss.knn(z_BD.cpu().numpy(), ref, R)
        beyond_B = torch.from_numpy(square_BR).amax(1)
        if len(ref) == R:
            beyond_B = torch.full_like(beyond_B, torch.inf)
        return torch.from_numpy(idx_BR).to(z_BD.device), beyond_B.to(z_BD.device)

    return search


_SEARCHES = {"torch": _torch_search, "faiss": _faiss_search}


def nearest_of(
    z_BD: Tensor, ref_MD: Tensor, idx_BR: Tensor, excluded_BR: Tensor, K: int
) -> tuple[Tensor, Tensor]:
    """The K nearest of R candidates by exact distance, (d_BK, idx_BK); d = inf where excluded."""
    idx_BR, order = idx_BR.sort(dim=1)
    d_BR = torch.linalg.vector_norm(ref_MD[idx_BR].sub_(z_BD[:, None]), dim=2)
    d_BR.masked_fill_(excluded_BR.gather(1, order), torch.inf)
    d_BR, order = d_BR.sort(dim=1, stable=True)
    return d_BR[:, :K], idx_BR.gather(1, order)[:, :K]
