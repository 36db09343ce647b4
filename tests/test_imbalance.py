from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snscc_ray.config import recipes
from snscc_ray.config.errors import UserError
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe
from snscc_ray.core.clustering import imbalance, metrics
from snscc_ray.core.clustering.mining import mine
from snscc_ray.core.clustering.uneven import uneven_clusters, uneven_starts
from snscc_ray.training.stages.objectives import OBJECTIVES, Predictions, neighborhood


def uneven_points(seed: int) -> tuple[Tensor, Tensor]:
    """Four groups of 400, 80, 60 and 40 unit rows, and which is whose."""
    drawing = torch.Generator().manual_seed(seed)
    centres_CD = F.normalize(torch.randn(4, 16, generator=drawing), dim=1)
    group_N = torch.repeat_interleave(torch.arange(4), torch.tensor([400, 80, 60, 40]))
    noise_ND = 0.08 * torch.randn(len(group_N), 16, generator=drawing)
    return F.normalize(centres_CD[group_N] + noise_ND, dim=1), group_N


def test_shares_fall_from_the_ratio_to_one() -> None:
    shares = imbalance.expected_shares(5, 16)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[-1] == pytest.approx(16)
    torch.testing.assert_close(shares[1:] / shares[:-1], torch.full((4,), 0.5, dtype=torch.float64))
    assert imbalance.enough_entropy(7, 1) == pytest.approx(math.log(7))
    assert imbalance.enough_entropy(7, 10) < imbalance.enough_entropy(7, 3) < math.log(7)


def test_groups_of_any_size_are_found() -> None:
    for seed in range(3):
        features_ND, group_N = uneven_points(seed)
        centres_CD, found_N = uneven_clusters(features_ND, 4, seed)
        assert metrics.oracle(group_N, found_N)["oracle/acc"] > 0.99
        nearest_N = (features_ND @ centres_CD.T / centres_CD.norm(dim=1)).argmax(1)
        assert (nearest_N == found_N).double().mean() > 0.99


def test_starts_are_the_better_ones_of_many_groupings() -> None:
    """Where groupings differ from draw to draw, ACC .80 to .92 here."""
    drawing = torch.Generator().manual_seed(0)
    sizes = torch.tensor([200, 140, 100, 70, 50, 35, 25, 20])
    group_N = torch.repeat_interleave(torch.arange(8), sizes)
    centres_CD = F.normalize(torch.randn(8, 10, generator=drawing), dim=1)
    noise_ND = 0.3 * torch.randn(len(group_N), 10, generator=drawing)
    features_ND = F.normalize(centres_CD[group_N] + noise_ND, dim=1)
    neighbors_NK = mine(features_ND, 10).neighbors_NK

    def acc(centres_CD: Tensor) -> float:
        nearest_N = (features_ND @ F.normalize(centres_CD, dim=1).T).argmax(1)
        return metrics.oracle(group_N, nearest_N)["oracle/acc"]

    drawn = [acc(uneven_clusters(features_ND, 8, seed, starts=1)[0]) for seed in range(12)]
    starts_HCD = uneven_starts(features_ND, neighbors_NK, 8, 10, count=3, seed=0)
    assert starts_HCD.shape == (3, 8, 10)
    kept = [acc(start_CD) for start_CD in starts_HCD]
    assert min(kept) > sorted(drawn)[2]
    assert sum(kept) / 3 > sum(drawn) / 12
    assert torch.equal(starts_HCD, uneven_starts(features_ND, neighbors_NK, 8, 10, 3, seed=0))
    assert len(uneven_starts(features_ND, neighbors_NK, 8, 10, count=33, seed=0)) == 33


def test_equal_rows_and_few_rows() -> None:
    same = torch.ones(9, 4)
    centres, found = uneven_clusters(same, 3, 0)
    assert centres.shape == (3, 4) and centres.isfinite().all() and len(found) == 9
    few, _ = uneven_points(0)
    _, found = uneven_clusters(few[:4], 4, 0)
    assert sorted(found.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("mean", [(0.7, 0.2, 0.1), (0.34, 0.33, 0.33)])
def test_entropy_is_worth_nothing_beyond_what_is_enough(
    mean: tuple[float, ...], tiny: Recipe
) -> None:
    """Against min(H, H*) in float64: value, and no gradient where H is enough."""
    settings = override(tiny, ["train.max_imbalance=3", "train.mined_weight=0"]).train
    drawing = torch.Generator().manual_seed(1)
    logits = torch.tensor(mean, dtype=torch.float64).log().repeat(1, 32, 1)
    logits = logits + 0.05 * torch.randn(1, 32, 3, generator=drawing, dtype=torch.float64)
    logits.requires_grad_()
    p_HBC = logits.softmax(2)
    z = F.normalize(torch.randn(32, 8, generator=drawing), dim=1).double()
    near = neighborhood(z, z, settings)
    found = OBJECTIVES["soft"](Predictions(p_HBC, p_HBC, None), near, settings)["entropy"]
    share_C = p_HBC[0].mean(0)
    entropy = -sum(s * s.log() for s in share_C)
    w_C = [3 ** (-c / 2) for c in range(3)]
    enough = -sum(w / sum(w_C) * math.log(w / sum(w_C)) for w in w_C)
    assert float(found.detach()) == pytest.approx(
        -settings.entropy_weight * min(float(entropy.detach()), enough)
    )
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    if float(entropy.detach()) > enough:
        assert gradient.abs().max() == 0
    else:
        (expected,) = torch.autograd.grad(-settings.entropy_weight * entropy, logits)
        torch.testing.assert_close(gradient, expected)


def test_the_score_does_not_punish_what_is_allowed() -> None:
    clusters = torch.repeat_interleave(torch.arange(3), torch.tensor([100, 32, 10]))
    near = torch.arange(142)[:, None].roll(1, 0)
    strict = metrics.health(clusters, near, 3)
    allowed = metrics.health(clusters, near, 3, max_imbalance=10)
    assert allowed["health/score"] == pytest.approx(allowed["health/neighbor_agreement"], rel=0.01)
    assert strict["health/score"] < 0.9 * allowed["health/score"]
    assert strict["health/balance"] == allowed["health/balance"]


@pytest.mark.parametrize(
    ("balance", "free", "warned"),
    [(1.0, 0.93, True), (0.93, 0.93, False), (0.9, 0.95, False), (1.0, 0.2, False)],
)
def test_forced_balance_is_told(balance: float, free: float, warned: bool) -> None:
    warning = imbalance.forced_warning(imbalance.forced_balance(balance, free))
    assert (warning is not None) == warned
    if warning:
        assert "train.max_imbalance" in warning


def test_only_soft_knows_of_imbalance() -> None:
    with pytest.raises(UserError, match="max_imbalance=4 is for objective=soft"):
        override(recipes.get("digits"), ["train.max_imbalance=4", "train.objective=paper"])
