"""Each loss against its loop in reference.py: values, gradients, degenerate batches, direction."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snscc_ray.core import losses
from snscc_ray.core.clustering.neighbors import batch_neighbors, global_radius, local_radius
from tests import reference

Loss = Callable[..., Tensor]
SHAPES = [(2, 2, 3, 1), (5, 3, 4, 2), (7, 4, 2, 7), (9, 3, 5, 40)]  # B, C, D, K; also K >= B
CASES = ["random", "duplicates", "one_hot", "uniform", "nearly_one_hot"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def probabilities(case: str, B: int, C: int, seed: int) -> Tensor:
    if case == "one_hot":
        return torch.eye(C, dtype=torch.float64)[torch.arange(seed, seed + B) % C]
    if case == "uniform":
        return torch.full((B, C), 1 / C, dtype=torch.float64)
    return (rows(B, C, seed=seed) * (12 if case == "nearly_one_hot" else 1)).softmax(dim=1)


def features(case: str, B: int, D: int, seed: int) -> Tensor:
    z = torch.nn.functional.normalize(rows(B, D, seed=seed))
    if case == "duplicates":
        z[-1] = z[0]
    return z


def batch(case: str, B: int, C: int, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, its augmented view's q, z and its augmented view's z'; the last view is a duplicate."""
    z, zaug = features(case, B, D, 3), features(case, B, D, 4)
    if case == "duplicates":
        zaug[1] = z[1]
    return probabilities(case, B, C, 1), probabilities(case, B, C, 2), z, zaug


def same(ours: Loss, theirs: Loss, *inputs: Tensor) -> None:
    """Values to 1e-10, gradients to 1e-8."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves) + 0 * sum(leaf.sum() for leaf in leaves)  # always in the graph
        grads = torch.autograd.grad(value, leaves)
        results.append((value.detach(), grads))
    (value, grads), (expected, expected_grads) = results
    assert value.isfinite()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8)


def local_soft(p: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    d, idx = batch_neighbors(z, z, k, same_rows=True)
    return losses.agreement(p, p, idx), losses.soft_confidence(d, local_radius(d))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["random", "duplicates"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_eq1(shape: tuple[int, ...], case: str, temperature: float) -> None:
    B, _, D, _ = shape
    z1, z2 = 3 * features(case, B, D, 5), features(case, B, D, 6)  # lengths must not matter
    same(
        lambda a, b: losses.nt_xent(a, b, temperature),
        lambda a, b: reference.eq1(a, b, temperature),
        z1,
        z2,
    )
    ours = losses.nt_xent(z1, z2, temperature, "none")
    torch.testing.assert_close(ours, torch.stack(reference.eq1_rows(z1, z2, temperature)))


@pytest.mark.parametrize("M", [1, 6])
def test_info_nce(M: int) -> None:
    same(
        lambda q, k, n: losses.info_nce(q, k, n, 0.2),
        lambda q, k, n: reference.info_nce(q, k, n, 0.2),
        rows(4, 3, seed=1),
        rows(4, 3, seed=2),
        rows(M, 3, seed=3),
    )


@pytest.mark.parametrize("B", [1, 5])
def test_byol(B: int) -> None:
    q1, q2, t1, t2 = (rows(B, 3, seed=seed) for seed in range(4))
    q1[0] = 0  # no direction: cosine 0, no gradient
    same(
        losses.byol_loss,
        lambda *x: reference.mean(reference.byol_rows(*x), x[0]),
        q1,
        q2,
        5 * t1,  # lengths must not matter
        t2,
    )
    ours = losses.byol_loss(q1, q2, t1, t2, "none")
    torch.testing.assert_close(ours, torch.stack(reference.byol_rows(q1, q2, t1, t2)))


def test_byol_by_hand() -> None:
    """Each prediction is held against the other view's target, not its own."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert losses.byol_loss(x, y, y, x).item() == 0
    assert losses.byol_loss(x, y, x, y).item() == 4
    assert losses.byol_loss(-x, -y, y, x).item() == 8


def test_confidence_of_eq2_by_hand() -> None:
    d = torch.tensor([[1.0, 1.25, 2.0, 9.0], [0.0, 0.0, 1e-9, torch.inf], [torch.inf] * 4])
    r = torch.tensor([1.0, 0.0, torch.inf])
    expected = torch.tensor([[1, 0.75, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(losses.soft_confidence(d, r), expected)


def test_a_nan_distance_is_not_hidden() -> None:
    assert losses.soft_confidence(torch.tensor([[torch.nan]]), torch.tensor([1.0])).isnan().all()
    assert losses.soft_confidence(torch.tensor([[1.0]]), torch.tensor([torch.nan])).isnan().all()


def test_confidence_gradient() -> None:
    d, r = torch.tensor([[1.25, 1.5, 3.0]], dtype=torch.float64), torch.tensor([1.0]).double()
    assert torch.autograd.gradcheck(
        losses.soft_confidence, (d.requires_grad_(), r.requires_grad_())
    )


distances = st.floats(0, 2.0**100, width=32, allow_subnormal=False) | st.just(float("inf"))


@settings(max_examples=200, deadline=None)
@given(st.lists(distances, min_size=1, max_size=6), distances)
def test_confidence_is_a_finite_decreasing_share(values: list[float], radius: float) -> None:
    d = torch.tensor([sorted(values)], requires_grad=True)
    r = torch.tensor([radius], requires_grad=True)
    s = losses.soft_confidence(d, r)
    assert ((s >= 0) & (s <= 1)).all()
    assert (s.diff() <= 0).all()
    s.sum().backward()
    assert d.grad is not None and d.grad.isfinite().all()
    assert r.grad is not None and r.grad.isfinite().all()
    finite = [x for x in sorted(values) if math.isfinite(x)]
    if math.isfinite(radius):
        expected = [reference.eq2(x, radius) for x in finite]
        torch.testing.assert_close(s[0, : len(finite)].tolist(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_eqs_3_and_attract(shape: tuple[int, ...], case: str) -> None:
    B, C, D, K = shape
    p, _, z, _ = batch(case, B, C, D)
    same(
        lambda p: losses.soft_bce(*local_soft(p, z, K)),
        lambda p: reference.eq3(p, z, K),
        p,
    )
    for kind in ("linear", "log"):
        same(
            lambda p, kind=kind: losses.soft_attract(*local_soft(p, z, K), kind),
            lambda p, kind=kind: reference.attract(p, z, K, kind),
            p,
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_eq6(shape: tuple[int, ...], case: str) -> None:
    B, C, D, K = shape
    p, q, z, zaug = batch(case, B, C, D)

    def ours(p: Tensor, q: Tensor) -> Tensor:
        d, idx = batch_neighbors(z, zaug, K, same_rows=False)
        s = losses.soft_confidence(d, global_radius(z, zaug))
        return losses.soft_bce(losses.agreement(p, q, idx), s)

    same(ours, lambda p, q: reference.eq6(p, q, z, zaug, K), p, q)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_eqs_7_to_9(shape: tuple[int, ...], case: str) -> None:
    B, C, D, _ = shape
    p, q, _, _ = batch(case, B, C, D)
    for temperature in (0.5, 1.0):
        same(
            lambda p, q, t=temperature: losses.cluster_contrast(p, q, t),
            lambda p, q, t=temperature: reference.eq7(p, q, t),
            p,
            q,
        )
    same(losses.one_way_column_contrast, reference.one_way, p, q)
    same(losses.row_entropy, reference.eq8, p)
    same(losses.marginal_entropy, reference.eq8_marginal, p)
    same(
        lambda p, q: losses.cluster_contrast(p, q, 1.0) - 5 * losses.row_entropy(p),
        lambda p, q: reference.eq9(p, q, 1.0, 5.0),
        p,
        q,
    )


LABELS = {
    2: [[0, 0], [0, 1], [-1, -1]],
    5: [[0, 0, 1, -1, 0], [2, -1, -1, -1, -1]],
    7: [[0, 0, 0, 1, 1, 1, 1], [3, -1, 3, -1, 0, 1, 3]],
    9: [[0, 1, 2] * 3, [-1] * 8 + [0]],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_eqs_12_and_13(shape: tuple[int, ...], case: str) -> None:
    B, C, D, K = shape
    p, _, z, _ = batch(case, B, C, D)
    for labels in LABELS[B]:
        labels = [min(y, C - 1) for y in labels]
        y = torch.tensor(labels)

        def ours(p: Tensor, y: Tensor = y) -> Tensor:
            allowed = losses.same_label_pairs(y, y)
            d, idx = batch_neighbors(z, z, K, same_rows=True, allowed_BM=allowed)
            return losses.boost_soft_loss(losses.agreement(p, p, idx), d, "bce")

        same(ours, lambda p, labels=labels: reference.eq12(p, z, labels, K), p)
        same(
            lambda x, y=y: losses.pseudo_label_cross_entropy(x, y),
            lambda x, labels=labels: reference.eq13(x, labels),
            10 * p,
        )


def test_boost_attracts_only_the_same_label() -> None:
    z, y = features("random", 6, 3, 1), torch.tensor([0, 0, 0, 1, 1, -1])
    p = probabilities("random", 6, 3, 1).requires_grad_()
    allowed = losses.same_label_pairs(y, y)
    d, idx = batch_neighbors(z, z, 4, same_rows=True, allowed_BM=allowed)
    same = y[idx] == y[:, None]
    assert bool(same[d.isfinite()].all())  # every neighbour has the same label
    assert d.isfinite().sum(dim=1).tolist() == [2, 2, 2, 1, 1, 0]
    per_row = losses.boost_soft_loss(losses.agreement(p, p, idx), d, "linear", "none")
    assert per_row[5] == 0 and (per_row[:5] < 0).all()
    # Two rows alone with each other have confidence 1, so their loss is their agreement.
    torch.testing.assert_close(per_row[3], -(p[3] @ p[4]))
    (grad,) = torch.autograd.grad(per_row.sum(), p)
    assert (grad[5] == 0).all() and (grad[:5] != 0).all()


def test_masks() -> None:
    o, s = torch.rand(4, 5).double(), torch.rand(4, 5).double()
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2] = False
    bce = losses.soft_bce(o, s, mask, "none")
    attract = losses.soft_attract(o, s, "log", mask, "none")
    assert bce[2] == 0 and attract[2] == 0
    for i in (0, 1, 3):
        chosen = o[i : i + 1, mask[i]], s[i : i + 1, mask[i]]
        torch.testing.assert_close(bce[i], losses.soft_bce(*chosen))
        torch.testing.assert_close(attract[i], losses.soft_attract(*chosen, "log"))
    torch.testing.assert_close(losses.soft_bce(o, s, mask), bce.mean())
    # The row without weight is not in the mean's divisor.
    torch.testing.assert_close(losses.soft_attract(o, s, "log", mask), attract.sum() / 3)


def test_soft_bce_at_the_ends() -> None:
    o = torch.tensor([[0.0], [1.0], [0.0], [1.0]], requires_grad=True)
    s = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    loss = losses.soft_bce(o, s, reduction="none")
    assert loss[:2].tolist() == [0, 0]
    assert (loss[2:] > 40).all() and loss.isfinite().all()
    loss.sum().backward()
    assert o.grad is not None and o.grad.isfinite().all()


def test_small_agreements_keep_their_gradient() -> None:
    """Two rows sure of different clusters in float32: pulled together, not given up."""
    logits = torch.tensor([[20.0, 0.0], [0.0, 20.0]], requires_grad=True)
    p = logits.softmax(dim=1)
    o = (p[0] * p[1]).sum().reshape(1, 1)
    losses.soft_attract(o, torch.ones(1, 1), "log").backward()
    assert logits.grad is not None and logits.grad.abs().min() > 0.1


def test_released_pieces() -> None:
    o, w = torch.tensor([[0.9, 0.2]]), torch.tensor([[1.0, 0.25]])
    torch.testing.assert_close(
        losses.batch_pair_term(o, w), torch.tensor((0.9 + 0.25 * 0.2 + 0.75 * 0.8) / 2)
    )
    torch.testing.assert_close(
        losses.soft_attract(o[:, :1], w[:, :1], "log"), torch.tensor(-math.log(0.9))
    )


E64 = torch.empty(0, 3, dtype=torch.float64)
ZEROS = torch.zeros(2, 3, dtype=torch.float64)
NONE = torch.tensor([-1, -1])
DEGENERATE: dict[str, tuple[Loss, tuple[Tensor, ...]]] = {
    "nt_xent, no rows": (lambda a, b: losses.nt_xent(a, b, 0.5), (E64, E64)),
    "nt_xent, one row": (lambda a, b: losses.nt_xent(a, b, 0.5), (rows(1, 3), rows(1, 3, seed=1))),
    "info_nce, no rows": (lambda a, b, m: losses.info_nce(a, b, m, 0.5), (E64, E64, rows(4, 3))),
    "info_nce, no queue": (
        lambda a, b, m: losses.info_nce(a, b, m, 0.5),
        (rows(2, 3), rows(2, 3), E64),
    ),
    "byol, no rows": (losses.byol_loss, (E64, E64, E64, E64)),
    "agreement and soft_bce, no neighbours": (
        lambda p: losses.soft_bce(*local_soft(p, p.detach(), 3)),
        (rows(1, 3),),
    ),
    "soft_attract, no neighbours": (
        lambda p: losses.soft_attract(*local_soft(p, p.detach(), 3), "log"),
        (rows(1, 3),),
    ),
    "soft_attract, no rows": (
        lambda p: losses.soft_attract(*local_soft(p, p.detach(), 3), "linear"),
        (E64,),
    ),
    "soft_bce, no rows": (lambda o, s: losses.soft_bce(o, s), (E64, E64)),
    "soft_attract, no weight": (lambda o: losses.soft_attract(o, ZEROS, "log"), (ZEROS,)),
    "soft_attract, all masked": (
        lambda o, s: losses.soft_attract(o, s, "log", torch.zeros(2, 3, dtype=torch.bool)),
        (rows(2, 3).abs(), rows(2, 3).abs()),
    ),
    "boost, nobody labelled": (
        lambda o: losses.boost_soft_loss(o, torch.full((2, 3), torch.inf).double(), "linear"),
        (rows(2, 3).abs(),),
    ),
    "boost bce, nobody labelled": (
        lambda o: losses.boost_soft_loss(o, torch.full((2, 3), torch.inf).double(), "bce"),
        (rows(2, 3).abs(),),
    ),
    "cross-entropy, nobody labelled": (
        lambda x: losses.pseudo_label_cross_entropy(x, NONE),
        (rows(2, 3),),
    ),
    "cross-entropy, no rows": (
        lambda x: losses.pseudo_label_cross_entropy(x, NONE[:0]),
        (E64,),
    ),
    "row entropy, no rows": (losses.row_entropy, (E64,)),
    "marginal entropy, no rows": (losses.marginal_entropy, (E64,)),
    "batch pair term, no pairs": (losses.batch_pair_term, (E64, E64)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_batches_are_exactly_zero(name: str) -> None:
    function, inputs = DEGENERATE[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    assert value.item() == 0
    for grad in torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True):
        assert (grad == 0).all()


def test_an_unused_cluster_is_safe() -> None:
    p = probabilities("random", 5, 3, 1)
    p[:, 2] = 0
    for function in (lambda a, b: losses.cluster_contrast(a, b, 1.0),
                     losses.one_way_column_contrast):  # fmt: skip
        leaves = [p.clone().requires_grad_(), p.clone().requires_grad_()]
        function(*leaves).backward()
        for leaf in leaves:
            assert leaf.grad is not None and leaf.grad.isfinite().all()
            assert (leaf.grad[:, 2] == 0).all() and (leaf.grad[:, :2] != 0).any()


def terms(p: Tensor, q: Tensor, z: Tensor, zaug: Tensor) -> dict[str, Tensor]:
    """Every loss once, from one batch."""
    y = torch.tensor([0, 0, 0, 1, 1, -1, 2, 2], device=p.device)
    d, idx = batch_neighbors(z.detach(), zaug.detach(), 4, same_rows=False)
    s, o = losses.soft_confidence(d, global_radius(z, zaug)), losses.agreement(p, q, idx)
    return {
        "nt_xent": losses.nt_xent(z, zaug, 0.1),
        "info_nce": losses.info_nce(z, zaug, z[:3].detach(), 0.1),
        "byol": losses.byol_loss(z, zaug, z.roll(1, 0), zaug),
        "bce": losses.soft_bce(o, s),
        "linear": losses.soft_attract(o, s, "linear"),
        "log": losses.soft_attract(o, s, "log"),
        "boost": losses.boost_soft_loss(o, d, "log"),
        "contrast": losses.cluster_contrast(p, q, 0.5),
        "one_way": losses.one_way_column_contrast(p, q),
        "pairs": losses.batch_pair_term(p @ q.T, torch.full((8, 8), 0.25, dtype=p.dtype)),
        "row": losses.row_entropy(p),
        "marginal": losses.marginal_entropy(p),
        "labels": losses.pseudo_label_cross_entropy(p, y),
    }


def test_float32_agrees_with_float64() -> None:
    inputs = batch("random", 8, 4, 16)
    exact = terms(*inputs)
    for name, value in terms(*(x.float() for x in inputs)).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5, msg=name)


def test_autocast_does_not_round() -> None:
    inputs = [x.float() for x in batch("random", 8, 4, 16)]
    exact = terms(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = inputs[0] @ inputs[1].T
        inside = terms(*inputs)
    assert rounded.dtype == torch.bfloat16
    for name in exact.keys() - {"pairs"}:  # its agreements were made outside the package
        assert torch.equal(inside[name], exact[name]), name


def test_large_logits_stay_finite() -> None:
    z = features("random", 6, 3, 1).float().requires_grad_()
    loss = losses.nt_xent(z, z.detach().roll(1, 0), temperature=1e-3)
    loss.backward()
    assert loss.isfinite() and z.grad is not None and z.grad.isfinite().all()


def test_agreement_repeats_bit_by_bit() -> None:
    """At this size, with four threads, the shorter p[:, None] * q[idx] does not."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(600, 10, generator=generator).softmax(dim=1)
    idx = torch.rand(600, 600, generator=generator).topk(20).indices
    weight = torch.randn(600, 20, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        grads = []
        for _ in range(15):
            leaf = p.clone().requires_grad_()
            (losses.agreement(leaf, leaf, idx) * weight).sum().backward()
            grads.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, grads[0]) for grad in grads[1:])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 99))
def test_contrast_does_not_depend_on_row_order_or_length(B: int, D: int, seed: int) -> None:
    z1, z2 = rows(B, D, seed=seed), rows(B, D, seed=seed + 100)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    loss = losses.nt_xent(z1, z2, 0.3)
    assert loss >= 0
    torch.testing.assert_close(losses.nt_xent(7 * z1[order], z2[order], 0.3), loss)
    torch.testing.assert_close(losses.nt_xent(z2, z1, 0.3), loss)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.floats(0, 60), st.integers(0, 99))
def test_entropies_are_between_none_and_uniform(B: int, C: int, scale: float, seed: int) -> None:
    p = (scale * rows(B, C, seed=seed)).softmax(dim=1)
    row, marginal = losses.row_entropy(p), losses.marginal_entropy(p)
    assert -1e-12 <= row <= marginal + 1e-12  # entropy is concave
    assert marginal <= math.log(C) + 1e-12


# Which way each piece pulls: free logits, three well separated groups of features.


def groups() -> tuple[Tensor, Tensor]:
    y = torch.arange(30) % 3
    z = torch.nn.functional.normalize(4 * torch.eye(3, 8)[y] + 0.6 * rows(30, 8).float())
    return z, y


def descend(objective: Callable[[Tensor], Tensor], steps: int = 300) -> tuple[Tensor, Tensor]:
    """Predictions before and after descending on the objective."""
    logits = rows(30, 3, seed=7).float().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    before = logits.detach().softmax(dim=1)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(logits.softmax(dim=1)).backward()
        optimizer.step()
    return before, logits.detach().softmax(dim=1)


def same_group_agreement(p: Tensor, y: Tensor) -> float:
    pairs = (y[:, None] == y) & ~torch.eye(30, dtype=torch.bool)
    return float((p @ p.T)[pairs].mean())


def sure(p: Tensor) -> float:
    """The share of rows that boost could select."""
    return float((p.max(dim=1).values >= 0.99).float().mean())


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_attract_makes_true_neighbours_agree(kind: str) -> None:
    z, y = groups()
    before, after = descend(
        lambda p: losses.soft_attract(*local_soft(p, z, 5), kind) - 2 * losses.marginal_entropy(p)
    )
    assert same_group_agreement(before, y) < 0.5
    assert same_group_agreement(after, y) > 0.8
    assert sure(after) > 0.9


def test_literal_bce_holds_agreement_at_the_confidence() -> None:
    """Why Eqs. 3 and 6 as printed are not the default: o is driven to s, and few rows get sure."""
    z, y = groups()
    _, s = local_soft(torch.zeros(30, 3), z, 9)
    partial = (s > 0.05) & (s < 0.95)
    assert partial.float().mean() > 0.5
    before, after = descend(lambda p: losses.soft_bce(*local_soft(p, z, 9)))
    gap = [float((local_soft(p, z, 9)[0] - s)[partial].abs().mean()) for p in (before, after)]
    assert gap[1] < 0.8 * gap[0]
    assert sure(after) < 0.25 and same_group_agreement(after, y) < 0.6  # attract: > 0.9, > 0.8


def test_literal_bce_makes_no_row_sure_where_no_neighbour_is() -> None:
    _, y = groups()
    pairs = ((y[:, None] == y) & ~torch.eye(30, dtype=torch.bool)).float()
    idx = pairs.topk(9).indices
    s = torch.full((30, 9), 0.6)
    _, after = descend(lambda p: losses.soft_bce(losses.agreement(p, p, idx), s))
    assert abs(same_group_agreement(after, y) - 0.6) < 0.05
    assert sure(after) == 0


def test_marginal_entropy_balances_and_row_entropy_flattens() -> None:
    uniform = torch.full((3,), 1 / 3)
    _, balanced = descend(lambda p: -losses.marginal_entropy(p))
    torch.testing.assert_close(balanced.mean(dim=0), uniform, atol=1e-3, rtol=0)
    assert losses.row_entropy(balanced) < 0.9 * math.log(3)  # the rows keep their opinions
    _, flat = descend(lambda p: -losses.row_entropy(p))
    torch.testing.assert_close(flat, uniform.expand(30, 3), atol=1e-2, rtol=0)


def test_cluster_contrast_separates_clusters() -> None:
    def overlap(p: Tensor) -> float:
        columns = torch.nn.functional.normalize(p.T)
        return float((columns @ columns.T).fill_diagonal_(0).max())

    before, after = descend(lambda p: losses.cluster_contrast(p, p, 1.0))
    assert overlap(after) < 0.1 < overlap(before)
