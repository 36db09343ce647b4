"""What each stage computes, selects and keeps, away from the command line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.core import checkpoints
from snscc_ray.core.clustering import metrics
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.mining import MinedNeighbors, mine
from snscc_ray.core.clustering.pseudo_labels import select_pseudo_labels
from snscc_ray.core.views import clean_view
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import Batch
from snscc_ray.models.encoders import (
    ClusterHeads,
    ClusterNet,
    PretextNet,
    build_encoder,
    out_features,
)
from snscc_ray.runs.identity import stage_identity
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.training import context as context_module
from snscc_ray.training.context import Context
from snscc_ray.training.engine import fit
from snscc_ray.training.stages.boost import Boost
from snscc_ray.training.stages.pretrain import pretext_features
from snscc_ray.training.stages.train import Train, probabilities
from snscc_ray.training.workers import LocalWorker
from tests.conftest import equal_states, execute_on, make_context

CPU = torch.device("cpu")


class Warnings(NullMonitor):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.figures: list[dict[str, float]] = []

    def warn(self, stage: str, epoch: int, message: str) -> None:
        self.seen.append((stage, message))

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        self.figures.append(figures)


def pretext(context: Context) -> tuple[PretextNet, MinedNeighbors]:
    """An untrained pretext network and what its features mine."""
    torch.manual_seed(0)
    encoder = build_encoder(context.recipe.encoder, context.recipe.data.channels)
    network = PretextNet(encoder, context.recipe.pretrain)
    features_ND = pretext_features(context, network)
    return network, mine(features_ND, context.recipe.pretrain.mined_neighbors)


def train_stage(context: Context) -> Train:
    network, mined = pretext(context)
    return Train(context, network, mined)


def boost_stage(context: Context) -> Boost:
    """Boost of a network whose one head stands at k-means centres."""
    network, mined = pretext(context)
    features_ND = pretext_features(context, network)
    clusters = context.recipe.data.num_clusters
    heads = ClusterHeads(context.recipe.train, out_features(network.encoder), clusters, heads=1)
    heads.start_at(kmeans(features_ND, clusters, 0)[0][None])
    return Boost(context, ClusterNet(network.encoder, heads), mined)


def with_settings(recipe: Recipe, images: ImageSet, *assignments: str) -> Context:
    return make_context(override(recipe, assignments), images)


def batch_of(context: Context, rows_B: Tensor) -> Batch:
    return Batch(context.data.take(rows_B), rows_B, len(rows_B))


def with_labels(images: ImageSet, labels: Tensor | None) -> ImageSet:
    return replace(images, catalog=replace(images.catalog, labels=labels))


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def finals(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {stage: checkpoints.load(folder / stage / "final.pt")["network"] for stage in STAGES}


# ------------------------------------------------------------------------------------- Train


def test_prototypes_start_at_kmeans_centres(context: Context) -> None:
    stage = train_stage(context)
    features_ND = pretext_features(context, stage.network)
    stage.prepare()
    weight_HCD = stage.network.heads.weight.detach()
    for head in range(context.recipe.train.num_heads):
        centres_CD, _ = kmeans(features_ND, 10, context.key("kmeans", head))
        torch.testing.assert_close(weight_HCD[head], F.normalize(centres_CD, dim=1))
    assert not torch.equal(weight_HCD[0], weight_HCD[1])


@pytest.mark.parametrize("best", [0, 1, 2])
@pytest.mark.parametrize("kind", ["prototype", "linear"])
def test_the_head_with_the_best_label_free_score_is_kept(
    kind: str, best: int, tiny: Recipe, tiny_images: ImageSet
) -> None:
    # Labels that hold the collapsed heads for perfect must not matter.
    images = with_labels(tiny_images, torch.zeros(len(tiny_images), dtype=torch.int64))
    context = with_settings(tiny, images, f"train.head={kind}")
    stage = train_stage(context)
    features_ND = pretext_features(context, stage.network)
    heads = stage.network.heads
    with torch.no_grad():
        heads.weight.copy_(F.normalize(kmeans(features_ND, 10, 0)[0], dim=1).expand(3, -1, -1))
        for head in {0, 1, 2} - {best}:
            heads.weight[head] = heads.weight[head, :1]  # all prototypes in one place
            if heads.bias is not None:
                heads.bias[head, 0, 4] = 100  # all rows in cluster 4
        expected = heads.weight[best].clone()
    figures = stage.finish()
    assert torch.equal(heads.weight[0], expected) and len(heads.weight) == 1
    assert heads.bias is None or heads.bias.shape == (1, 1, 10)
    assert figures["health/score"] > 0.2
    assert probabilities(context, stage.network).shape == (200, 1, 10)


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        ("soft", {"local", "global", "cluster", "entropy", "mined"}),
        ("paper", {"local", "global", "cluster", "entropy"}),
        ("released", {"global", "cluster", "entropy", "mined"}),
    ],
)
@pytest.mark.parametrize("head", ["prototype", "linear"])
@pytest.mark.parametrize("mined_from", ["images", "predictions"])
def test_every_objective_has_finite_terms_and_gradients(
    objective: str, terms: set[str], head: str, mined_from: str, tiny: Recipe, tiny_images: ImageSet
) -> None:
    context = with_settings(
        tiny,
        tiny_images,
        f"train.objective={objective}",
        f"train.head={head}",
        f"train.mined_from={mined_from}",
    )
    stage = train_stage(context)
    stage.begin_epoch(0)
    batch = batch_of(context, torch.arange(32))
    views = stage.viewer(0)(batch.inputs, batch.rows_B)
    assert len(views) == (2 if objective == "paper" or mined_from == "predictions" else 3)
    found = stage.step(stage.network, views, batch)
    assert found.keys() == terms
    assert all(value.isfinite() and value.dim() == 0 for value in found.values())
    torch.stack(list(found.values())).sum().backward()
    for name, weight in stage.network.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_without_a_mined_weight_no_mined_view_is_made(tiny: Recipe, tiny_images: ImageSet) -> None:
    context = with_settings(tiny, tiny_images, "train.mined_weight=0")
    stage = train_stage(context)
    stage.begin_epoch(0)
    batch = batch_of(context, torch.arange(32))
    views = stage.viewer(0)(batch.inputs, batch.rows_B)
    assert len(views) == 2
    assert "mined" not in stage.step(stage.network, views, batch)


@pytest.mark.parametrize("agreement", ["linear", "log"])
def test_mined_predictions_are_the_mean_over_all_neighbours_by_confidence(
    agreement: str, tiny: Recipe, tiny_images: ImageSet
) -> None:
    context = with_settings(
        tiny, tiny_images, "train.mined_from=predictions", f"train.agreement={agreement}"
    )
    stage = train_stage(context)
    _, mined = pretext(context)
    stage.begin_epoch(0)
    said_NHC = probabilities(context, stage.network)
    batch = batch_of(context, torch.arange(7, 20))
    views = stage.viewer(0)(batch.inputs, batch.rows_B)
    term = stage.step(stage.network, views, batch)["mined"]
    p_HBC = stage.network(torch.cat(views))[1].softmax(2)[:, : len(batch.rows_B)]
    losses = []
    for place, row in enumerate(batch.rows_B.tolist()):
        K = context.recipe.train.num_neighbors
        s_K = mined.confidence_NK[row, :K]
        for head in range(3):
            target_C = sum(
                s / s_K.sum() * said_NHC[n, head]
                for s, n in zip(s_K, mined.neighbors_NK[row, :K].long(), strict=True)
            )
            o = float(p_HBC[head, place].detach().double() @ target_C.double())
            losses.append(-o if agreement == "linear" else -math.log(o))
    assert float(term.detach()) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    # Of the rows of the step, what it just said of them takes the place of what was said before.
    after_NHC = stage.state()["probabilities"]
    seen_N = torch.zeros(200, dtype=torch.bool).index_fill(0, batch.rows_B, True)
    said_BHC = p_HBC[:, : len(batch.rows_B)].detach().transpose(0, 1)
    torch.testing.assert_close(after_NHC[seen_N], said_BHC, rtol=0, atol=1e-6)
    assert torch.equal(after_NHC[~seen_N], said_NHC[~seen_N])
    assert not after_NHC.requires_grad


def test_mined_partners_are_drawn_by_confidence(
    tiny: Recipe, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = with_settings(tiny, tiny_images, "train.num_neighbors=5", "train.mined_from=images")
    N, K = 200, 8
    # The place k of a partner can be read off its row: row + 1 + 7 k.
    neighbors_NK = (torch.arange(N)[:, None] + 1 + 7 * torch.arange(K)) % N
    confidence_K = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.25, 1.0, 1.0, 1.0])
    mined = MinedNeighbors(neighbors_NK.int(), torch.rand(N, K), confidence_K.expand(N, K))
    stage = Train(context, pretext(context)[0], mined)
    seen: list[tuple[Tensor, Tensor]] = []

    def record(
        images: Tensor, rows: Tensor, views: tuple[object, ...], **_: object
    ) -> tuple[Tensor, ...]:
        seen.append((images, rows))
        return (images,) * len(views)

    monkeypatch.setattr(context_module, "make_views", record)
    rows_B = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    places = []
    for epoch in range(60):
        seen.clear()
        stage.viewer(epoch)(context.data.take(rows_B), rows_B)
        images, partners_B = seen[1]  # after the row's own views
        assert torch.equal(images, context.data.take(partners_B))
        places.append((partners_B - rows_B - 1) % N / 7)
    place = torch.stack(places)
    assert torch.equal(place, place.round())
    share = torch.bincount(place.flatten().long(), minlength=K).double() / place.numel()
    # Twelve thousand draws: a share's standard deviation is below 0.005.
    expected = torch.tensor([0.5, 0.25, 0.125, 0, 0.125, 0, 0, 0], dtype=torch.float64)
    assert (share - expected).abs().max() < 0.02
    assert share[[3, 5, 6, 7]].max() == 0
    # Every row draws anew each epoch, and rows draw apart from each other.
    assert all(len(set(column.tolist())) > 1 for column in place.T)
    assert all(len(set(line.tolist())) > 1 for line in place)


def test_on_fixed_features_the_more_cohesive_of_two_equal_heads_is_kept(context: Context) -> None:
    """Both heads are even and agree with the neighbours; only the second follows the features."""
    stage = train_stage(context)
    rows, clusters = len(context.data), context.recipe.data.num_clusters
    along = torch.arange(rows) * clusters // rows  # each cluster: rows with neighbouring numbers
    across = torch.arange(rows) % clusters
    stage._health_NK = torch.arange(rows)[:, None]  # every row its own neighbour: equal scores
    heads = torch.nn.functional.one_hot(torch.stack([across, along], dim=1), clusters).float()
    features = torch.nn.functional.one_hot(along, clusters).float()
    cohesive = [metrics.cohesion(features, own, clusters) for own in (across, along)]
    assert cohesive[1] > 2 * cohesive[0]
    assert stage._measure_heads(heads)[1] == 0
    assert stage._measure_heads(heads, features)[1] == 1


# ------------------------------------------------------------------------------------ labels


def test_labels_only_measure(tiny: Recipe, tiny_images: ImageSet, tmp_path: Path) -> None:
    assert tiny_images.catalog.labels is not None
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    labels = tiny_images.catalog.labels
    kinds = {"true": labels, "shuffled": labels[order], "none": None}
    found, measured = {}, {}
    for name, labels in kinds.items():
        folder = tmp_path / name
        images = with_labels(tiny_images, labels)
        result = execute_on(tiny, images, folder, LocalWorker(folder, CPU), NullMonitor())
        found[name] = finals(folder)
        measured[name] = result.figures["stages"]["train"]
    for name in ("shuffled", "none"):
        for stage in STAGES:
            assert equal_states(found[name][stage], found["true"][stage]), (name, stage)
    assert measured["true"]["oracle/nmi"] != measured["shuffled"]["oracle/nmi"]
    assert "oracle/nmi" not in measured["none"]


# ------------------------------------------------------------------------------------- Boost


def test_pseudo_labels_come_from_a_clean_pass_that_leaves_no_trace(context: Context) -> None:
    stage = boost_stage(context)
    stage.network.train()
    before = copied(stage.network)
    stage.begin_epoch(0)
    assert equal_states(copied(stage.network), before)
    assert all(module.training for module in stage.network.modules())
    with torch.no_grad():
        stage.network.eval()
        clean = clean_view(context.data.images_NCHW, context.normalize)
        p_NC = stage.network(clean)[1][0].softmax(1)
    settings = context.recipe.boost
    expected_N = select_pseudo_labels(p_NC, settings.confidence_threshold, settings.top_fraction)
    assert (expected_N >= 0).any() and (expected_N < 0).any()
    assert torch.equal(stage.labels_N, expected_N)


def test_nothing_confident_enough_teaches_nothing(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    context = with_settings(
        tiny, tiny_images, "boost.confidence_threshold=1", "boost.weight_decay=0"
    )
    stage = boost_stage(context)
    stage.begin_epoch(0)
    assert (stage.labels_N == -1).all()
    batch = batch_of(context, torch.arange(32))
    terms = stage.step(stage.network, stage.viewer(0)(batch.inputs, batch.rows_B), batch)
    assert {name: term.item() for name, term in terms.items()} == {"soft": 0, "label": 0}
    torch.stack(list(terms.values())).sum().backward()
    gradients = [w.grad for w in stage.network.parameters() if w.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)

    stage = boost_stage(context)
    weights = {name: weight.clone() for name, weight in stage.network.named_parameters()}
    monitor = Warnings()
    fit(stage, context, LocalWorker(tmp_path, CPU), monitor, "x")
    assert all(figures["loss/total"] == 0 for figures in monitor.figures)
    assert all(figures["health/selected_share"] == 0 for figures in monitor.figures)
    assert equal_states(dict(stage.network.named_parameters()), weights)
    assert all(bool(value.isfinite().all()) for value in stage.network.state_dict().values())


def test_selection_within_the_batch(tiny: Recipe, tiny_images: ImageSet, tmp_path: Path) -> None:
    settings = ["boost.selection=batch", "boost.confidence_threshold=0.11"]
    context = with_settings(tiny, tiny_images, *settings)
    stage = boost_stage(context)
    stage.begin_epoch(0)
    batch = batch_of(context, torch.arange(32))
    views = stage.viewer(0)(batch.inputs, batch.rows_B)
    before = copied(stage.network)
    terms = stage.step(stage.network, views, batch)
    stage.network.load_state_dict(before)
    stage.labels_N.fill_(-1)  # what the whole set would say has no say
    again = stage.step(stage.network, views, batch)
    assert all(torch.equal(terms[name], again[name]) for name in terms)
    assert terms["label"] > 0
    context = with_settings(tiny, tiny_images, "boost.confidence_threshold=0.11")
    other = boost_stage(context)
    assert other.step(other.network, views, batch)["label"] == 0  # begins with none
    fit(stage, context, LocalWorker(tmp_path, CPU), NullMonitor(), "x")
    assert all(bool(value.isfinite().all()) for value in stage.network.state_dict().values())


def test_boost_that_does_harm_is_undone_and_says_so(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    recipe = override(tiny, ["boost.learning_rate=3", "boost.confidence_threshold=0"])
    monitor = Warnings()
    result = execute_on(recipe, tiny_images, tmp_path, LocalWorker(tmp_path, CPU), monitor)
    train, boost = (result.figures["stages"][stage] for stage in ("train", "boost"))
    scores = [figures["health/score"] for figures in monitor.figures[-3:]]
    assert max(scores) < train["health/score"]  # the harm this test is about
    assert boost["health/restored"] == 1
    assert boost["health/score"] == pytest.approx(train["health/score"])
    assert [m for s, m in monitor.seen if s == "boost" and m.startswith("boost-worse")]
    weights = finals(tmp_path)
    assert equal_states(weights["boost"], weights["train"])


def test_boost_that_does_no_harm_is_kept(context: Context) -> None:
    stage = boost_stage(context)
    stage.begin_epoch(0)
    figures = stage.finish()
    assert figures["health/restored"] == 0 and not stage.restored


@pytest.mark.parametrize(("tolerance", "restored"), [(0.001, True), (1, False)])
def test_how_far_the_score_may_fall_is_a_setting(
    tolerance: float, restored: bool, tiny: Recipe, tiny_images: ImageSet
) -> None:
    context = with_settings(tiny, tiny_images, f"boost.score_tolerance={tolerance}")
    stage = boost_stage(context)
    stage.begin_epoch(0)
    before = copied(stage.network)
    with torch.no_grad():
        stage.network.heads.weight[0, 0] = stage.network.heads.weight[0, 1]  # two become one
    after = copied(stage.network)
    stage.end_epoch(0)
    assert stage.finish()["health/restored"] == restored == stage.restored
    assert equal_states(copied(stage.network), before if restored else after)


# -------------------------------------------------------------------------------- clean pass


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_the_clean_pass_does_not_depend_on_its_batches(
    rows: int, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = train_stage(context)
    for batch in (0, 1):  # running statistics that are not those of any batch
        rows_B = torch.arange(32) + batch
        views = stage.viewer(0)(context.data.take(rows_B), rows_B)
        stage.network(torch.cat(views))
    whole = probabilities(context, stage.network)
    before = copied(stage.network)
    monkeypatch.setattr(context_module, "_PASS_ROWS", rows)
    parts = probabilities(context, stage.network)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert parts.shape == (200, 3, 10)
    assert equal_states(copied(stage.network), before)
    assert stage.network.training


@pytest.mark.parametrize(("device", "sizes"), [("cpu", {8, 40}), ("cuda", {64})])
def test_every_batch_of_a_clean_pass_has_one_size_on_a_gpu(
    device: str, sizes: set[int], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "_PASS_ROWS", 64)
    recipe = override(context.recipe, ["precision=float32"])
    there = replace(context, recipe=recipe, device=torch.device(device))
    seen: list[int] = []

    def means(x_BCHW: Tensor) -> Tensor:
        seen.append(len(x_BCHW))
        return x_BCHW.mean((1, 2, 3))

    network = nn.Identity()
    whole = there.clean_pass(network, means)
    for rows in (3, 40):
        seen.clear()
        assert torch.equal(there.clean_pass(network, means, rows), whole[:rows])
        assert set(seen) <= sizes


# ---------------------------------------------------------------------------------- identity


def identities(recipe: Recipe, fingerprint: str = "f", order: str = "o") -> dict[StageName, str]:
    return {stage: stage_identity(recipe, stage, fingerprint, order) for stage in STAGES}


def changed(recipe: Recipe, other: Recipe) -> list[StageName]:
    one, two = identities(recipe), identities(other)
    return [stage for stage in STAGES if one[stage] != two[stage]]


@pytest.mark.parametrize(
    ("assignment", "stages"),
    [
        ("seed=1", STAGES),
        ("precision=bfloat16", STAGES),
        ("encoder.width=5", STAGES),
        ("encoder.name=resnet18", STAGES),
        ("data.mean=[0.4]", STAGES),
        ("data.std=[0.4]", STAGES),
        ("pretrain.view.flip=0.5", STAGES),
        ("data.num_clusters=9", ("train", "boost")),
        ("train.view.flip=0.5", ("train", "boost")),
        ("boost.view.flip=0.5", ("boost",)),
        ("name=other", ()),
        ("data.path=/elsewhere", ()),
        ("data.download=true", ()),
        ("data.augment_in=data", ()),
        ("runtime.device=auto", ()),
        ("runtime.decode_workers=3", ()),
        ("runtime.checkpoint_seconds=5", ()),
        ("runtime.checkpoint_steps=5", ()),
    ],
)
def test_what_determines_a_stage(
    assignment: str, stages: tuple[StageName, ...], tiny: Recipe
) -> None:
    assert changed(tiny, override(tiny, [assignment])) == list(stages)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_determines_it_and_those_after_it(
    stage: StageName, tiny: Recipe
) -> None:
    settings = getattr(tiny, stage)
    for field in type(settings).model_fields:
        other = "something" if getattr(settings, field) is None else None
        new = tiny.model_copy(update={stage: settings.model_copy(update={field: other})})
        assert changed(tiny, new) == list(STAGES[STAGES.index(stage) :]), field


def test_a_boost_finished_before_a_field_came_is_found_again() -> None:
    """Written down before `boost.score_tolerance` was a field; at its default nothing changed."""
    digits = recipes.get("digits")
    known = "0eb8e4ce0e506332400e038dff42edb6"
    assert stage_identity(digits, "boost", "pixels", "order") == known
    other = override(digits, ["boost.score_tolerance=0.02"])
    assert stage_identity(other, "boost", "pixels", "order") != known


def test_the_pixels_determine_every_stage_and_stages_differ(tiny: Recipe) -> None:
    one, two = identities(tiny, "f"), identities(tiny, "g")
    assert not set(one.values()) & set(two.values())
    assert len(set(one.values())) == 3
    assert identities(tiny, "f") == one
    # So does the order of the epochs: a streamed set has another than one in memory.
    assert not set(one.values()) & set(identities(tiny, "f", order="another").values())


def test_first_weights_come_from_the_seed_alone(
    tiny: Recipe, tiny_images: ImageSet, tmp_path: Path
) -> None:
    """Whatever was drawn before, and an untrained Pretrain mines the same neighbours."""
    recipe = override(tiny, ["pretrain.epochs=0"])
    folders = [tmp_path / "a", tmp_path / "b"]
    states = []
    for number, folder in enumerate(folders):
        torch.manual_seed(number)
        worker = LocalWorker(folder, CPU)
        execute_on(recipe, tiny_images, folder, worker, NullMonitor(), ("pretrain",))
        states.append(checkpoints.load(folder / "pretrain" / "final.pt")["network"])
    assert equal_states(*states)
    mined = [(folder / "pretrain" / "neighbors.parquet").read_bytes() for folder in folders]
    assert mined[0] == mined[1]
