"""The Ray cluster a run goes to: joining it, finding room in it, and looking at where it will run.

Ray raises its errors late and many lines long; what can be known before training starts is found
out here and said in one.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from snscc_ray.checkpoints import write_whole
from snscc_ray.errors import UserError
from snscc_ray.local import terminated_like_interrupted
from snscc_ray.paths import as_path, is_url
from snscc_ray.run_folder import SEEN

_PACKAGES = ("snscc-ray", "torch", "ray")
_CONNECT_SECONDS = 5.0
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Scale:
    """How many workers, with what, and where."""

    workers: tuple[int, int]  # fewest and most
    gpu: bool = False
    cpus: float | None = None  # per worker; None: 1, or, on this machine alone, an equal share
    address: str | None = None  # of the cluster; None: RAY_ADDRESS, or this machine alone
    wait: float = 600.0  # seconds until the workers must be placed

    def bundle(self) -> dict[str, float]:
        """What one worker takes. Called once Ray is there."""
        if self.cpus is not None:
            cpus = self.cpus
        elif self.gpu or not self.alone:
            cpus = 1.0
        else:
            cpus = max(1.0, ray.cluster_resources().get("CPU", 1) // self.workers[1])
        return {"CPU": cpus, "GPU": 1.0} if self.gpu else {"CPU": cpus}

    @property
    def alone(self) -> bool:
        """Whether Ray is started for this run, on this machine."""
        return not self.address and not os.environ.get("RAY_ADDRESS")


@contextmanager
def connected(scale: Scale) -> Iterator[None]:
    """Join the cluster, or start Ray on this machine. Raises UserError when that fails."""
    address = scale.address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_reachable(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        quiet["include_dashboard"] = False
    with tempfile.TemporaryFile("w+") as said:
        try:
            with _stderr_into(said):
                ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            said.seek(0)
            raise UserError(_why_not_joined(address, error, said.read())) from error
    try:
        # Ray has put its own handler of SIGTERM in place, which aborts with a dump of the stack.
        with terminated_like_interrupted():
            yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray would try for minutes to reach an address where nobody listens."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return  # auto, local or ray://: Ray's own business
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error}); start the cluster, or leave "
            "--address out to run on this machine"
        ) from error


@contextmanager
def _stderr_into(file: IO[str]) -> Iterator[None]:
    """Have a file take what this process, Ray's C++ part included, writes to stderr."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _why_not_joined(address: str, error: BaseException, said: str) -> str:
    """`said`: Ray's words on stderr, where its error does not tell the reason."""
    reason = " ".join(str(error).split())
    if "ersion mismatch" in reason:
        return (
            f"the cluster at {address} runs another Ray or Python than this machine "
            f"(here: Ray {ray.__version__}, Python {platform.python_version()}): install the same "
            f"versions on both. Ray says: {reason[:300]}"
        )
    if "uthenticat" in reason + said or "token" in reason.lower():
        return (
            f"the cluster at {address} refused the token: set RAY_AUTH_MODE=token and put the "
            f"cluster's token where RAY_AUTH_TOKEN_PATH says. Ray says: {reason[:300]}"
        )
    return f"cannot join a Ray cluster at {address}: {reason[:300]}; is `ray start` running there?"


@contextmanager
def placed(scale: Scale, say: Callable[[str], None]) -> Iterator[list[Probe]]:
    """Reserve the fewest workers asked for, probe where they stand, and let go of them after.

    Raises UserError when they cannot be placed: at once on this machine alone, which does not
    grow, and after `scale.wait` seconds on a cluster, saying what is free.
    """
    bundle, fewest = scale.bundle(), scale.workers[0]
    if scale.alone:
        _check_fits(bundle, fewest)
    group = placement_group([bundle] * fewest, strategy="PACK")
    try:
        give_up, shown = time.monotonic() + scale.wait, time.monotonic()
        while not group.wait(1):
            if time.monotonic() > give_up:
                raise UserError(
                    f"{fewest} workers of {_amount(bundle)} could not be placed within "
                    f"{scale.wait:g} s: {_free()}; use fewer --workers, wait longer with --wait, "
                    "or see why nodes do not come with `ray status`"
                )
            if time.monotonic() - shown > _LINE_SECONDS:
                shown = time.monotonic()
                left = give_up - shown
                say(
                    f"waiting for {fewest} workers of {_amount(bundle)} each: {_free()}; "
                    f"giving up in {left:.0f} s"
                )
        yield _probe(group, bundle, fewest)
    finally:
        remove_placement_group(group)


def _check_fits(bundle: dict[str, float], fewest: int) -> None:
    there = ray.cluster_resources()
    for kind, amount in bundle.items():
        fit = math.floor(there.get(kind, 0) / amount) if amount else fewest
        if fit < fewest:
            without = "leave --gpu out" if kind == "GPU" else "ask for fewer --cpus-per-worker"
            mend = f"use --workers {fit}" if fit else without
            raise UserError(
                f"--workers {fewest} of {_amount(bundle)} each do not fit on this machine: "
                f"{_free()}; {mend}, or join a cluster with --address"
            )


def _amount(bundle: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())


def _free() -> str:
    free, there = ray.available_resources(), ray.cluster_resources()
    kinds = [kind for kind in ("CPU", "GPU") if there.get(kind)]
    return " and ".join(f"{free.get(k, 0):g} of {there[k]:g} {k} free" for k in kinds) or "no CPU"


# ----------------------------------------------------------------------------- probing nodes


@dataclass(frozen=True)
class Probe:
    """What one worker's place offers."""

    node: str  # its name and address
    versions: dict[str, str]
    memory: int  # bytes free, of the node
    gpu_memory: int | None  # bytes free, of the worker's GPU


def _probe(group: Any, bundle: dict[str, float], workers: int) -> list[Probe]:
    return _on_each(group, bundle, workers, _look)


def _on_each(
    group: Any, bundle: dict[str, float], workers: int, task: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """Run a task in each worker's place."""
    remote = ray.remote(task)
    results = [
        remote.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
        ).remote(*arguments)
        for index in range(workers)
    ]
    try:
        return ray.get(results)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        if isinstance(cause, ImportError):
            raise UserError(
                f"a node of the cluster lacks a package ({cause}): install snscc_ray on every "
                "node, as cluster.yaml does in its setup_commands"
            ) from error
        raise


def _look() -> Probe:
    cuda = torch.cuda.is_available()
    return Probe(
        node=f"{socket.gethostname()} ({ray.util.get_node_ip_address()})",
        versions={package: importlib.metadata.version(package) for package in _PACKAGES},
        memory=psutil.virtual_memory().available,
        gpu_memory=torch.cuda.mem_get_info()[0] if cuda else None,
    )


def check_alike(probes: Sequence[Probe], gpu: bool) -> None:
    """Refuse nodes that differ from this machine in what they would compute. Raises UserError."""
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
                f"node {probe.node} gives a GPU, but torch sees none there: install a torch built "
                "for its CUDA driver, or leave --gpu out"
            )


def check_visible(folder: Path, files: Sequence[str]) -> None:
    """Refuse a run folder or shards that some node cannot see. Raises UserError naming both.

    One task on every node that is up, wherever workers will be placed: after a loss they may be
    placed anywhere.
    """
    marker, token = folder / f"{SEEN}{secrets.token_hex(8)}", secrets.token_hex(8)
    made = [] if is_url(folder) else [p for p in (folder, *folder.parents) if not p.exists()]
    write_whole(marker, lambda file: file.write(token.encode()))
    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        look = ray.remote(_see)
        checks = [
            look.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                    node, soft=False
                ),
            ).remote(str(marker), token, list(files))
            for node in nodes
        ]
        for problem in ray.get(checks):
            if problem is not None:
                raise UserError(problem)
    finally:
        with suppress(OSError):
            marker.unlink()
            for place in made:  # what is refused leaves no folder behind
                place.rmdir()


def _see(marker: str, token: str, files: list[str]) -> str | None:
    node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    path = as_path(marker)
    if not path.exists() or path.read_text() != token:
        return (
            f"node {node} does not see {path.parent}: give a --storage that every node sees, such "
            "as s3://BUCKET/runs or a shared file system"
        )
    for file in files:
        try:
            with as_path(file).open("rb") as opened:
                opened.read(4)
        except OSError as error:
            return (
                f"node {node} cannot read {file} ({error.strerror or error}): give a --data that "
                "every node sees, or copy it there"
            )
    return None
