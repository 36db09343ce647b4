"""What must hold on a GPU. The same tests run on the CPU, but for what only a GPU can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from snscc_ray.answers.predict import load_model
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe, SimclrView, StrongView, View
from snscc_ray.core import checkpoints
from snscc_ray.core.clustering.kmeans import kmeans
from snscc_ray.core.clustering.metrics import oracle
from snscc_ray.core.clustering.mining import mine
from snscc_ray.core.clustering.neighbors import knn
from snscc_ray.core.views import Normalize, make_view
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.sources import load_images
from snscc_ray.models.encoders import (
    ClusterHeads,
    ClusterNet,
    PretextNet,
    build_encoder,
    out_features,
)
from snscc_ray.runs.monitor import NullMonitor
from snscc_ray.runs.run import Result, normalisation
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.engine import Interrupted
from snscc_ray.training.schedules import build_optimizer
from snscc_ray.training.stages.boost import Boost
from snscc_ray.training.stages.pretrain import Pretrain
from snscc_ray.training.stages.train import Train, probabilities
from snscc_ray.training.workers import LocalWorker
from tests.conftest import TINY, execute_on

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
# Two runs on a GPU differ in their last bits, which grow from step to step.
CLOSE = {"cpu": 0.0, "cuda": 0.05}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_images(override(recipes.get("digits"), ["data.limit=400"]).data)


def recipe_on(device: torch.device, *settings: str) -> Recipe:
    tiny = [one for one in TINY if "device" not in one and "limit" not in one]
    return override(recipes.get("digits"), [*tiny, f"runtime.device={device.type}", *settings])


def context_on(device: torch.device, images: ImageSet, *settings: str) -> Context:
    recipe = recipe_on(device, *settings)
    data = ResidentData(images.images, device)
    return Context(
        recipe, data, images.catalog.labels, normalisation(recipe, images.catalog), device
    )


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Refuse every call that makes the CPU wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------- steps


def stage_on(name: str, context: Context) -> Stage:
    if name == "pretrain":
        return Pretrain(context)
    recipe = context.recipe
    mined = mine(torch.randn(len(context.data), 16, generator=torch.Generator().manual_seed(0)), 20)
    encoder = build_encoder(recipe.encoder, recipe.data.channels)
    if name == "train":
        return Train(context, PretextNet(encoder, recipe.pretrain), mined)
    heads = ClusterHeads(recipe.train, out_features(encoder), recipe.data.num_clusters, 1)
    return Boost(context, context.to_device(ClusterNet(encoder, heads)), mined)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("pretrain", [f"pretrain.method={method}"]) for method in ("simclr", "moco", "byol")),
        *(
            ("train", [f"train.objective={objective}", f"train.mined_from={source}"])
            for objective in ("soft", "paper", "released")
            for source in ("images", "predictions")
        ),
        ("boost", ["boost.selection=dataset"]),
        ("boost", ["boost.selection=batch"]),
        ("boost", ["boost.agreement=bce"]),
    ],
)
def test_no_step_waits_for_the_device(
    name: str, settings: list[str], device: torch.device, digits: ImageSet
) -> None:
    context = context_on(device, digits, *settings)
    stage = stage_on(name, context)
    stage.begin_epoch(0)
    stage.network.train()
    optimizer = build_optimizer(stage.settings, stage.network)
    weights = list(stage.network.parameters())
    viewer = stage.viewer(0)
    batches = iter(context.data.epoch(stage.settings.batch_size, context.key("order")))
    before = [weight.detach().clone() for weight in weights]

    def step() -> torch.Tensor:
        batch = next(batches)
        views = viewer(batch.inputs, batch.drawing_rows_B)
        with context.autocast():
            terms = stage.step(stage.network, views, batch)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        stage.after_step()
        return loss.detach()

    step()  # libraries and memory are set up
    with no_waiting(device):
        losses = torch.stack([step(), step()])
    assert losses.isfinite().all()
    # No data-set pseudo-label of an untrained network is confident enough to teach anything.
    if name != "boost":
        changed = [not torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
        assert any(changed)


# -------------------------------------------------------------------------------- whole runs


class StopAt(NullMonitor):
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def epoch(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        if stage == self.stage and epoch == 0:
            raise KeyboardInterrupt


def whole(device: torch.device, images: ImageSet, folder: Path) -> Result:
    recipe = recipe_on(device, "encoder.width=8", "pretrain.epochs=12", "train.epochs=6")
    return execute_on(recipe, images, folder, LocalWorker(folder, device), NullMonitor())


def accuracy(result: Result) -> float:
    return float(result.figures["stages"]["boost"]["oracle/acc"])


def test_equal_runs_and_resumed_runs(
    device: torch.device, digits: ImageSet, tmp_path: Path
) -> None:
    first, again = (whole(device, digits, tmp_path / name) for name in ("first", "again"))
    recipe = recipe_on(device, "encoder.width=8", "pretrain.epochs=12", "train.epochs=6")
    stopped = tmp_path / "stopped"
    for stage in ("pretrain", "train"):
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            execute_on(recipe, digits, stopped, LocalWorker(stopped, device), StopAt(stage))
    resumed = whole(device, digits, stopped)
    for other in (again, resumed):
        assert abs(accuracy(other) - accuracy(first)) <= CLOSE[device.type]
    weights = [
        checkpoints.load(folder / "pretrain" / "final.pt")["network"]
        for folder in (tmp_path / "first", tmp_path / "again", stopped)
    ]
    same = [all(torch.equal(w[n], weights[0][n]) for n in weights[0]) for w in weights[1:]]
    print(f"\n{device}: two runs equal bit for bit: {same[0]}; a resumed one: {same[1]}")
    if device.type == "cpu":
        assert all(same)


def test_an_image_gets_the_same_answer_in_any_batch(
    device: torch.device, digits: ImageSet, tmp_path: Path
) -> None:
    whole(device, digits, tmp_path)
    model = load_model(tmp_path, device.type)
    all_of_them = model.probabilities(ResidentData(digits.images, device))
    for rows in (1, 7, 50, 203):
        part = model.probabilities(ResidentData(digits.images[:rows], device))
        assert torch.equal(part, all_of_them[:rows])


def test_a_run_is_read_on_a_cpu(device: torch.device, digits: ImageSet, tmp_path: Path) -> None:
    whole(device, digits, tmp_path)
    there = load_model(tmp_path, device.type).probabilities(ResidentData(digits.images, device))
    model = load_model(tmp_path, "cpu")
    here = model.probabilities(ResidentData(digits.images, torch.device("cpu")))
    same = (here.argmax(1) == there.argmax(1)).double().mean()
    assert same >= (1 if device.type == "cpu" else 0.97)
    if device.type == "cuda":
        assert model.caveat is not None and "float32" in model.caveat
        known = checkpoints.load(tmp_path / "boost" / "final.pt")["in_float32"]
        assert known["rows"] == len(digits.catalog)
        assert float((here - there).abs().max()) <= known["largest_difference"] + 1e-3


# ------------------------------------------------------------------------------ the same as a CPU


def test_neighbours(device: torch.device) -> None:
    rows_ND = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    near, index = knn(rows_ND.to(device), 20)
    want, want_index = knn(rows_ND, 20)
    assert (index.cpu() == want_index).float().mean() > 0.999
    torch.testing.assert_close(near.cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "view", [SimclrView(), StrongView(cutout=8), SimclrView(rotate_degrees=20)], ids=str
)
def test_views(view: View, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    rows = torch.arange(64)
    plain = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    ours = make_view(images, rows, view, 1, plain)
    there = images.to(device)
    make_view(there, rows, view, 1, plain)
    with no_waiting(device):
        view_there = make_view(there, rows, view, 1, plain)
    far = ((view_there.cpu() - ours).abs() > 1.5 / 255).float().mean()
    assert far < 0.02  # a rounding difference may grow in a later step


def test_k_means(device: torch.device, digits: ImageSet) -> None:
    rows_ND = digits.images.flatten(1).float()
    centres, found = (part.cpu() for part in kmeans(rows_ND.to(device), 10, 0, 10))
    want, _ = kmeans(rows_ND, 10, 0)
    inertia = [torch.cdist(rows_ND, c).min(1).values.square().sum() for c in (centres, want)]
    assert inertia[0] <= 1.01 * inertia[1]
    assert digits.catalog.labels is not None
    assert oracle(digits.catalog.labels, found)["oracle/acc"] > 0.6
    again = kmeans(rows_ND.to(device), 10, 0, 10)
    assert torch.equal(again[0].cpu(), centres) and torch.equal(again[1].cpu(), found)


def test_float32_is_full(device: torch.device, digits: ImageSet) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, 16, 16, generator=generator)
    layer = nn.Conv2d(32, 64, 3, padding=1)
    want = layer.double()(x.double())
    layer = layer.float().to(device)
    with context_on(device, digits, "precision=float32").float32_as_asked():
        found = layer(x.to(device)).detach().cpu().double()
    assert float((found - want).abs().max()) < 2e-5  # TF32 is off by about 1e-3


def test_probabilities_of_the_first_rows(device: torch.device, digits: ImageSet) -> None:
    context = context_on(device, digits)
    stage = stage_on("train", context)
    whole_set = probabilities(context, stage.network)
    assert torch.equal(probabilities(context, stage.network, 77), whole_set[:77])
