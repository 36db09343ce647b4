"""What every stage is given, and the clean pass over the whole set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from snscc_ray import distributed, metrics, rng
from snscc_ray.config import Recipe, StageName, StageSettings
from snscc_ray.data.resident import Batch, Images, Viewer
from snscc_ray.views import Normalize, clean_view

Network = TypeVar("Network", bound=nn.Module)

# Rows of a clean pass at a time: large enough for speed, and nothing is kept for a backward pass.
_PASS_ROWS = 1024
# And at least.
_COMPANY = 8


@dataclass(frozen=True)
class Context:
    """The recipe, the data and the machine; labels are for measuring only."""

    recipe: Recipe
    data: Images
    labels_N: Tensor | None
    normalize: Normalize
    device: torch.device

    def key(self, *parts: int | str) -> int:
        return rng.fold(self.recipe.seed, *parts)

    def place(self, network: Network) -> Network:
        """The network on the device, laid out for convolutions, its batch norms synchronised."""
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        distributed.synchronise_batch_norm(network)
        return network

    @property
    def mixed(self) -> bool:
        choice = self.recipe.precision
        return choice == "bfloat16" or (choice == "auto" and self.device.type == "cuda")

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    @torch.no_grad()
    def clean_pass(self, network: nn.Module, output: Callable[[Tensor], Tensor]) -> Tensor:
        """`output` of every clean image in row order, (N, ...) float32, in eval mode.

        Each worker computes its share of the rows; all of them get the whole.
        """
        first, last = distributed.own_share(len(self.data))
        network.eval()
        with self.autocast():
            parts = [
                _in_company(output, clean_view(images, self.normalize)).float()
                for images in self.data.slices(first, last, _PASS_ROWS)
            ]
        network.train()
        return distributed.gather(torch.cat(parts), len(self.data))

    def measure(
        self, clusters_N: Tensor, neighbors_NK: Tensor, confidence_N: Tensor | None = None
    ) -> dict[str, float]:
        """Health of an assignment and, where there are labels, its oracle figures."""
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


def _in_company(output: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """`output` of a batch. A very small one, which takes other kernels on a CPU and comes out with
    other last bits, is filled up, so that an image gets what it gets among many."""
    B = len(x_BCHW)
    return output(x_BCHW if B >= _COMPANY else x_BCHW.repeat(-(-_COMPANY // B), 1, 1, 1))[:B]


class Stage(Protocol):
    """What the engine asks of a stage. The loop, the optimiser and the checkpoints are its own."""

    name: StageName

    @property
    def settings(self) -> StageSettings: ...

    @property
    def network(self) -> nn.Module: ...

    def viewer(self, epoch: int) -> Viewer:
        """What makes the views that the steps of an epoch look at."""
        ...

    def begin_epoch(self, epoch: int) -> None: ...

    def step(
        self, forward: nn.Module, views: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        """Named loss terms whose sum is the objective; `forward` is the network, wrapped."""
        ...

    def after_step(self) -> None: ...

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Health, and oracle figures where there are labels."""
        ...

    def finish(self) -> dict[str, float]:
        """Bring the network to its final form after the last epoch; the stage's final figures."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the network."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...
