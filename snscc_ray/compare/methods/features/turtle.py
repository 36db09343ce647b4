"""TURTLE (Gadetsky, Jiang & Brbić, "Let Go of Your Labels with Unsupervised Transfer", ICML 2024).

Search for the labels that linear classifiers learn best: an inner problem trains classifiers on a
task's soft labels, an outer one changes the task. Suffixes as in `snscc_ray.core.losses`; a tuple
or list has one entry per feature space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from snscc_ray.compare.methods.features.inputs import (
    CHUNK,
    Progress,
    check,
    scaled,
    silent,
    uniform_weights,
)
from snscc_ray.compare.rows import features_of
from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.core import rng
from snscc_ray.core.losses import marginal_entropy
from snscc_ray.core.losses.instance import matmul, reduce_rows


@dataclass(frozen=True)
class TurtleSettings:
    """The paper's values, except where a comment says otherwise.

    The exceptions are for runs of minutes on a CPU. A batch must hold many rows per cluster, as
    γ balances its mean label.
    """

    entropy_weight: float = 10.0  # γ
    inner_steps: int = 10  # M
    # Keep the classifiers of the step before. The paper tries both and chooses by a score; from new
    # ones, ten steps learn too little in a narrow space (blobs in 16 dimensions: ACC .6 to .8).
    warm_start: bool = True
    steps: int = 1000  # the authors' code: 6000
    batch_size: int = 1000  # the authors' code: 10,000
    learning_rate: float = 1e-3  # of the task
    inner_learning_rate: float = 1e-3


def soft_cross_entropy(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """The mean over rows of -Σ_c τ_c log softmax(logits)_c. Returns a scalar.

    Both arguments get a gradient. An empty batch gives exactly 0.
    """
    return reduce_rows(-(labels_BC * logits_BC.log_softmax(dim=1)).sum(dim=1), "mean")


def task_labels(
    spaces_BD: Sequence[Tensor],
    directions_CD: Sequence[Tensor],
    lengths_C1: Sequence[Tensor],
    biases_C: Sequence[Tensor],
) -> list[Tensor]:
    """Eq. 9, before the mean over spaces: τ_k = softmax(z_k W_kᵀ + b_k), W_k = g_k v_k / ‖v_k‖.

    v are the directions and g the lengths of weight normalisation. Returns one (B, C) per space.
    """
    return [
        F.linear(z_BD, F.normalize(v_CD, dim=1) * g_C1, b_C).softmax(dim=1)
        for z_BD, v_CD, g_C1, b_C in zip(
            spaces_BD, directions_CD, lengths_C1, biases_C, strict=True
        )
    ]


def mean_label(labels_BC: Sequence[Tensor]) -> Tensor:
    """Eq. 9: the task's label, the mean of the spaces' labels. Returns (B, C)."""
    return torch.stack(list(labels_BC)).mean(dim=0)


def turtle_loss(
    logits_BC: Sequence[Tensor], labels_BC: Sequence[Tensor], entropy_weight: float
) -> Tensor:
    """Eq. 12: Σ_k CE(classifier k, τ) - γ Σ_k H(mean of τ_k), τ the mean of the τ_k. A scalar.

    The entropy keeps the task from a single cluster. The hypergradient is of first order if the
    logits are detached: the classifiers' dependence on the task is ignored.
    """
    label_BC = mean_label(labels_BC)
    errors = [soft_cross_entropy(z_BC, label_BC) for z_BC in logits_BC]
    spread = [marginal_entropy(t_BC) for t_BC in labels_BC]
    return torch.stack(errors).sum() - entropy_weight * torch.stack(spread).sum()


def inner_gradient(
    z_BD: Tensor, labels_BC: Tensor, weight_CD: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of `soft_cross_entropy` in a linear classifier: (C, D) and (C,).

    In closed form: (softmax(z Wᵀ + b) - τ)ᵀ z / B, cheaper than autograd's. Labels must sum to 1.
    An empty batch gives 0.
    """
    p_BC = F.linear(z_BD, weight_CD, bias_C).softmax(dim=1)
    error_BC = (p_BC - labels_BC) / max(len(z_BD), 1)
    return matmul(error_BC.T, z_BD), error_BC.sum(dim=0)


class Classifiers:
    """The inner problem: a linear classifier per space, trained by Adam on soft labels."""

    def __init__(
        self, key: int, widths: Sequence[int], clusters: int, rate: float, device: torch.device
    ) -> None:
        drawing = torch.Generator().manual_seed(key)
        self.weights_CD, self.biases_C = _linear(drawing, widths, clusters, device)
        self.optimizer = torch.optim.Adam([*self.weights_CD, *self.biases_C], lr=rate)

    @torch.no_grad()
    def step(self, spaces_BD: Sequence[Tensor], labels_BC: Tensor) -> None:
        for z_BD, weight_CD, bias_C in zip(spaces_BD, self.weights_CD, self.biases_C, strict=True):
            weight_CD.grad, bias_C.grad = inner_gradient(z_BD, labels_BC, weight_CD, bias_C)
        self.optimizer.step()

    @torch.no_grad()
    def logits(self, spaces_BD: Sequence[Tensor]) -> list[Tensor]:
        return [
            F.linear(z_BD, weight_CD, bias_C)
            for z_BD, weight_CD, bias_C in zip(
                spaces_BD, self.weights_CD, self.biases_C, strict=True
            )
        ]


def turtle_clusters(
    spaces_ND: Sequence[Tensor],
    clusters: int,
    seed_key: int,
    settings: TurtleSettings | None = None,
    progress: Progress = silent,
) -> tuple[Tensor, Tensor]:
    """Cluster rows given in one or more feature spaces: (clusters_N int64, p_NC), on the CPU.

    Raises UserError as `inputs.check`, or if there is no space or they differ in rows or device;
    TrainingError if the loss is not finite.
    """
    settings = settings or TurtleSettings()
    if not spaces_ND:
        raise UserError("no features given: give those of one encoder or more")
    for features_ND in spaces_ND:
        check(features_ND, clusters)
    N, device = len(spaces_ND[0]), spaces_ND[0].device
    if any(len(z_ND) != N or z_ND.device != device for z_ND in spaces_ND):
        raise UserError("the encoders' features differ in their number of images or their device")
    widths = [z_ND.shape[1] for z_ND in spaces_ND]
    drawing = rng.generator(seed_key, "task")
    directions_CD, biases_C = _linear(drawing, widths, clusters, device)
    lengths_C1 = [v_CD.norm(dim=1, keepdim=True) for v_CD in directions_CD]
    task = (directions_CD, lengths_C1, biases_C)
    weights = [weight.requires_grad_() for part in task for weight in part]
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)

    def fresh(step: int) -> Classifiers:
        key = rng.fold(seed_key, "classifiers", step)
        return Classifiers(key, widths, clusters, settings.inner_learning_rate, device)

    B = min(settings.batch_size, N)
    batch_BD = [scaled(z_ND) for z_ND in spaces_ND] if B == N else []
    classifiers = fresh(0)
    loss = torch.zeros(())
    for step in range(settings.steps):
        if B < N:
            order_N = torch.randperm(N, generator=rng.generator(seed_key, "batch", step))
            rows_B = order_N[:B].to(device)
            batch_BD = [scaled(z_ND[rows_B]) for z_ND in spaces_ND]
        if step and not settings.warm_start:
            classifiers = fresh(step)
        labels_BC = task_labels(batch_BD, *task)
        fixed_BC = mean_label(labels_BC).detach()
        for _ in range(settings.inner_steps):
            classifiers.step(batch_BD, fixed_BC)
        loss = turtle_loss(classifiers.logits(batch_BD), labels_BC, settings.entropy_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, settings.steps)
    if not loss.isfinite():
        raise TrainingError("TURTLE's loss is not finite")
    with torch.no_grad():
        parts_BC = [
            mean_label(task_labels([scaled(z_BD) for z_BD in parts_BD], *task)).cpu()
            for parts_BD in zip(*(z_ND.split(CHUNK) for z_ND in spaces_ND), strict=True)
        ]
    p_NC = torch.cat(parts_BC)
    return p_NC.argmax(dim=1), p_NC


def cluster(study: Study) -> MethodResult:
    features, settings = features_of(study), TurtleSettings()
    spaces_ND = features.spaces_ND
    key, progress = study.key("turtle"), partial(study.display.count, "turtle", unit="steps")
    with features.context.few_threads():
        found_N, _ = study.timed(
            lambda: turtle_clusters(spaces_ND, study.clusters, key, settings, progress)
        )
    note = f"{settings.steps:,} steps"
    if len(spaces_ND) > 1:
        note += f" in {len(spaces_ND)} feature spaces"
    return MethodResult(found_N, note=note)


def _linear(
    drawing: torch.Generator, widths: Sequence[int], clusters: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights (C, D) and biases (C,) of a linear layer per space, uniform in ±1/√D."""
    weights_CD, biases_C = [], []
    for D in widths:
        weights_CD.append(uniform_weights(drawing, clusters, D, bound=D**-0.5).to(device))
        biases_C.append(uniform_weights(drawing, clusters, bound=D**-0.5).to(device))
    return weights_CD, biases_C
