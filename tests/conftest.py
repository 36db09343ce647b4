"""Small things several tests need. Tests that need the shared image shards skip without them."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import STAGES, Recipe, StageName
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.sources import load_images
from snscc_ray.runs.run import Result, execute, normalisation
from snscc_ray.training.context import Context
from snscc_ray.training.engine import Monitor
from snscc_ray.training.workers import Worker


def pytest_configure() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, which tests send."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: one of them alone at the end would take long."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# 200 real digits, a ConvNet of four channels: a stage trains in a second.
TINY = (
    "data.limit=200",
    "data.image_size=8",
    "encoder.width=4",
    "pretrain.epochs=3",
    "pretrain.batch_size=32",
    "pretrain.projection_hidden=16",
    "pretrain.projection_dim=8",
    "train.epochs=3",
    "train.batch_size=32",
    "boost.epochs=3",
    "boost.batch_size=32",
    # The tiny network is never sure: a low γ lets Boost select something.
    "boost.confidence_threshold=0.3",
    "runtime.checkpoint_seconds=0",
    "runtime.device=cpu",
)


def shards(name: str) -> Path:
    """The folder of that shared image set; skips the test where it is absent."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the shared image shards {name} are not beside this checkout")
    return folder


def execute_on(
    recipe: Recipe,
    images: ImageSet,
    folder: Path,
    worker: Worker,
    monitor: Monitor,
    stages: tuple[StageName, ...] = STAGES,
) -> Result:
    """Run the stages on images in memory."""
    data = ResidentData(images.images, worker.device)
    return execute(recipe, images.catalog, data, folder, worker, monitor, stages)


def digits_table(rows: int) -> pa.Table:
    """The first real digits as PNG with their labels: what shards hold."""
    images = load_images(override(recipes.get("digits"), [f"data.limit={rows}"]).data)
    assert images.catalog.labels is not None
    encoded = []
    for pixels in images.images:
        file = io.BytesIO()
        Image.fromarray(pixels[0].numpy()).save(file, "PNG")
        encoded.append(file.getvalue())
    return pa.table({"image": encoded, "label": images.catalog.labels.numpy()})


@pytest.fixture
def tiny() -> Recipe:
    return override(recipes.get("digits"), TINY)


@pytest.fixture(scope="session")
def tiny_images() -> ImageSet:
    return load_images(override(recipes.get("digits"), TINY).data)


@pytest.fixture
def context(tiny: Recipe, tiny_images: ImageSet) -> Context:
    return make_context(tiny, tiny_images)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """torch.hub's own folder, of which torchvision takes what it finds there."""
    former = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(former)


def make_context(recipe: Recipe, images: ImageSet) -> Context:
    device = torch.device("cpu")
    data = ResidentData(images.images, device)
    return Context(
        recipe, data, images.catalog.labels, normalisation(recipe, images.catalog), device
    )


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
