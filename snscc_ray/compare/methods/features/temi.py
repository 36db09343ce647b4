"""TEMI (Adaloglou, Michels, Kalisch & Kollmann, "Exploring the Limits of Deep Image Clustering
using Pretrained Models", BMVC 2023).

Heads learn from a momentum teacher that a row and one of its nearest neighbours belong together,
by a weighted pointwise mutual information. Suffixes as in `snscc_ray.core.losses`, and H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from snscc_ray.compare.methods.features.inputs import CHUNK, Progress, check, scaled, silent
from snscc_ray.compare.rows import features_of
from snscc_ray.compare.study import MethodResult, Study
from snscc_ray.config.errors import TrainingError
from snscc_ray.core import rng
from snscc_ray.core.clustering.neighbors import knn
from snscc_ray.core.losses.instance import safe_log, unit_rows


@dataclass(frozen=True)
class TemiSettings:
    """The paper's values, except where a comment says otherwise.

    The exceptions are for runs of minutes on a CPU: fewer steps of smaller heads, so a higher
    learning rate and a teacher that follows faster. A teacher with momentum 0.996 hardly moves in
    so few steps.
    """

    heads: int = 8  # the paper: 50, which a GPU can afford
    neighbors: int = 50
    beta: float = 0.6
    temperature: float = 0.1  # of student and teacher
    teacher_momentum: float = 0.98  # the authors' code: 0.996
    marginal_momentum: float = 0.9
    hidden: int = 256  # the authors' code: 512
    bottleneck: int = 128  # the authors' code: 256
    steps: int = 1000  # the authors' code: 100 epochs
    batch_size: int = 128  # the authors' code: 512 or more
    learning_rate: float = 1e-3  # the authors' code: 1e-4
    warmup: float = 0.2  # share of the steps with a rising learning rate
    weight_decay: float = 1e-4


# Share of the steps, at the end, whose mean loss chooses the head.
_JUDGED = 0.1


def pointwise_information(
    log_student_HBC: Tensor, log_teacher_HBC: Tensor, marginal_HC: Tensor, beta: float
) -> Tensor:
    """pmi(x, x') = log Σ_c (q_s(c|x) q_t(c|x'))^β / q̃(c), with β < 1 against one big cluster.

    The first two are logarithms of the student's prediction for x and the teacher's for x', so
    that no gradient is infinite at a probability of 0. A q̃ below 1e-19 counts as 1e-19. Returns
    (H, B).
    """
    log_HBC = beta * (log_student_HBC + log_teacher_HBC) - safe_log(marginal_HC)[:, None]
    return log_HBC.logsumexp(dim=2)


def instance_weights(teacher1_HBC: Tensor, teacher2_HBC: Tensor) -> Tensor:
    """w(x, x') = Σ_c q_t(c|x) q_t(c|x'), averaged over the heads: low for a doubtful pair.

    Returns (B,), in [0, 1].
    """
    return (teacher1_HBC * teacher2_HBC).sum(dim=2).mean(dim=0)


def temi_loss(
    log_student_HBC: tuple[Tensor, Tensor],
    log_teacher_HBC: tuple[Tensor, Tensor],
    marginal_HC: Tensor,
    weights_B: Tensor,
    beta: float,
) -> Tensor:
    """L = -mean over pairs of w(x, x') (pmi(x, x') + pmi(x', x)) / 2, for each head.

    Each tuple holds the logarithms of the predictions for x and for x'. Returns (H,), exactly 0
    for an empty batch.
    """
    (s1_HBC, s2_HBC), (t1_HBC, t2_HBC) = log_student_HBC, log_teacher_HBC
    there_HB = pointwise_information(s1_HBC, t2_HBC, marginal_HC, beta)
    back_HB = pointwise_information(s2_HBC, t1_HBC, marginal_HC, beta)
    loss_HB = -weights_B * (there_HB + back_HB) / 2
    return loss_HB.sum(dim=1) / max(len(weights_B), 1)


def running_marginal(marginal_HC: Tensor, teacher_HBC: Tensor, momentum: float) -> Tensor:
    """q̃ ← m q̃ + (1 - m) · the teacher's mean prediction in the batch. Returns (H, C).

    An empty batch leaves q̃ as it is.
    """
    if not teacher_HBC.shape[1]:
        return marginal_HC
    return momentum * marginal_HC + (1 - momentum) * teacher_HBC.mean(dim=1)


class Heads:
    """H heads of two layers, side by side in batched tensors.

    A head is: linear, GELU, linear, unit length, linear with weight normalisation.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights

    @classmethod
    def draw(cls, key: int, width: int, clusters: int, settings: TemiSettings) -> Heads:
        """Return heads with small random weights, on the CPU; they depend on the key only."""
        H, hidden, bottleneck = settings.heads, settings.hidden, settings.bottleneck
        drawing = torch.Generator().manual_seed(key)

        def normal(*shape: int) -> Tensor:
            return 0.02 * torch.randn(*shape, generator=drawing)

        return cls(
            [
                normal(width, H * hidden),
                torch.zeros(H * hidden),
                normal(H, hidden, bottleneck),
                torch.zeros(H, 1, bottleneck),
                normal(H, bottleneck, clusters),
                torch.ones(H, 1, clusters),  # the lengths of the last layer's columns
            ]
        )

    def copy(self, device: torch.device) -> Heads:
        return Heads([weight.detach().to(device, copy=True) for weight in self.weights])

    def head(self, index: int) -> Heads:
        """Return one head, as H = 1."""
        first, bias, *others = self.weights
        H = len(others[0])
        part = [first.chunk(H, dim=1)[index], bias.chunk(H)[index]]
        return Heads(part + [weight[index : index + 1] for weight in others])

    def log_probabilities(self, rows_BD: Tensor, temperature: float) -> Tensor:
        """Return log q(c|x), (H, B, C)."""
        first, bias, second, second_bias, directions_HEC, lengths_H1C = self.weights
        hidden_BHF = F.gelu(rows_BD @ first + bias).unflatten(1, (len(second), -1))
        inner_HBE = torch.baddbmm(second_bias, hidden_BHF.transpose(0, 1), second)
        unit_HBE = unit_rows(inner_HBE.flatten(0, 1)).view_as(inner_HBE)
        last_HEC = F.normalize(directions_HEC, dim=1) * lengths_H1C
        return (torch.bmm(unit_HBE, last_HEC) / temperature).log_softmax(dim=2)


def temi_clusters(
    features_ND: Tensor,
    clusters: int,
    seed_key: int,
    settings: TemiSettings | None = None,
    progress: Progress = silent,
) -> tuple[Tensor, Tensor]:
    """Cluster the rows: (clusters_N int64, p_NC float32), on the CPU.

    The result is the teacher of the head with the lowest loss in the last steps. If a row has fewer
    others than `settings.neighbors`, all of them are its neighbours.
    Raises UserError as `inputs.check`, TrainingError if the loss is not finite.
    """
    settings = settings or TemiSettings()
    check(features_ND, clusters)
    N, device = len(features_ND), features_ND.device
    K = min(settings.neighbors, N - 1)
    _, neighbors_NK = knn(unit_rows(features_ND.float()), K)  # of unit rows: nearest by cosine
    student = Heads.draw(
        rng.fold(seed_key, "heads"), features_ND.shape[1], clusters, settings
    ).copy(device)
    teacher = student.copy(device)
    for weight in student.weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(
        student.weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    marginal_HC = torch.full((settings.heads, clusters), 1 / clusters, device=device)
    B, steps = min(settings.batch_size, N), settings.steps
    judged_from = steps - max(round(_JUDGED * steps), 1)
    loss_H = torch.zeros(settings.heads, device=device)
    for step in range(steps):
        # A last small batch of an epoch would sway q̃: its rows wait for the next epoch.
        epoch, place = divmod(step, N // B)
        if place == 0:
            order_N = torch.randperm(N, generator=rng.generator(seed_key, "order", epoch))
            batches_B = order_N.to(device).split(B)
        rows_B = batches_B[place]
        draw_B1 = rng.uniform(rows_B, rng.fold(seed_key, "neighbor", epoch), 1)
        partners_B = neighbors_NK[rows_B].gather(1, (draw_B1 * K).long())[:, 0]
        pairs_PD = scaled(features_ND[torch.cat([rows_B, partners_B])])
        with torch.no_grad():
            log_t_HPC = teacher.log_probabilities(pairs_PD, settings.temperature)
            t_HPC = log_t_HPC.exp()
            marginal_HC = running_marginal(marginal_HC, t_HPC, settings.marginal_momentum)
            weights_B = instance_weights(*_halves(t_HPC))
        log_s_HPC = student.log_probabilities(pairs_PD, settings.temperature)
        now_H = temi_loss(
            _halves(log_s_HPC), _halves(log_t_HPC), marginal_HC, weights_B, settings.beta
        )
        risen = min((step + 1) / max(settings.warmup * steps, 1), 1)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * risen
        optimizer.zero_grad()
        now_H.sum().backward()
        optimizer.step()
        _follow(teacher, student, settings.teacher_momentum)
        if step >= judged_from:
            loss_H += now_H.detach()
        progress(step + 1, steps)
    if not loss_H.isfinite().all():
        raise TrainingError("TEMI's loss is not finite")
    best = teacher.head(int(loss_H.argmin()))
    with torch.no_grad():
        p_NC = torch.cat(
            [
                best.log_probabilities(scaled(part_BD), settings.temperature)[0].exp().cpu()
                for part_BD in features_ND.split(CHUNK)
            ]
        )
    return p_NC.argmax(dim=1), p_NC


def cluster(study: Study) -> MethodResult:
    features, settings = features_of(study), TemiSettings()
    key, progress = study.key("temi"), partial(study.display.count, "temi", unit="steps")
    with features.context.few_threads():
        found_N, _ = study.timed(
            lambda: temi_clusters(features.rows_ND, study.clusters, key, settings, progress)
        )
    return MethodResult(found_N, note=f"{settings.steps:,} steps")


def _halves(pairs_HPC: Tensor) -> tuple[Tensor, Tensor]:
    """Split predictions for rows and then their neighbours, P = 2B."""
    first_HBC, second_HBC = pairs_HPC.chunk(2, dim=1)
    return first_HBC, second_HBC


@torch.no_grad()
def _follow(teacher: Heads, student: Heads, momentum: float) -> None:
    """Move the teacher's weights towards the student's: t ← m t + (1 - m) s."""
    for slow, fast in zip(teacher.weights, student.weights, strict=True):
        slow.lerp_(fast, 1 - momentum)
