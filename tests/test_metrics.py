from __future__ import annotations

import itertools
import math

import pytest
import torch

from snscc_ray.core.clustering import metrics


def test_accuracy_is_the_best_over_all_matchings() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)
    clusters = torch.randint(4, (60,), generator=generator)
    best = max(
        float((torch.tensor(match)[clusters] == labels).double().mean())
        for match in itertools.permutations(range(4))
    )
    assert metrics.oracle(labels, clusters)["oracle/acc"] == pytest.approx(best)


def test_oracle_of_a_renamed_and_of_a_collapsed_assignment() -> None:
    labels = torch.arange(100) % 5
    perfect = metrics.oracle(labels, (labels + 3) % 5)
    assert perfect == {"oracle/acc": 1.0, "oracle/nmi": 1.0, "oracle/ari": 1.0}
    collapsed = metrics.oracle(labels, torch.zeros(100, dtype=torch.long))
    assert collapsed["oracle/acc"] == pytest.approx(0.2)
    assert collapsed["oracle/nmi"] == pytest.approx(0)


def test_more_clusters_than_labels() -> None:
    figures = metrics.oracle(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 5, 2, 2]))
    assert figures["oracle/acc"] == pytest.approx(0.75)


def test_confusion_matches_as_the_accuracy_does() -> None:
    labels, clusters = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 1, 1])
    counts, matched = metrics.confusion(labels, clusters)
    assert counts.tolist() == [[0, 2], [1, 1], [0, 1]]
    assert matched == [1, 0, None]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)
    clusters = torch.randint(6, (60,), generator=generator)
    counts, matched = metrics.confusion(labels, clusters)
    hits = sum(
        counts[label, cluster] for label, cluster in enumerate(matched) if cluster is not None
    )
    assert hits / 60 == pytest.approx(metrics.oracle(labels, clusters)["oracle/acc"])


def test_knn_accuracy_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    N, K = 60, 23
    z = torch.nn.functional.normalize(torch.randn(N, 4, generator=generator).double())
    labels = (z[:, 0] > 0).long() + (z[:, 1] > 0.5).long()
    distances = torch.cdist(z, z).fill_diagonal_(torch.inf)
    nearest = distances.topk(K, largest=False)
    right = 0
    for i in range(N):
        votes = [0.0, 0.0, 0.0]
        for j in sorted(range(N), key=lambda j: float(distances[i, j]))[:20]:
            votes[labels[j]] += math.exp(float(z[i] @ z[j]) / 0.07)
        right += votes.index(max(votes)) == labels[i]
    found = metrics.knn_accuracy(labels, nearest.indices.int(), nearest.values.float())
    assert found == pytest.approx(right / N)
    assert 0.5 < found < 1


def test_near_neighbours_outvote_many_far_ones() -> None:
    neighbors = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 0, 1], [2, 0, 1]])
    distances = torch.tensor([[0.1, 1.0, 1.0]] * 4)
    assert metrics.knn_accuracy(torch.tensor([0, 0, 1, 1]), neighbors, distances) == 1
    assert metrics.knn_accuracy(torch.tensor([0, 0, 1, 1]), neighbors, distances * 0 + 1) == 0


def test_spread_of_projections_even_flat_and_collapsed() -> None:
    even = torch.nn.functional.normalize(
        torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    )
    assert metrics.spread(even) == pytest.approx(
        {"health/projection_spread": 1, "health/effective_rank": 8}, abs=0.02
    )
    flat = torch.nn.functional.normalize(torch.nn.functional.pad(even[:, :3], (0, 5)))
    figures = metrics.spread(flat)
    assert figures["health/effective_rank"] == pytest.approx(3, abs=0.02)
    assert metrics.warnings(figures, 10) == {}
    figures = metrics.spread(even[:1].expand(50, -1))
    assert figures == pytest.approx(
        {"health/projection_spread": 0, "health/effective_rank": 1}, abs=1e-3
    )
    assert "almost the same point" in metrics.warnings(figures, 10)["projection-collapse"]


def test_health_by_hand() -> None:
    clusters = torch.tensor([0, 0, 1, 1])
    neighbors = torch.tensor([[1, 2], [0, 3], [3, 0], [2, 1]])
    confidence = torch.tensor([1.0, 0.5, 0.995, 0.1])
    figures = metrics.health(clusters, neighbors, 2, confidence)
    assert figures["health/neighbor_agreement"] == 0.5
    assert figures["health/balance"] == pytest.approx(1)
    assert figures["health/score"] == pytest.approx(0.5)
    assert figures["health/confident_share"] == 0.5
    assert figures["health/clusters_in_use"] == 2


def test_a_collapsed_assignment_never_wins() -> None:
    """Its neighbour agreement is perfect: a sum would choose it, the product does not."""
    neighbors = torch.randint(100, (100, 10), generator=torch.Generator().manual_seed(0))
    collapsed = metrics.health(torch.zeros(100, dtype=torch.long), neighbors, 10)
    random = metrics.health(torch.arange(100) % 10, neighbors, 10)
    assert collapsed["health/neighbor_agreement"] == 1
    assert collapsed["health/score"] == 0 < random["health/score"]
    assert "only 1 of 10" in metrics.warnings(collapsed, 10)["collapse"]
    assert metrics.warnings(random, 10) == {}


def test_an_empty_selection_is_warned_of() -> None:
    assert "no-pseudo-labels" in metrics.warnings({"health/selected_share": 0.0}, 10)
    assert metrics.warnings({"health/selected_share": 0.1}, 10) == {}


def test_cohesion_is_the_mean_cosine_to_the_mean_of_the_cluster() -> None:
    drawing = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn((50, 7), generator=drawing), dim=1)
    clusters = torch.arange(50) % 3
    total = 0.0
    for row, cluster in zip(rows.double(), clusters, strict=True):
        centre = rows.double()[clusters == cluster].mean(0)
        total += float(row @ centre / centre.norm())
    assert metrics.cohesion(rows, clusters, 4) == pytest.approx(total / 50, abs=1e-6)
    together = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert metrics.cohesion(together, torch.tensor([0, 0, 1]), 2) == pytest.approx(1)
    assert metrics.cohesion(together, torch.tensor([0, 1, 1]), 2) < 0.9
