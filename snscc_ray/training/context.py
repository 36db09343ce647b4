"""The input of every stage, the clean pass over the dataset, and the interface of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from snscc_ray.config.settings import Recipe, StageName, StageSettings, View
from snscc_ray.core import distributed, rng
from snscc_ray.core.clustering import metrics
from snscc_ray.core.views import Normalize, clean_view, make_views
from snscc_ray.data.loading.bank import FeatureBank, bank_views
from snscc_ray.data.loading.resident import Batch, Images, Viewer

Network = TypeVar("Network", bound=nn.Module)

# Largest batch size of a clean pass: large for speed, as nothing is kept for a backward pass.
_PASS_ROWS = 1024
# Pixels of a batch at most, to limit the memory and, on a CPU, to stay in its cache.
_PASS_PIXELS = {"cpu": 2**20, "cuda": 2**24}
# Batch size of a clean pass through a frozen encoder, or over its cached features.
_FROZEN_ROWS = {"cpu": 64, "cuda": 512}
# Smallest batch size of a clean pass on a CPU, where smaller batches use other kernels.
_LEAST_ROWS = 8


@dataclass(frozen=True)
class Context:
    """Recipe, data and device of a stage; labels are for measuring only."""

    recipe: Recipe
    data: Images
    labels_N: Tensor | None
    normalize: Normalize
    device: torch.device
    # Shows the progress of work outside the epochs; see `Monitor.count`.
    count: Callable[..., None] = lambda task, done, total, unit="rows": None

    def key(self, *parts: int | str) -> int:
        return rng.fold(self.recipe.seed, *parts)

    def to_device(self, network: Network) -> Network:
        """Move the network to the device, in channels_last, with synchronised batch norms."""
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        distributed.synchronise_batch_norm(network)
        return network

    @property
    def mixed(self) -> bool:
        choice = self.recipe.precision
        return choice == "bfloat16" or (choice == "auto" and self.device.type == "cuda")

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    @contextmanager
    def float32_as_asked(self) -> Iterator[None]:
        """With precision float32, run GPU convolutions and products in full float32.

        By default cuDNN rounds the factors of float32 convolutions to TF32 (10 bits).
        """
        if self.mixed or self.device.type != "cuda":
            yield
            return
        # torch's type stubs lack `conv` so far.
        settings: Any = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
        former = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            for setting, value in zip(settings, former, strict=True):
                setting.fp32_precision = value

    @contextmanager
    def few_threads(self) -> Iterator[None]:
        """Use one thread for the small products of cached features on a CPU.

        Several threads would wait for one another at each; on a busy machine that takes five times
        as long.
        """
        if self.device.type != "cpu" or not isinstance(self.data, FeatureBank):
            yield
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def clean_pass(
        self,
        network: nn.Module,
        output: Callable[[Tensor], Tensor],
        rows: int | None = None,
        task: str | None = None,
    ) -> Tensor:
        """Return `output` of every clean image in row order, (N, ...) float32, in eval mode.

        Each worker computes its share of the rows; all workers get all rows. An image gets the
        same output in any batch. rows: use only this many rows, from the first. task: the name by
        which the progress is shown; None: it is not shown.
        """
        total = len(self.data) if rows is None else min(rows, len(self.data))
        first, last = distributed.own_share(total)
        network.eval()
        with self.autocast(), self.float32_as_asked():
            parts, done = [], 0
            for inputs in self.data.slices(first, last, _PASS_ROWS):
                parts.append(self.output_of(output, self.clean(inputs)))
                done += len(inputs)
                if task is not None:
                    self.count(task, done, last - first)
        network.train()
        return distributed.gather(torch.cat(parts), total)

    def output_of(self, output: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `output` of every row of `x` in float32, by batches of limited memory."""
        if self.recipe.encoder.frozen:
            # Features come from the cache or from images, and must be the same to the last bit.
            most = size = _FROZEN_ROWS[self.device.type]
        else:
            pixels = x.shape[2] * x.shape[3]
            most = min(max(_PASS_PIXELS[self.device.type] // pixels, _LEAST_ROWS), _PASS_ROWS)
            # On a GPU the batch size selects the kernels, and so affects the last bits.
            size = most if self.device.type == "cuda" else _LEAST_ROWS
        return torch.cat([_filled_up(output, part, size).float() for part in x.split(most)])

    def clean(self, inputs: Tensor) -> Tensor:
        """Return the clean view of images or of cached features."""
        if isinstance(self.data, FeatureBank):
            return inputs[:, 0].float()
        return clean_view(inputs, self.normalize)

    def viewer(self, views: tuple[View | None, ...], keys: tuple[int, ...]) -> Viewer:
        """Return the function that makes a batch's views; None is the clean view.

        Of cached features, a view that is not None is one of the cached augmented views.
        """
        if isinstance(self.data, FeatureBank):
            return partial(bank_views, drawn=tuple(view is not None for view in views), keys=keys)
        return partial(make_views, views=views, keys=keys, normalize=self.normalize)

    def measure(
        self, clusters_N: Tensor, neighbors_NK: Tensor, confidence_N: Tensor | None = None
    ) -> dict[str, float]:
        """Return an assignment's health figures and, if there are labels, its oracle figures."""
        figures = metrics.health(
            clusters_N,
            neighbors_NK,
            self.recipe.data.num_clusters,
            confidence_N,
            self.recipe.train.max_imbalance,
        )
        if self.labels_N is not None:
            figures |= metrics.oracle(self.labels_N, clusters_N)
        return figures


def _filled_up(output: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Return `output` of a batch, which is padded to at least `size` rows by repeating its rows."""
    B = len(x)
    copies = -(-size // B)
    return output(x if copies == 1 else torch.cat([x] * copies)[:size])[:B]


class Stage(Protocol):
    """Interface of a stage. The engine owns the loop, the optimiser and the checkpoints."""

    name: StageName

    @property
    def settings(self) -> StageSettings: ...

    @property
    def network(self) -> nn.Module: ...

    def viewer(self, epoch: int) -> Viewer:
        """Return the function that makes an epoch's views."""
        ...

    def begin_epoch(self, epoch: int) -> None: ...

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        """Return named loss terms whose sum is the objective; `forward` is the wrapped network."""
        ...

    def after_step(self) -> None: ...

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Return health figures and, if there are labels, oracle figures."""
        ...

    def finish(self) -> dict[str, float]:
        """Finalise the network after the last epoch, and return the stage's final figures."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the network."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...
