"""Other methods' losses, each against its loop in reference_baselines.py, and how they choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from snscc_ray.compare import subsample
from snscc_ray.compare.decoder import Decoder
from snscc_ray.compare.methods import ac, ae, cc, dae, dec, iic, nmf, pica, sc, scan, vae
from snscc_ray.compare.study import Study
from snscc_ray.core import rng
from snscc_ray.core.display import Display
from snscc_ray.core.views import clean_view
from snscc_ray.data.imageset import ImageSet
from snscc_ray.training.context import Context
from tests import reference_baselines as reference
from tests.test_losses import CASES, probabilities, rows, same

SIZES = [(1, 2), (5, 3), (9, 4)]  # B, C


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_scan_consistency(size: tuple[int, int], case: str) -> None:
    B, C = size
    p, q = probabilities(case, B, C, 1), probabilities(case, B, C, 2)
    same(scan.consistency, reference.scan_consistency, p, q)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])  # all rows, some, none
def test_scan_self_labelling(size: tuple[int, int], case: str, threshold: float) -> None:
    B, C = size
    p, logits = probabilities(case, B, C, 1), rows(B, C, seed=2)
    same(
        lambda x: scan.self_labelling(p, x, threshold),
        lambda x: reference.scan_self_labelling(p, x, threshold),
        logits,
    )
    if threshold == 1.0:
        assert scan.self_labelling(p, logits, threshold) == 0


def test_scan_labels_get_no_gradient() -> None:
    p = probabilities("nearly_one_hot", 5, 3, 1).requires_grad_()
    scan.self_labelling(p, rows(5, 3, seed=2).requires_grad_(), 0.5).backward()
    assert p.grad is None


@pytest.mark.parametrize("best", [0, 1, 2])
def test_scan_keeps_the_head_that_agrees_and_is_balanced(best: int) -> None:
    """One head agrees with its neighbours and is balanced; others are collapsed, or at odds."""
    neighbors = torch.tensor([[1], [0], [3], [2]])
    good = torch.tensor([0, 0, 1, 1])
    heads = [torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 0, 1])]
    heads.insert(best, good)
    p_NHC = torch.stack([torch.eye(2)[head] * 0.98 + 0.01 for head in heads], dim=1)
    assert scan._best_head(p_NHC, neighbors) == best


@pytest.mark.parametrize("size", SIZES)
def test_dec_assignment(size: tuple[int, int]) -> None:
    B, C = size
    z, centres = rows(B, 3, seed=1), rows(C, 3, seed=2)
    z[0] = centres[0]  # a row at a centre
    weight = rows(B, C, seed=3)  # a row's sum is 1: unweighted, its gradient would be 0
    same(
        lambda z, c: (dec.soft_assignment(z, c) * weight).sum(),
        lambda z, c: (reference.dec_assignment(z, c) * weight).sum(),
        z,
        centres,
    )
    torch.testing.assert_close(dec.soft_assignment(z, centres).sum(1), torch.ones(B).double())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_dec_target_and_divergence(size: tuple[int, int], case: str) -> None:
    B, C = size
    p, q = probabilities(case, B, C, 1), probabilities(case, B, C, 2)
    target = dec.target_distribution(p)
    torch.testing.assert_close(target, reference.dec_target(p), rtol=1e-10, atol=1e-10)
    same(lambda q: dec.divergence(p, q), lambda q: reference.dec_divergence(p, q), q)
    torch.testing.assert_close(dec.divergence(p, p), torch.zeros(()).double())


def test_dec_target_sharpens_and_evens_out() -> None:
    q = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    target = dec.target_distribution(q)
    assert target[1, 0] > q[1, 0]
    assert target[0, 0] < q[0, 0]  # .36 / 2.4 is less than .16 / .6: the large cluster gives


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_cc_iic_and_pica(size: tuple[int, int], case: str) -> None:
    B, C = size
    p, q = probabilities(case, B, C, 1), probabilities(case, B, C, 2)
    same(iic.mutual_information, reference.iic_information, p, q)
    same(pica.partition_uncertainty, reference.pica_uncertainty, p, q)
    # The papers divide by the sum of all probabilities, which is B: gradients are the same as
    # long as rows sum to 1, so they are compared where they can go, behind a softmax.
    x, y = (rows.log().clamp(min=-1e4) for rows in (p, q))
    same(
        lambda x: pica.imbalance(x.softmax(1)),
        lambda x: reference.pica_imbalance(x.softmax(1)),
        x,
    )
    for temperature in (0.5, 1.0):
        same(
            lambda x, y, t=temperature: cc.cluster_level(x.softmax(1), y.softmax(1), t),
            lambda x, y, t=temperature: reference.cc_cluster_level(x.softmax(1), y.softmax(1), t),
            x,
            y,
        )


def test_losses_at_their_best_and_worst() -> None:
    """What a balanced, sure and stable assignment gets, and what a collapsed one."""
    even, one = torch.eye(3).double().repeat(4, 1), torch.eye(3)[torch.zeros(12).long()].double()
    log3 = torch.tensor(3.0).double().log()
    torch.testing.assert_close(iic.mutual_information(even, even), log3)
    torch.testing.assert_close(iic.mutual_information(one, one), 0 * log3)
    torch.testing.assert_close(pica.imbalance(even), 0 * log3)
    torch.testing.assert_close(pica.imbalance(one), log3)
    assert pica.partition_uncertainty(even, even) < pica.partition_uncertainty(one, one)
    assert cc.cluster_level(even, even, 1.0) < cc.cluster_level(one, one, 1.0)


@pytest.mark.parametrize("B", [1, 3])
def test_vae_and_ae(B: int) -> None:
    made, x = rows(B, 1, 2, 3, seed=1), rows(B, 1, 2, 3, seed=2)
    mu, logvar = rows(B, 4, seed=3), rows(B, 4, seed=4)
    same(
        lambda made, mu, logvar: vae.reconstruction(made, x) + vae.divergence(mu, logvar),
        lambda made, mu, logvar: reference.vae_negative_elbo(made, x, mu, logvar),
        made,
        mu,
        logvar,
    )
    same(
        lambda made: ae.reconstruction(made, x), lambda made: reference.squared_error(made, x), made
    )
    assert vae.divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_an_empty_batch_costs_nothing() -> None:
    p, x = torch.zeros(0, 3), torch.zeros(0, 1, 2, 2)
    assert scan.consistency(p, p) == dec.divergence(p, p) == iic.mutual_information(p, p) == 0
    assert vae.reconstruction(x, x) == vae.divergence(p, p) == 0


def test_noise_and_masks_depend_on_row_and_key_alone() -> None:
    some, all_rows = torch.tensor([7, 3]), torch.arange(2000)
    noise = vae.normal(all_rows, 5, 4)
    assert torch.equal(vae.normal(some, 5, 4), noise[some])
    assert not torch.equal(vae.normal(some, 6, 4), noise[some])
    assert noise.isfinite().all() and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    ones = torch.ones(2000, 2, 4, 4)
    images = dae.masked(ones, all_rows, 5, 0.25)
    assert torch.equal(dae.masked(ones[:2], some, 5, 0.25), images[some])
    assert abs((images == 0).float().mean() - 0.25) < 0.02
    assert torch.equal(images[:, 0], images[:, 1])  # whole pixels, not values


@pytest.mark.parametrize("size", [4, 7, 8, 33])
def test_a_decoder_reaches_any_size(size: int) -> None:
    assert Decoder(6, 3, size)(torch.zeros(2, 6)).shape == (2, 3, size, size)


def test_spectral_affinity_by_a_loop() -> None:
    x = rows(9, 2, seed=1)
    x[8] = x[7]
    d = torch.cdist(x, x)
    scale = d.sort(dim=1).values[:, 7]
    for i in range(9):
        for j in range(9):
            expected = 0 if i == j else torch.exp(-(d[i, j] ** 2) / (scale[i] * scale[j]))
            assert sc.affinity(x.numpy())[i, j] == pytest.approx(float(expected), abs=1e-12)
    assert sc.affinity(np.zeros((3, 2), np.float32)).tolist() == (1 - np.eye(3)).tolist()


def test_nmf_weighs_a_part_by_its_length() -> None:
    weights, parts = np.array([[1.0, 3.0]]), np.array([[4.0, 0.0], [0.0, 1.0]])
    assert nmf.largest_part(weights, parts).tolist() == [0]


def test_large_sets_are_clustered_by_some_of_their_rows(
    context: Context, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(context, tiny_images.catalog, Path("unused"), Display(Console(quiet=True)))
    whole = ac.cluster(study)
    assert whole.note == "" and len(whole.clusters_N.unique()) == 10
    monkeypatch.setattr(subsample, "ROWS", 120)
    seen: list[int] = []

    def halves(pixels_RD: np.ndarray) -> np.ndarray:
        seen.append(len(pixels_RD))
        return np.asarray(np.arange(len(pixels_RD)) % 2 * 3)  # clusters 0 and 3

    found = subsample.cluster_some(study, "sc", halves)
    assert seen == [120] and "120 of 200 rows" in found.note
    drawn = torch.randperm(200, generator=rng.generator(study.key("sc", "rows")))[:120].sort()[0]
    assert found.clusters_N[drawn].tolist() == [0, 3] * 60
    centres = [study.pixels()[drawn[i::2]].mean(0) for i in (0, 1)]
    for row in set(range(200)) - set(drawn.tolist()):
        near = min((0, 1), key=lambda i: float((study.pixels()[row] - centres[i]).norm()))
        assert found.clusters_N[row] == 3 * near
    assert torch.equal(subsample.cluster_some(study, "sc", halves).clusters_N, found.clusters_N)


def test_spectral_finds_rings() -> None:
    """One ring within another: no two centres tell them apart."""
    angle = torch.linspace(0, 2 * torch.pi, 41)[:40]
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    found = torch.from_numpy(sc.spectral(torch.cat([ring, 4 * ring]).numpy(), 2, 0))
    assert len(found[:40].unique()) == len(found[40:].unique()) == 1 and found[0] != found[40]


def test_iic_looks_at_no_clean_image(context: Context, tiny_images: ImageSet) -> None:
    """Telling an image from its view is worth log 2 of information, and no clustering."""
    first, second = torch.eye(2).double()[[0] * 6], torch.eye(2).double()[[1] * 6]
    torch.testing.assert_close(
        iic.mutual_information(first, second), torch.tensor(2).double().log()
    )
    seen: list[Tensor] = []
    monitor = Display(Console(quiet=True))
    study = Study(context, tiny_images.catalog, Path("unused"), monitor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            iic,
            "train",
            lambda study, part, stage: seen.extend(
                stage.viewer(0)(study.data.images_NCHW[:8], torch.arange(8))
            ),
        )
        iic.cluster(study)
    clean = clean_view(study.data.images_NCHW[:8], context.normalize)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])
    assert all((view - clean).flatten(1).abs().amax(1).gt(0).all() for view in seen)
