"""TURTLE: its losses against loops, its inner step, degenerate features, groups it must find."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from snscc_ray.compare.methods.features import turtle
from snscc_ray.compare.methods.features.turtle import (
    Classifiers,
    TurtleSettings,
    inner_gradient,
    turtle_clusters,
)
from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.core.clustering import metrics
from tests import reference
from tests.test_losses import CASES, probabilities, rows, same
from tests.test_temi import blobs

SMALL = TurtleSettings(steps=150, batch_size=200, learning_rate=3e-3, inner_learning_rate=3e-3)
FEW = replace(SMALL, steps=5, batch_size=20)
SIZES = [(1, 2), (5, 3), (8, 6)]  # B, C


def slow_softmax(logits_C: Tensor) -> Tensor:
    total = reference.zero_like(logits_C)
    for value in logits_C:
        total = total + value.exp()
    return logits_C.exp() / total


def slow_cross_entropy(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    losses = []
    for logits_C, label_C in zip(logits_BC, labels_BC, strict=True):
        p_C = slow_softmax(logits_C)
        losses.append(-reference.dot(label_C, p_C.log()))
    return reference.mean(losses, logits_BC)


def slow_entropy(labels_BC: Tensor) -> Tensor:
    total = reference.zero_like(labels_BC)
    for label_B in labels_BC.T:
        share = reference.mean(list(label_B), labels_BC)
        total = total - share * reference.log(share)
    return total


def slow_labels(z_BD: Tensor, v_CD: Tensor, g_C1: Tensor, b_C: Tensor) -> Tensor:
    labels = []
    for z_D in z_BD:
        values = [
            reference.dot(z_D, v_D) * g_1[0] / reference.dot(v_D, v_D).sqrt() + b
            for v_D, g_1, b in zip(v_CD, g_C1, b_C, strict=True)
        ]
        labels.append(slow_softmax(torch.stack(values)))
    return torch.stack(labels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_soft_cross_entropy(size: tuple[int, int], case: str) -> None:
    B, C = size
    labels = probabilities(case, B, C, 1)
    same(turtle.soft_cross_entropy, slow_cross_entropy, rows(B, C, seed=2), labels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spaces", [1, 2, 3])
def test_loss_is_the_papers(size: tuple[int, int], spaces: int) -> None:
    B, C = size
    logits = [rows(B, C, seed=seed) for seed in range(spaces)]

    def ours(*labels: Tensor) -> Tensor:
        return turtle.turtle_loss(logits, [label.softmax(1) for label in labels], 10.0)

    def theirs(*labels: Tensor) -> Tensor:
        soft = [torch.stack([slow_softmax(row_C) for row_C in label]) for label in labels]
        total = reference.zero_like(logits[0])
        label_BC = reference.mean(soft, soft[0])
        for logits_BC, label in zip(logits, soft, strict=True):
            error = slow_cross_entropy(logits_BC, label_BC)
            total = total + error - 10.0 * slow_entropy(label)
        return total

    same(ours, theirs, *(rows(B, C, seed=10 + seed) for seed in range(spaces)))


@pytest.mark.parametrize("size", SIZES)
def test_task_labels_are_weight_normalised(size: tuple[int, int]) -> None:
    B, C = size
    z = rows(B, 4, seed=0)

    def squares(of: Tensor) -> Tensor:
        return (of.square() * torch.arange(1, C + 1)).sum()

    same(
        lambda v, g, b: squares(turtle.task_labels([z], [v], [g], [b])[0]),
        lambda v, g, b: squares(slow_labels(z, v, g, b)),
        rows(C, 4, seed=1),
        rows(C, 1, seed=2),
        rows(C, seed=3),
    )


def test_an_empty_batch_costs_nothing() -> None:
    none = torch.zeros(0, 3, requires_grad=True)
    assert turtle.soft_cross_entropy(none, none) == 0
    assert turtle.turtle_loss([none], [none], 10.0) == 0
    weight, bias = inner_gradient(torch.zeros(0, 4), none.detach(), torch.ones(3, 4), torch.ones(3))
    assert not weight.any() and not bias.any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_inner_gradient_is_autograds(size: tuple[int, int], case: str) -> None:
    B, C = size
    z, labels = rows(B, 4, seed=0), probabilities(case, B, C, 1)
    weight, bias = rows(C, 4, seed=2).requires_grad_(), rows(C, seed=3).requires_grad_()
    logits = [
        torch.stack([reference.dot(z_D, w_D) + b for w_D, b in zip(weight, bias, strict=True)])
        for z_D in z
    ]
    expected = torch.autograd.grad(slow_cross_entropy(torch.stack(logits), labels), [weight, bias])
    for ours, theirs in zip(
        inner_gradient(z, labels, weight.detach(), bias.detach()), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_inner_steps_are_adams_on_autograds_gradient() -> None:
    """Adam by its paper's formulas (Kingma & Ba, ICLR 2015), in two spaces."""
    spaces, labels = [rows(9, 4, seed=0).float(), rows(9, 2, seed=1).float()], rows(9, 3, seed=2)
    labels = labels.softmax(1).float()
    classifiers = Classifiers(5, [4, 2], 3, 0.01, torch.device("cpu"))
    weights = [w.clone().double() for w in (*classifiers.weights_CD, *classifiers.biases_C)]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(1, 6):
        classifiers.step(spaces, labels)
        leaves = [w.requires_grad_() for w in weights]
        loss = sum(
            slow_cross_entropy(z.double() @ leaves[k].T + leaves[2 + k], labels.double())
            for k, z in enumerate(spaces)
        )
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, leaves)
        for index, gradient in enumerate(gradients):
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            m, v = first[index] / (1 - 0.9**step), second[index] / (1 - 0.999**step)
            weights[index] = weights[index].detach() - 0.01 * m / (v.sqrt() + 1e-8)
    trained = (*classifiers.weights_CD, *classifiers.biases_C)
    for ours, theirs in zip(trained, weights, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_the_hypergradient_is_of_first_order() -> None:
    """The classifiers' logits carry no gradient, although they were trained on the task."""
    z, labels = rows(6, 4, seed=0).float(), rows(6, 3, seed=1).float().requires_grad_()
    classifiers = Classifiers(0, [4], 3, 0.01, torch.device("cpu"))
    classifiers.step([z], labels.softmax(1).detach())
    (logits_BC,) = classifiers.logits([z])
    assert not logits_BC.requires_grad
    loss = turtle.turtle_loss([logits_BC], [labels.softmax(1)], 0.0)
    (gradient,) = torch.autograd.grad(loss, labels)
    tau = labels.softmax(1).detach()
    cost = -logits_BC.log_softmax(1)
    by_hand = tau * (cost - (tau * cost).sum(1, keepdim=True)) / 6
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_found(seed: int) -> None:
    features_ND, group_N = blobs(seed)
    clusters_N, p_NC = turtle_clusters([features_ND], 3, seed, SMALL)
    assert metrics.oracle(group_N, clusters_N)["oracle/acc"] > 0.95
    assert clusters_N.dtype == torch.int64 and p_NC.shape == (360, 3)
    torch.testing.assert_close(p_NC.sum(1), torch.ones(360))
    assert torch.equal(p_NC.argmax(1), clusters_N)


def test_groups_are_found_in_two_spaces_and_from_new_classifiers() -> None:
    features_ND, group_N = blobs(0)
    spaces = [features_ND, features_ND[:, :7] * 30]
    rate = 0.01  # new classifiers learn too little at the paper's in 16 dimensions
    cold = replace(SMALL, warm_start=False, learning_rate=rate, inner_learning_rate=rate)
    for settings in (SMALL, cold):
        clusters_N, _ = turtle_clusters(spaces, 3, 0, settings)
        assert metrics.oracle(group_N, clusters_N)["oracle/acc"] > 0.95


def test_the_same_key_gives_the_same_result() -> None:
    features_ND, _ = blobs(0)
    for settings in (FEW, replace(FEW, warm_start=False), replace(FEW, batch_size=1000)):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        _, first_NC = turtle_clusters([features_ND], 3, 7, settings)
        assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
        torch.manual_seed(2)
        _, again_NC = turtle_clusters([features_ND], 3, 7, settings)
        _, other_NC = turtle_clusters([features_ND], 3, 8, settings)
        assert torch.equal(first_NC, again_NC) and not torch.equal(first_NC, other_NC)
        assert not first_NC.requires_grad


def test_the_features_are_left_alone_and_progress_is_told() -> None:
    features_ND = blobs(0)[0].half()
    before_ND, told = features_ND.clone(), []
    turtle_clusters([features_ND], 3, 0, FEW, lambda done, steps: told.append((done, steps)))
    assert torch.equal(features_ND, before_ND) and not features_ND.requires_grad
    assert told == [(step, FEW.steps) for step in range(1, FEW.steps + 1)]


@pytest.mark.parametrize(
    ("features_ND", "clusters"),
    [
        (torch.ones(20, 4), 2),  # all the same
        (torch.zeros(20, 4), 3),
        (torch.eye(4).repeat(5, 1), 9),  # more clusters than groups
        (torch.randn(2, 1, generator=torch.Generator().manual_seed(0)), 2),
        (1e30 * torch.eye(6), 2),
    ],
)
def test_degenerate_features_give_a_result(features_ND: Tensor, clusters: int) -> None:
    settings = replace(SMALL, steps=40, learning_rate=0.1, inner_learning_rate=0.1)
    clusters_N, p_NC = turtle_clusters([features_ND], clusters, 0, settings)
    assert p_NC.isfinite().all() and clusters_N.min() >= 0 and clusters_N.max() < clusters


@pytest.mark.parametrize(
    ("spaces", "clusters", "message"),
    [
        ([], 2, "no features"),
        ([torch.ones(9, 4)], 1, "at least 2"),
        ([torch.ones(3, 4)], 4, "3 images cannot form 4 clusters"),
        ([torch.ones(9, 4), torch.ones(8, 4)], 2, "differ in their number"),
        ([torch.ones(9, 4), torch.full((9, 2), torch.nan)], 2, "NaN"),
    ],
)
def test_what_cannot_be_clustered_is_refused(
    spaces: list[Tensor], clusters: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        turtle_clusters(spaces, clusters, 0, FEW)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        turtle_clusters([blobs(0)[0]], 3, 0, replace(FEW, learning_rate=math.inf))


def test_no_labels_are_read() -> None:
    assert "spaces_ND" in inspect.signature(turtle_clusters).parameters
    assert not [name for name in inspect.signature(turtle_clusters).parameters if "label" in name]
