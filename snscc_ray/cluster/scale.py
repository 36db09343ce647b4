"""What a run needs from a cluster, and checks before training starts; does not import Ray.

Ray's errors come late and span many lines. These checks fail early, with one line. They run on
every node, without torch where no GPU is asked for: its import takes seconds and half a gigabyte.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import psutil

from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import as_path
from snscc_ray.config.settings import Recipe

_PACKAGES = ("snscc-ray", "torch", "ray")
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Scale:
    """How many workers, their resources, and the cluster."""

    workers: tuple[int, int]  # fewest and most
    gpu: bool = False
    cpus: float | None = None  # per worker; None: 1, or an equal share on this machine alone
    address: str | None = None  # of the cluster; None: RAY_ADDRESS, or this machine alone
    wait: float = 600.0  # seconds until the workers must be placed
    # The command's advice against too many workers, and against too large ones.
    fewer: str = "use fewer --workers, wait longer with --wait"
    smaller: str = "ask for fewer --cpus-per-worker"

    def bundle(self, cluster_cpus: float) -> dict[str, float]:
        """Return the resources of one worker, given the cluster's number of CPUs."""
        if self.cpus is not None:
            cpus = self.cpus
        elif self.gpu or not self.alone:
            cpus = 1.0
        else:
            cpus = max(1.0, cluster_cpus // self.workers[1])
        return {"CPU": cpus, "GPU": 1.0} if self.gpu else {"CPU": cpus}

    @property
    def counts(self) -> range:
        """Every number of workers that may train."""
        return range(self.workers[0], self.workers[1] + 1)

    @property
    def alone(self) -> bool:
        """Whether Ray is started for this run, on this machine."""
        return not self.address and not os.environ.get("RAY_ADDRESS")


def check_device(recipe: Recipe, gpu: bool) -> None:
    """Raise UserError if a recipe needs the GPUs that its workers do not have."""
    if recipe.runtime.device == "cuda" and not gpu:
        raise UserError("runtime.device=cuda needs workers with one GPU each; add --gpu")


def check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at the address: Ray would retry for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return  # auto, local or ray://: left to Ray
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: no answer ({error}); start the cluster, or leave --address out "
            "to run on this machine"
        ) from error


def why_not_joined(address: str, error: BaseException, said: str) -> str:
    """Explain why joining failed.

    said: what Ray wrote to stderr, in case its error does not give the reason.
    """
    reason = " ".join(str(error).split())
    if "ersion mismatch" in reason:
        return (
            f"the cluster at {address} has another version of Ray or Python than this machine "
            f"(here: Ray {importlib.metadata.version('ray')}, Python {platform.python_version()}): "
            f"install the same versions on both. Ray says: {reason[:300]}"
        )
    if "uthenticat" in reason + said or "token" in reason.lower():
        return (
            f"the cluster at {address} refused the token: set RAY_AUTH_MODE=token and put the "
            f"cluster's token where RAY_AUTH_TOKEN_PATH says. Ray says: {reason[:300]}"
        )
    return f"cannot join a Ray cluster at {address}: {reason[:300]}; is `ray start` running there?"


@contextmanager
def stderr_into(file: IO[str]) -> Iterator[None]:
    """Redirect this process's stderr, including that of Ray's C++ code, into a file."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def why_failed(error: BaseException) -> str:
    """Return an error message with the last line of Ray's error, which gives the cause."""
    failures = getattr(error, "worker_failures", None) or {}
    cause: object = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (
        f"the workers failed too often: {lines[-1] if lines else type(error).__name__}; fix that "
        "and run the same command again to continue, or raise runtime.max_failures"
    )


def check_fits(
    bundle: Mapping[str, float], fewest: int, free: Mapping[str, float], there: Mapping[str, float]
) -> None:
    """Raise UserError if a cluster that cannot grow is too small for the workers."""
    for kind, amount in bundle.items():
        fit = math.floor(there.get(kind, 0) / amount)
        if fit < fewest:
            without = "leave --gpu out" if kind == "GPU" else "ask for fewer --cpus-per-worker"
            mend = f"use --workers {fit}" if fit else without
            raise UserError(
                f"--workers {fewest} of {amounts(bundle)} each do not fit on this machine: "
                f"{free_of(free, there)}; {mend}, or join a cluster with --address"
            )


def too_small(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Return a message if no node that is up can hold even one worker, else None."""
    if any(all(node.get(k, 0) >= amount for k, amount in bundle.items()) for node in nodes):
        return None
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in bundle}
    return f"no running node is large enough for one (at most {amounts(most)} on a node)"


def amounts(bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())


def free_of(free: Mapping[str, float], there: Mapping[str, float]) -> str:
    kinds = [kind for kind in ("CPU", "GPU") if there.get(kind)]
    return " and ".join(f"{free.get(k, 0):g} of {there[k]:g} {k} free" for k in kinds) or "no CPU"


# ------------------------------------------------------------------------ what a node looks like


@dataclass(frozen=True)
class Probe:
    """What the node of one worker offers."""

    node: str  # its name and address
    versions: dict[str, str]
    memory: int  # free bytes of the node
    gpu_memory: int | None  # free bytes of the worker's GPU; None: it uses none, or torch sees none


def probe_node(address: str, gpu: bool) -> Probe:
    """Probe this node for a worker. `address` is its address in the cluster."""
    return Probe(
        node=_called(address),
        versions={package: importlib.metadata.version(package) for package in _PACKAGES},
        memory=psutil.virtual_memory().available,
        gpu_memory=_gpu_memory() if gpu else None,
    )


def _gpu_memory() -> int | None:
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def _called(address: str) -> str:
    return f"{socket.gethostname()} ({address})"


def check_alike(probes: Sequence[Probe], gpu: bool) -> None:
    """Raise UserError if a node has other package versions or, with `gpu`, torch sees no GPU."""
    here = {package: importlib.metadata.version(package) for package in _PACKAGES}
    for probe in probes:
        for package, version in here.items():
            if probe.versions[package] != version:
                raise UserError(
                    f"node {probe.node} has {package} {probe.versions[package]} and this machine "
                    f"{version}: install the same version on both"
                )
        if gpu and probe.gpu_memory is None:
            raise UserError(
                f"node {probe.node} has a GPU, but torch sees none there: install a torch built "
                "for its CUDA driver, or leave --gpu out"
            )


def free_object_store(probes: Sequence[Probe]) -> int:
    """Return the bytes that each worker can use for images."""
    on_node = Counter(probe.node for probe in probes)
    # On each node, every worker holds the dataset, and the object store holds it once more.
    host = min(probe.memory // (on_node[probe.node] + 1) for probe in probes)
    return min([host, *(probe.gpu_memory for probe in probes if probe.gpu_memory is not None)])


def unseen(address: str, marker: str, token: str, files: list[str]) -> str | None:
    """Return why this node cannot see the run folder's marker or a shard, or None if it can."""
    node = _called(address)
    path = as_path(marker)
    if not path.exists() or path.read_text() != token:
        return (
            f"node {node} does not see {path.parent}: give an --out (or a --storage, with `snscc "
            "run`) that every node sees, such as s3://BUCKET/runs or a shared file system"
        )
    return unread(address, files)


def unread(address: str, files: list[str]) -> str | None:
    """Return a message about the first file that this node cannot read, or None."""
    for file in files:
        try:
            with as_path(file).open("rb") as opened:
                opened.read(4)
        except OSError as error:
            return (
                f"node {_called(address)} cannot read {file} ({error.strerror or error}): give "
                "images that every node sees, or copy them to it"
            )
    return None
