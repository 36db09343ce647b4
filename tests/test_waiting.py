"""No step may wait for the device, proven without one: on `meta`, where tensors hold no values.

Reading a value there raises, whatever the op. What a GPU would allow but wait for is refused by
the modes below: operands on both sides, tensors made of Python lists on the device, copies that do
not go through `send`, and ops whose result has a size that depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe
from snscc_ray.core import views
from snscc_ray.core.clustering.mining import MinedNeighbors
from snscc_ray.core.views import clean_view
from snscc_ray.data.imageset import ImageSet
from snscc_ray.data.loading import resident
from snscc_ray.data.loading.resident import Batch, ResidentData
from snscc_ray.models.encoders import (
    ClusterHeads,
    ClusterNet,
    PretextNet,
    build_encoder,
    out_features,
)
from snscc_ray.runs.run import normalisation
from snscc_ray.training.context import Context, Stage
from snscc_ray.training.stages.boost import Boost
from snscc_ray.training.stages.pretrain import Pretrain
from snscc_ray.training.stages.train import Train

META = torch.device("meta")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "bincount", "_local_scalar_dense", "item")


class Waits(AssertionError):
    pass


def on(device: str, tree: Any) -> bool:
    # A tensor of no dimensions travels with the call.
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()]
    return any(tensor.device.type == device for tensor in tensors)


class RefuseOps(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if on("meta", (args, kwargs)):
            if on("cpu", (args, kwargs)):
                raise Waits(f"{name} has operands on both sides")
            if name in SIZED_BY_VALUES:
                raise Waits(f"{name} waits for values")
            masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor)]
            if name.startswith("index") and any(mask.dtype == torch.bool for mask in masks):
                raise Waits(f"{name} counts a mask")
        elif on("cpu", args) and torch.device(kwargs.get("device") or "cpu") == META:
            raise Waits(f"{name} copies without `send`")
        return func(*args, **kwargs)


class RefuseLists(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if made and result.device == META:
            raise Waits(f"{func.__name__} copies from a list")
        return result


@contextmanager
def nothing_waits() -> Iterator[None]:
    with RefuseOps(), RefuseLists():
        yield


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch, tiny: Recipe, tiny_images: ImageSet) -> Any:
    """A function from overrides to a context whose device is `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    def sent(x: Tensor, device: torch.device) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    for module in (views, resident):
        monkeypatch.setattr(module, "send", sent)

    def make(*assignments: str) -> Context:
        recipe = override(tiny, assignments)
        normalize = normalisation(recipe, tiny_images.catalog)
        data = ResidentData(tiny_images.images.to(META), META)
        clean_view(data.images_NCHW[:1], normalize)  # its constants are made once and kept
        return Context(recipe, data, None, normalize, META)

    return make


def pretrain(context: Context) -> Stage:
    return Pretrain(context)


def train(context: Context) -> Stage:
    encoder = build_encoder(context.recipe.encoder, context.recipe.data.channels)
    stage = Train(context, PretextNet(encoder, context.recipe.pretrain), mined(context))
    stage._p_NHC = torch.empty(len(context.data), 3, 10, device=META)
    return stage


def boost(context: Context) -> Stage:
    encoder = build_encoder(context.recipe.encoder, context.recipe.data.channels)
    heads = ClusterHeads(context.recipe.train, out_features(encoder), 10, heads=1)
    return Boost(context, context.to_device(ClusterNet(encoder, heads)), mined(context))


def mined(context: Context) -> MinedNeighbors:
    N, K = len(context.data), context.recipe.pretrain.mined_neighbors
    return MinedNeighbors(torch.randint(N, (N, K)).int(), torch.rand(N, K), torch.ones(N, K))


STRONG = '{"kind": "strong", "cutout": 4, "crop_scale": [0.5, 1]}'


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (pretrain, []),
        (pretrain, ["pretrain.method=moco", "pretrain.queue_size=64"]),
        (pretrain, ["data.channels=3", "data.mean=null", "data.std=null"]),
        (train, ["train.mined_from=images", f"train.view={STRONG}"]),
        (train, ["train.mined_from=predictions", "train.agreement=log"]),
        (train, ["train.objective=paper"]),
        (train, ["train.objective=released", "train.head=linear"]),
        (boost, [f"boost.view={STRONG}"]),
        (boost, ["boost.selection=batch", "boost.agreement=bce"]),
    ],
)
def test_no_step_waits_for_the_device(
    build: Callable[[Context], Stage], settings: list[str], on_meta: Any
) -> None:
    context = on_meta(*settings)
    if context.recipe.data.channels == 3:
        context.data.images_NCHW = context.data.images_NCHW.expand(-1, 3, -1, -1)
    stage = build(context)
    weights = list(stage.network.parameters())
    stage.network.train()
    totals: dict[str, Tensor] = {}
    with nothing_waits():
        viewer = stage.viewer(0)
        batches = context.data.epoch(stage.settings.batch_size, 7)
        for batch in islice(batches, 2):
            made = viewer(batch.inputs, batch.drawing_rows_B)
            terms = stage.step(stage.network, made, batch)
            torch.stack(list(terms.values())).sum().backward()
            stage.after_step()
            totals = {name: totals.get(name, 0) + term.detach() for name, term in terms.items()}
    assert totals and all(total.device == META for total in totals.values())
    assert all(weight.grad is not None for weight in weights)


def test_rows_on_the_device_would_wait(on_meta: Any) -> None:
    context = on_meta()
    batch = next(context.data.epoch(32, 7))
    viewer = pretrain(context).viewer(0)
    with pytest.raises((Waits, NotImplementedError, RuntimeError)), nothing_waits():
        viewer(batch.inputs, batch.rows_B)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.long().bincount(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.ones(4).to(META),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=META),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: x.cpu(),
    ],
)
def test_what_waits_is_seen(op: Callable[[Tensor], object]) -> None:
    x = torch.empty(4, device=META)
    with pytest.raises((Waits, NotImplementedError, RuntimeError)), nothing_waits():
        op(x)


def test_a_batch_draws_where_its_rows_are_on_the_cpu() -> None:
    rows_B = torch.arange(3)
    images_BCHW = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    assert Batch(images_BCHW, rows_B, 3).drawing_rows_B is rows_B
    away = Batch(images_BCHW, rows_B.to(META), 3, host_rows_B=rows_B)
    assert away.drawing_rows_B is rows_B
