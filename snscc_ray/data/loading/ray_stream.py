"""Read a dataset with Ray Data: once before the first epoch, and again in every epoch.

`survey` and `order` plan what is read. Ray Data runs the plan on the cluster, in order and within
a memory bound. A task takes a few slices and returns their bytes or an error message. A UserError
is returned, not raised, because Ray would print and repeat it.

Tasks request no CPUs; their number is limited instead. The training workers hold their CPUs while
they run, so with all CPUs taken, tasks that request some would never start.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from torch import Tensor

from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.config.settings import DataSettings, Recipe
from snscc_ray.core import distributed
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import Catalog, assemble
from snscc_ray.data.loading.kept_survey import kept_or
from snscc_ray.data.loading.resident import Images, ResidentData, Viewer
from snscc_ray.data.loading.slices import (
    VIEWS_BYTES,
    Findings,
    Slice,
    examine,
    image_bytes,
    read_slice,
)
from snscc_ray.data.loading.streamed import Decoded, Reader, StreamedData, decoded
from snscc_ray.data.loading.survey import StreamedSet, check_streamed, choose_mode, conclude, plan
from snscc_ray.data.rows import Rows

# For an error it prints pages, in addition to the exception that it raises.
logging.getLogger("ray.data").setLevel(logging.CRITICAL)

# Approximate decoded bytes of one task: a tenth of a second of work or more, so that starting the
# task is cheap in comparison.
_TASK_BYTES = 8 << 20
# Object store memory for a survey in progress, or for loading a resident dataset.
_STORE_BYTES = 256 << 20


# Loads a dataset for a device. It is picklable and called in each worker.
Load = Callable[[torch.device], Images]

Held = TypeVar("Held")  # what an actor predicts with


@dataclass(frozen=True)
class Shared:
    """A dataset that any number of workers can load."""

    catalog: Catalog
    load: Load
    order_name: str  # see `Images`


def share_images(recipe: Recipe, rows: Rows, free_bytes: int, display: Display) -> Shared:
    """Choose between memory and streaming, and read the dataset once. Raises UserError."""
    data = recipe.data
    mode, why = choose_mode(data, len(rows.ids), free_bytes, rows.streamable)
    display.line(f"images {mode}: {why}")
    progress = display.counting("reading", "images")
    if mode == "stream":
        check_streamed(recipe)
        streamed = ray_survey(rows, data, progress=progress, say=display.line)
        catalog = streamed.catalog
        load: Callable[[torch.device], Images] = partial(
            _streamed, ray.put(streamed), data.memory_mb
        )
        order_name = load(torch.device("cpu")).order_name  # reads nothing
    elif rows.streamable:
        dataset, streamed = ray_resident(rows, data, progress=progress)
        catalog, order_name = streamed.catalog, ResidentData.order_name
        load = partial(_decoded, dataset, ray.put(streamed))
    else:
        images = assemble(rows, data, recipe.runtime.decode_workers, progress)
        catalog, order_name = images.catalog, ResidentData.order_name
        load = partial(_array, ray.put(images.images.numpy()))
    display.finish()
    return Shared(catalog.for_clusters(data.num_clusters), load, order_name)


def _streamed(streamed: Any, memory_mb: int, device: torch.device) -> Images:
    held: StreamedSet = ray.get(streamed)
    return StreamedData(held, device, ray_reader(held, memory_mb))


def _decoded(dataset: Any, streamed: Any, device: torch.device) -> Images:
    return ResidentData(resident_images(dataset, ray.get(streamed)), device)


def _array(images: Any, device: torch.device) -> Images:
    # A copy: arrays in the object store are read-only, and torch warns about that.
    return ResidentData(torch.from_numpy(np.array(ray.get(images))), device)


def ray_survey(
    rows: Rows,
    data: DataSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StreamedSet:
    """Run `survey` on the whole cluster. Tasks return only digests and counts.

    Raises:
        UserError: as `survey` does.
    """
    slices = plan(rows, data)

    def fresh() -> Generator[Findings]:
        work = partial(_survey, data=data)
        dataset = _dataset(slices, image_bytes(data), work, _cpus(), _STORE_BYTES)
        with closing(_rows_of(dataset)) as found:
            yield from _findings(found)

    with closing(kept_or(rows, data, slices, fresh, say)) as findings:
        return conclude(rows, data, slices, findings, progress)


def ray_resident(
    rows: Rows, data: DataSettings, *, progress: Callable[[int, int], None] | None = None
) -> tuple[ray.data.Dataset, StreamedSet]:
    """Decode a whole dataset into the object store. Workers call `resident_images`.

    It stays in the object store as long as there is a reference to the returned Dataset.

    Raises:
        UserError: as `survey` does.
    """
    slices = plan(rows, data)
    work = partial(_survey, data=data, keep=True)
    held = _dataset(slices, image_bytes(data), work, _cpus(), _STORE_BYTES).materialize()
    about = held.select_columns(["error", "findings"], num_cpus=0)
    with closing(_rows_of(about)) as found:
        return held, conclude(rows, data, slices, _findings(found), progress)


def resident_images(
    dataset: ray.data.Dataset | ray.data.DataIterator, streamed: StreamedSet
) -> Tensor:
    """Return the whole dataset, uint8 (N, C, H, W) on the CPU, from the result of `ray_resident`.

    The dataset may also come from `ray.train.get_dataset_shard`, if it was not split.
    """
    shape = (streamed.channels, streamed.size, streamed.size)
    images = np.empty((len(streamed), *shape), np.uint8)
    with closing(_rows_of(dataset)) as found:
        for row in found:
            piece = streamed.slices[row["number"].as_py()]
            pixels = np.frombuffer(row["pixels"].as_buffer(), np.uint8)
            images[piece.first : piece.first + len(piece)] = pixels.reshape(-1, *shape)
    return torch.from_numpy(images)


def ray_reader(streamed: StreamedSet, memory_mb: int) -> Reader:
    """Return a reader for one training worker. Ray Data decodes its slices on any node."""

    def read(slices: Sequence[Slice], viewer: Viewer | None) -> Generator[Decoded]:
        tasks = max(1, _cpus() // distributed.world_size())
        work = partial(_decode, channels=streamed.channels, size=streamed.size, viewer=viewer)
        row_bytes = streamed.channels * streamed.size**2 * (VIEWS_BYTES if viewer else 1)
        dataset = _dataset(slices, row_bytes, work, tasks, memory_mb << 18)
        with closing(_rows_of(dataset)) as found:
            for piece, row in zip(slices, found, strict=True):
                yield _arrays(row["decoded"].as_buffer(), len(piece), streamed, viewer)

    return read


def ray_answers(
    rows: Rows,
    data: DataSettings,
    held: Held,
    ready: Callable[[Held], Callable[[Tensor], pa.Table]],
    replicas: int,
    bundle: Mapping[str, float],
) -> Generator[tuple[int, list[tuple[int, str]], pa.Table | None]]:
    """Read a dataset once and predict on it with `replicas` actors, in the order of its rows.

    Each actor reserves the resources `bundle` and calls `ready(held)` once. The result maps images
    (uint8 (B, C, S, S), on the CPU) to a table with one row per image. For each part, yields the
    number of rows read, the (row, reason) of the unreadable ones, and the table of the others
    (None if there are none). Raises UserError for rows that cannot be streamed or a file that
    cannot be read, and TrainingError if an actor fails.
    """
    slices = plan(rows, data)
    make = partial(_made_ready, ray.put(held), ready)
    read = partial(_read, channels=data.channels, size=data.image_size)
    replicas = min(replicas, len(slices))
    dataset = _dataset(slices, image_bytes(data), read, _cpus(), _STORE_BYTES, replicas)
    dataset = dataset.map_batches(
        _Replica,
        fn_constructor_args=(make, (data.channels, data.image_size, data.image_size)),
        batch_size=1,  # the output of one reading task
        batch_format="pyarrow",
        num_cpus=None if "GPU" in bundle else bundle["CPU"],
        num_gpus=bundle.get("GPU"),
        compute=ray.data.ActorPoolStrategy(size=replicas),
    )
    _settle(dataset, _STORE_BYTES)
    try:
        with closing(_rows_of(dataset)) as found:
            for row in found:
                yield pickle.loads(row["answers"].as_py())
    except ray.exceptions.RayError as error:
        raise TrainingError(f"a worker failed, nothing is written: {error}") from error


def _made_ready(
    reference: Any, ready: Callable[[Held], Callable[[Tensor], pa.Table]]
) -> Callable[[Tensor], pa.Table]:
    return ready(ray.get(reference))


def _cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _arrays(content: pa.Buffer, rows: int, streamed: StreamedSet, viewer: Viewer | None) -> Decoded:
    side, channels = streamed.size, streamed.channels
    if viewer is None:
        return Decoded(np.frombuffer(content, np.uint8).reshape(rows, channels, side, side), None)
    views = np.frombuffer(content, np.float32).reshape(-1, rows, side, side, channels)
    return Decoded(None, tuple(views))


# ------------------------------------------------------------------------------- the pipeline


def _dataset(
    slices: Sequence[Slice],
    row_bytes: int,
    work: Callable[[Sequence[Slice], int], pa.Table],
    tasks: int,
    store_bytes: int,
    least: int = 1,
) -> ray.data.Dataset:
    """Run `work(slices, number of the first)` on all slices in order, in `tasks` parallel tasks.

    `least`: split the work into at least this many parts. There must be as many slices.
    """
    share = sum(map(len, slices)) * row_bytes // least
    groups = _grouped(slices, row_bytes, min(_TASK_BYTES, store_bytes // (4 * tasks), share))
    items = [{"work": pickle.dumps(group)} for group in groups]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _run,
        fn_args=(work,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=min(tasks, len(items))),
    )
    _settle(dataset, store_bytes)
    return dataset


def _settle(dataset: ray.data.Dataset, store_bytes: int) -> None:
    """Set the dataset to keep its order, limit its memory and print nothing."""
    context = dataset.context
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=store_bytes
    )


def _grouped(
    slices: Sequence[Slice], row_bytes: int, task_bytes: int
) -> Iterator[tuple[int, list[Slice]]]:
    """Group consecutive slices for one task each. Yields the number of the first and the group."""
    first, group, size = 0, list[Slice](), 0
    for number, piece in enumerate(slices):
        if group and size + len(piece) * row_bytes > task_bytes:
            yield first, group
            first, group, size = number, [], 0
        group.append(piece)
        size += len(piece) * row_bytes
    if group:
        yield first, group


@cache
def _stay() -> Any:
    """Keep this process alive for the tasks of later epochs: its imports took seconds.

    Ray ends idle processes when no CPU is free, which is usual beside training workers, but not a
    process that owns an object. They end with the job.
    """
    return ray.put(None)


def _run(table: pa.Table, work: Callable[[Sequence[Slice], int], pa.Table]) -> pa.Table:
    _stay()
    first, slices = pickle.loads(table["work"][0].as_py())
    try:
        return work(slices, first)
    except UserError as error:
        return pa.table({"error": [str(error)], "findings": pa.nulls(1, pa.binary())})


def _rows_of(
    dataset: ray.data.Dataset | ray.data.DataIterator,
) -> Generator[dict[str, pa.Scalar]]:
    """Yield the rows of a dataset in order. Raises UserError if a task returned one."""
    blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    with closing(blocks):
        for block in blocks:
            for error in block["error"].to_pylist():
                if error is not None:
                    raise UserError(error)
            for row in range(block.num_rows):
                yield {name: block[name][row] for name in block.column_names}


def _findings(found: Iterable[dict[str, pa.Scalar]]) -> Iterator[Findings]:
    for row in found:
        yield Findings(*pickle.loads(row["findings"].as_py()))


# ----------------------------------------------------------------------------- inside a task


def _decode(
    slices: Sequence[Slice], first: int, channels: int, size: int, viewer: Viewer | None
) -> pa.Table:
    contents: list[Sequence[np.ndarray]] = []
    for piece in slices:
        found = decoded(piece, channels, size, viewer)
        contents.append(found.arrays())
    return _table(decoded=_binary(contents))


def _survey(
    slices: Sequence[Slice], first: int, data: DataSettings, keep: bool = False
) -> pa.Table:
    findings: list[bytes] = []
    contents: list[list[np.ndarray]] = []
    for piece in slices:
        found, pixels = examine(piece, data.channels, data.image_size)
        findings.append(pickle.dumps(tuple(found)))
        contents.append([pixels] if keep else [])
    table = _table(findings=pa.array(findings, pa.binary()))
    if keep:
        numbers = pa.array(range(first, first + len(slices)), pa.int64())
        table = table.append_column("number", numbers)
        table = table.append_column("pixels", _binary(contents))
    return table


def _read(slices: Sequence[Slice], first: int, channels: int, size: int) -> pa.Table:
    failed: list[tuple[int, str]] = []
    contents: list[np.ndarray] = []
    for piece in slices:
        pixels, failures = read_slice(piece, channels, size)
        failed += [(piece.first + row, reason) for row, reason in failures]
        contents.append(np.delete(pixels, [row for row, _ in failures], axis=0))
    about = pickle.dumps((sum(piece.rows for piece in slices), failed))
    return _table(about=pa.array([about], pa.binary()), pixels=_binary([contents]))


class _Replica:
    """One of the actors that predict."""

    def __init__(
        self, make: Callable[[], Callable[[Tensor], pa.Table]], shape: tuple[int, int, int]
    ) -> None:
        self._answer, self._shape = make(), shape

    def __call__(self, table: pa.Table) -> pa.Table:
        if table["error"][0].is_valid:
            return table
        # A copy: arrays in the object store are read-only, and torch warns about that.
        pixels = np.array(np.frombuffer(table["pixels"][0].as_buffer(), np.uint8))
        images = torch.from_numpy(pixels).reshape(-1, *self._shape)
        answered = self._answer(images) if len(images) else None
        rows, failed = pickle.loads(table["about"][0].as_py())
        return _table(answers=pa.array([pickle.dumps((rows, failed, answered))], pa.binary()))


def _table(**columns: pa.Array) -> pa.Table:
    rows = len(next(iter(columns.values())))
    return pa.table({"error": pa.nulls(rows, pa.string()), **columns})


def _binary(contents: Sequence[Sequence[np.ndarray]]) -> pa.Array:
    """Return one binary value per element of `contents`: the concatenated bytes of its arrays."""
    sizes = [sum(array.nbytes for array in arrays) for arrays in contents]
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    content = np.concatenate([array.reshape(-1).view(np.uint8) for a in contents for array in a])
    buffers: list[Any] = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary(), len(sizes), buffers)
