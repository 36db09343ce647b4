"""TEMI: its losses against loops, its parts, degenerate features, and groups it must find."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snscc_ray.compare.methods.features import temi
from snscc_ray.compare.methods.features.inputs import check, scaled
from snscc_ray.compare.methods.features.temi import Heads, TemiSettings, temi_clusters
from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.core.clustering import metrics
from tests import reference
from tests.test_losses import rows, same

SMALL = TemiSettings(heads=3, hidden=32, bottleneck=16, steps=200, batch_size=64)
FEW = replace(SMALL, steps=6, batch_size=8, neighbors=3)
SIZES = [(1, 1, 2), (2, 5, 3), (3, 4, 6)]  # H, B, C


def blobs(seed: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Three groups of 120 rows with noise of .03, .08 and .15 per number, and which is whose."""
    drawing = torch.Generator().manual_seed(seed)
    centres_CD = F.normalize(torch.randn(3, width, generator=drawing), dim=1)
    group_N = torch.arange(3).repeat_interleave(120)
    noise_N1 = torch.tensor([0.03, 0.08, 0.15])[group_N, None]
    return centres_CD[group_N] + noise_N1 * torch.randn(360, width, generator=drawing), group_N


def slow_information(s_C: Tensor, t_C: Tensor, marginal_C: Tensor, beta: float) -> Tensor:
    total = reference.zero_like(s_C)
    for s, t, q in zip(s_C, t_C, marginal_C, strict=True):
        total = total + (s * t) ** beta / q
    return total.log()


def slow_weight(t1_HC: Tensor, t2_HC: Tensor) -> Tensor:
    heads = [reference.dot(t1_C, t2_C) for t1_C, t2_C in zip(t1_HC, t2_HC, strict=True)]
    return reference.mean(heads, t1_HC)


def slow_loss(
    s1_HBC: Tensor, s2_HBC: Tensor, t1_HBC: Tensor, t2_HBC: Tensor, q_HC: Tensor, beta: float
) -> Tensor:
    """Of probabilities; the weights are the teacher's own."""
    H, B, _ = s1_HBC.shape
    losses = []
    for h in range(H):
        pairs = []
        for i in range(B):
            there = slow_information(s1_HBC[h, i], t2_HBC[h, i], q_HC[h], beta)
            back = slow_information(s2_HBC[h, i], t1_HBC[h, i], q_HC[h], beta)
            w = slow_weight(t1_HBC[:, i], t2_HBC[:, i])
            pairs.append(-w * (there + back) / 2)
        losses.append(reference.mean(pairs, s1_HBC))
    return torch.stack(losses)


def logits(size: tuple[int, int, int], seed: int, scale: float) -> Tensor:
    H, B, C = size
    return scale * rows(H, B, C, seed=seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", [0.6, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])  # uniform to nearly one-hot
def test_loss_is_the_papers(size: tuple[int, int, int], beta: float, scale: float) -> None:
    t1_HBC, t2_HBC = (logits(size, seed, scale).softmax(2) for seed in (3, 4))
    q_HC = logits(size, 5, 1.0).mean(1).softmax(1)

    def ours(s1: Tensor, s2: Tensor) -> Tensor:
        students = s1.log_softmax(2), s2.log_softmax(2)
        w_B = temi.instance_weights(t1_HBC, t2_HBC)
        return temi.temi_loss(students, (t1_HBC.log(), t2_HBC.log()), q_HC, w_B, beta).sum()

    def theirs(s1: Tensor, s2: Tensor) -> Tensor:
        return slow_loss(s1.softmax(2), s2.softmax(2), t1_HBC, t2_HBC, q_HC, beta).sum()

    same(ours, theirs, logits(size, 1, scale), logits(size, 2, scale))


def test_loss_is_of_each_head_and_symmetric() -> None:
    size = (3, 4, 5)
    s1, s2, t1, t2 = (logits(size, seed, 1.0).log_softmax(2) for seed in range(4))
    q_HC = logits(size, 5, 1.0).mean(1).softmax(1)
    w_B = temi.instance_weights(t1.exp(), t2.exp())
    loss_H = temi.temi_loss((s1, s2), (t1, t2), q_HC, w_B, 0.6)
    expected_H = slow_loss(s1.exp(), s2.exp(), t1.exp(), t2.exp(), q_HC, 0.6)
    torch.testing.assert_close(loss_H, expected_H)
    torch.testing.assert_close(loss_H, temi.temi_loss((s2, s1), (t2, t1), q_HC, w_B, 0.6))


def test_loss_survives_impossible_pairs_and_empty_batches() -> None:
    """Student and teacher certain of different clusters, and a cluster that q̃ calls impossible."""
    certain = torch.tensor([[[300.0, 0.0]]], requires_grad=True)
    other = torch.tensor([[[0.0, 300.0]]]).log_softmax(2)
    s, q_HC, w_B = certain.log_softmax(2), torch.tensor([[1.0, 0.0]]), torch.ones(1)
    loss_H = temi.temi_loss((s, s), (other, other), q_HC, w_B, 0.6)
    loss_H.sum().backward()
    assert loss_H.isfinite().all() and certain.grad is not None and certain.grad.isfinite().all()
    none = torch.zeros(2, 0, 3, requires_grad=True)
    loss_H = temi.temi_loss((none, none), (none, none), torch.ones(2, 3) / 3, torch.ones(0), 0.6)
    assert loss_H.tolist() == [0, 0]


def test_balanced_certain_heads_have_the_lowest_loss() -> None:
    C = 4

    def loss(p_BC: Tensor) -> float:
        log_HBC = p_BC.log().clamp(min=-100)[None]
        pair, q_HC = (log_HBC, log_HBC), p_BC.mean(0, keepdim=True)
        return float(temi.temi_loss(pair, pair, q_HC, torch.ones(len(p_BC)), 0.6))

    balanced, uniform = loss(torch.eye(C)), loss(torch.full((C, C), 1 / C))
    assert balanced == pytest.approx(-math.log(C), abs=1e-5)
    assert uniform == pytest.approx(-0.8 * math.log(C), abs=1e-5)
    assert balanced < uniform < loss(torch.eye(C)[[0] * C])


@pytest.mark.parametrize("size", SIZES)
def test_instance_weights(size: tuple[int, int, int]) -> None:
    t1_HBC, t2_HBC = (logits(size, seed, 2.0).softmax(2) for seed in (1, 2))
    w_B = temi.instance_weights(t1_HBC, t2_HBC)
    expected = [slow_weight(t1_HBC[:, i], t2_HBC[:, i]) for i in range(size[1])]
    torch.testing.assert_close(w_B, torch.stack(expected))
    sure = torch.eye(3)[None]
    assert temi.instance_weights(sure, sure).tolist() == [1, 1, 1]
    assert temi.instance_weights(sure, sure.roll(1, 1)).tolist() == [0, 0, 0]


def test_running_marginal() -> None:
    q_HC = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    expected_HC = q_HC.clone()
    for seed in range(5):
        t_HBC = logits((2, 7, 3), seed, 2.0).softmax(2)
        q_HC = temi.running_marginal(q_HC, t_HBC, 0.9)
        for h in range(2):
            for c in range(3):
                batch = reference.mean(list(t_HBC[h, :, c]), t_HBC)
                expected_HC[h, c] = 0.9 * expected_HC[h, c] + 0.1 * batch
    torch.testing.assert_close(q_HC, expected_HC)
    torch.testing.assert_close(q_HC.sum(1), torch.ones(2, dtype=torch.float64))
    assert temi.running_marginal(q_HC, torch.zeros(2, 0, 3), 0.9) is q_HC


def test_heads_are_what_their_docstring_says() -> None:
    heads = Heads.draw(1, 6, 4, FEW)
    x_BD = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    log_HBC = heads.log_probabilities(x_BD, 0.1)
    for h in range(FEW.heads):
        columns = slice(h * FEW.hidden, (h + 1) * FEW.hidden)
        first, bias = heads.weights[0][:, columns], heads.weights[1][columns]
        second, second_bias, v_EC, g_C = (weight[h] for weight in heads.weights[2:])
        inner_BE = F.gelu(x_BD @ first + bias) @ second + second_bias
        weight_EC = v_EC / v_EC.norm(dim=0) * g_C
        out_BC = inner_BE / inner_BE.norm(dim=1, keepdim=True) @ weight_EC / 0.1
        torch.testing.assert_close(log_HBC[h], out_BC.log_softmax(1))
        torch.testing.assert_close(heads.head(h).log_probabilities(x_BD, 0.1)[0], log_HBC[h])


def test_the_teacher_follows() -> None:
    student, teacher = Heads.draw(1, 6, 4, FEW), Heads.draw(2, 6, 4, FEW)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.weights, student.weights, strict=True)]
    temi._follow(teacher, student, 0.9)
    for weight, moved in zip(teacher.weights, expected, strict=True):
        torch.testing.assert_close(weight, moved)


def test_features_are_scaled_by_row() -> None:
    x_BD = torch.cat([rows(3, 8).float(), torch.zeros(1, 8)])
    torch.testing.assert_close(scaled(x_BD).norm(dim=1), torch.tensor([8**0.5] * 3 + [0.0]))
    torch.testing.assert_close(scaled(7 * x_BD), scaled(x_BD))


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_found(seed: int) -> None:
    features_ND, group_N = blobs(seed)
    clusters_N, p_NC = temi_clusters(features_ND, 3, seed, SMALL)
    assert metrics.oracle(group_N, clusters_N)["oracle/acc"] > 0.95
    assert clusters_N.dtype == torch.int64 and p_NC.shape == (360, 3)
    torch.testing.assert_close(p_NC.sum(1), torch.ones(360))
    assert torch.equal(p_NC.argmax(1), clusters_N)


def test_the_same_key_gives_the_same_result() -> None:
    features_ND, _ = blobs(0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    _, first_NC = temi_clusters(features_ND, 3, 7, FEW)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    torch.manual_seed(2)
    _, again_NC = temi_clusters(features_ND, 3, 7, FEW)
    _, other_NC = temi_clusters(features_ND, 3, 8, FEW)
    assert torch.equal(first_NC, again_NC) and not torch.equal(first_NC, other_NC)
    assert not first_NC.requires_grad


def test_the_features_are_left_alone_and_progress_is_told() -> None:
    features_ND = blobs(0)[0].half()
    before_ND, told = features_ND.clone(), []
    temi_clusters(features_ND, 3, 0, FEW, lambda done, steps: told.append((done, steps)))
    assert torch.equal(features_ND, before_ND) and not features_ND.requires_grad
    assert told == [(step, FEW.steps) for step in range(1, FEW.steps + 1)]


@pytest.mark.parametrize(
    ("features_ND", "clusters"),
    [
        (torch.ones(20, 4), 2),  # all the same
        (torch.zeros(20, 4), 3),
        (torch.eye(4).repeat(5, 1), 9),  # more clusters than groups
        (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), 2),  # few neighbours
        (torch.randn(2, 1, generator=torch.Generator().manual_seed(0)), 2),
        (1e30 * torch.eye(6), 2),
    ],
)
def test_degenerate_features_give_a_result(features_ND: Tensor, clusters: int) -> None:
    settings = replace(FEW, steps=40, neighbors=50)
    clusters_N, p_NC = temi_clusters(features_ND, clusters, 0, settings)
    assert p_NC.isfinite().all() and clusters_N.min() >= 0 and clusters_N.max() < clusters


@pytest.mark.parametrize(
    ("features_ND", "clusters", "message"),
    [
        (torch.ones(9, 4), 1, "at least 2"),
        (torch.ones(3, 4), 4, "3 images cannot form 4 clusters"),
        (torch.ones(0, 4), 2, "0 images"),
        (torch.ones(9), 2, "must be a table"),
        (torch.ones(9, 0), 2, "must be a table"),
        (torch.full((9, 4), torch.nan), 2, "NaN"),
        (torch.full((9, 4), torch.inf), 2, "NaN"),
    ],
)
def test_what_cannot_be_clustered_is_refused(
    features_ND: Tensor, clusters: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(features_ND, clusters)
    with pytest.raises(UserError, match=message):
        temi_clusters(features_ND, clusters, 0, FEW)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        temi_clusters(blobs(0)[0], 3, 0, replace(FEW, learning_rate=math.inf))


def test_no_labels_are_read() -> None:
    assert not [name for name in inspect.signature(temi_clusters).parameters if "label" in name]


@pytest.mark.parametrize("best", range(FEW.heads))
def test_the_head_with_the_lowest_loss_is_kept(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, head, kept = temi.temi_loss, Heads.head, []
    bonus_H = torch.zeros(FEW.heads)
    bonus_H[best] = 100

    def keep(heads: Heads, index: int) -> Heads:
        kept.append(index)
        return head(heads, index)

    monkeypatch.setattr(temi, "temi_loss", lambda *inputs: loss(*inputs) - bonus_H)
    monkeypatch.setattr(Heads, "head", keep)
    temi_clusters(blobs(0)[0], 3, 0, FEW)
    assert kept == [best]
