"""The nodes of a Ray cluster: join it, reserve workers, and check what each node can see."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from snscc_ray.cluster.scale import (
    Probe,
    Scale,
    amounts,
    check_fits,
    check_reachable,
    free_of,
    probe_node,
    stderr_into,
    too_small,
    unseen,
    why_not_joined,
)
from snscc_ray.config.errors import UserError
from snscc_ray.config.paths import is_url
from snscc_ray.core.storage import write_whole
from snscc_ray.runs.folder import SEEN
from snscc_ray.runs.local import terminated_like_interrupted
from snscc_ray.texts import counted

LINE_SECONDS = 10.0  # between two lines that say what is waited for


@contextmanager
def connected(scale: Scale) -> Iterator[None]:
    """Join the cluster, or start Ray on this machine.

    Raises UserError if that fails, or if Ray's memory and disk fill up.
    """
    address = scale.address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    check_reachable(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        quiet["include_dashboard"] = False
    with tempfile.TemporaryFile("w+") as said:
        try:
            with stderr_into(said):
                ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            said.seek(0)
            raise UserError(why_not_joined(address, error, said.read())) from error
    try:
        # Ray has installed a SIGTERM handler that aborts with a stack dump.
        with terminated_like_interrupted():
            yield
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
        raise UserError(
            "Ray's object store is full, and so is the disk it spills to (Ray keeps 5 % of it "
            "free): free some space on every node, and run the same command again"
        ) from error
    except ray.exceptions.OutOfMemoryError as error:
        raise UserError(
            "a node ran out of memory, so Ray ended a worker there: use fewer --workers, or nodes "
            "with more memory, and run the same command again"
        ) from error
    finally:
        ray.shutdown()


@contextmanager
def reserved(scale: Scale, say: Callable[[str], None]) -> Iterator[list[Probe]]:
    """Reserve the minimum number of workers, yield a probe of each, and release them at the end.

    Raises UserError if they cannot be placed: immediately on this machine alone, which cannot
    grow; on a cluster after `scale.wait` seconds. The error says what is free.
    """
    bundle, fewest = bundle_of(scale), scale.workers[0]
    if scale.alone:
        check_fits(bundle, fewest, ray.available_resources(), ray.cluster_resources())
    group = placement_group([bundle] * fewest, strategy="PACK")
    try:
        give_up, shown = time.monotonic() + scale.wait, time.monotonic()
        while not group.wait(1):
            why = _too_small(bundle) or _free()
            if time.monotonic() > give_up:
                raise not_placed(scale, fewest)
            if time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                left = give_up - shown
                say(
                    f"waiting for {counted(fewest, 'worker')} of {amounts(bundle)}: {why}; "
                    f"giving up in {left:.0f} s"
                )
        yield _probe(group, bundle, fewest)
    finally:
        remove_placement_group(group)


def bundle_of(scale: Scale) -> dict[str, float]:
    """Return the resources that each worker takes."""
    return scale.bundle(ray.cluster_resources().get("CPU", 1))


def not_placed(scale: Scale, workers: int) -> UserError:
    """Return the error for workers that could not be placed in time."""
    bundle = bundle_of(scale)
    small = _too_small(bundle)
    return UserError(
        f"{counted(workers, 'worker')} of {amounts(bundle)} could not be placed within "
        f"{scale.wait:g} s: {small or _free()}; {scale.smaller if small else scale.fewer}, or see "
        "with `ray status` why nodes do not come"
    )


def _too_small(bundle: dict[str, float]) -> str | None:
    return too_small(bundle, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def _free() -> str:
    return free_of(ray.available_resources(), ray.cluster_resources())


def _probe(group: Any, bundle: dict[str, float], workers: int) -> list[Probe]:
    """Probe the node of each worker, from a task running there."""
    gpu = "GPU" in bundle
    task = ray.remote(lambda: probe_node(ray.util.get_node_ip_address(), gpu))
    results = [
        task.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
        ).remote()
        for index in range(workers)
    ]
    try:
        return list(ray.get(results))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, ImportError):
            raise UserError(
                f"a node of the cluster lacks a package ({cause}): install snscc_ray on every "
                "node, as cluster.yaml does in its setup_commands"
            ) from error
        raise


def check_visible(folder: Path, files: Sequence[str]) -> None:
    """Raise UserError, naming both, if a node cannot see the run folder or some shards."""
    marker, token = folder / f"{SEEN}{secrets.token_hex(8)}", secrets.token_hex(8)
    made = [] if is_url(folder) else [p for p in (folder, *folder.parents) if not p.exists()]
    write_whole(marker, lambda file: file.write(token.encode()))
    try:
        ask_every_node(unseen, str(marker), token, list(files))
    finally:
        with suppress(OSError):
            marker.unlink()
            for place in made:  # leave no new folders behind
                place.rmdir()


def ask_every_node(problem_of: Callable[..., str | None], *arguments: object) -> None:
    """Call `problem_of` on every node that is up. Raises UserError with the first problem.

    All nodes are asked, not only those of the workers: after a loss, workers may be placed
    anywhere.
    """
    task = ray.remote(lambda *what: problem_of(ray.util.get_node_ip_address(), *what))
    checks = [
        task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(*arguments)
        for node in ray.nodes()
        if node["Alive"]
    ]
    for problem in ray.get(checks):
        if problem is not None:
            raise UserError(problem)
