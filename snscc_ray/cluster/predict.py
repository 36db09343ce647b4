"""`predict` on several workers of a Ray cluster."""

from __future__ import annotations

import tempfile
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from snscc_ray.answers.predict import Predictor, PredictRequest, PredictResult, conclude, prepare
from snscc_ray.cluster.nodes import ask_every_node, bundle_of, connected, reserved
from snscc_ray.cluster.scale import Scale, check_alike, stderr_into, unread
from snscc_ray.config.errors import UserError
from snscc_ray.core.display import Display
from snscc_ray.data.imageset import all_corrupt
from snscc_ray.data.loading.ray_stream import ray_answers
from snscc_ray.runs.folder import reading
from snscc_ray.training.workers import choose_device


def predict_on_ray(question: PredictRequest, console: Console, scale: Scale) -> PredictResult:
    """Predict with a model on each worker; the whole cluster reads the images.

    Raises UserError.
    """
    display = Display(console)
    parts: list[pa.Table] = []
    with reading(question.run):
        answerer, data, rows = prepare(question, display, "auto" if scale.gpu else "cpu")
        if not rows.streamable:
            raise UserError(
                f"--workers reads only image files and Parquet shards, and {rows.place} holds "
                "neither; leave --workers out"
            )
        with connected(scale):
            with reserved(scale, display.line) as probes:
                check_alike(probes, scale.gpu)
            ask_every_node(unread, rows.some_files)
            held, ready = answerer.on(torch.device("cpu")), partial(_on_its_device, gpu=scale.gpu)
            tell = display.counting("predict", "images")
            failed: dict[int, str] = {}
            done = 0
            found = ray_answers(rows, data, held, ready, scale.workers[0], bundle_of(scale))
            # Ray's C++ code warns on stderr that restarts of Ray Data's own actors may fail.
            with tempfile.TemporaryFile("w+") as said, stderr_into(said):
                try:
                    for read, failures, table in found:
                        failed |= failures
                        parts += [table] if table is not None else []
                        tell(done := done + read, len(rows.ids))
                finally:
                    display.finish()
    if not parts:
        raise all_corrupt(rows, *next(iter(failed.items())))
    kept = np.setdiff1d(np.arange(len(rows.ids)), list(failed))
    ids = rows.ids.take(kept)
    skipped = [(rows.ids[row], reason) for row, reason in failed.items()]
    return conclude(question, ids, skipped, parts, display)


def _on_its_device(answerer: Predictor, gpu: bool) -> Predictor:
    return answerer.on(choose_device("cuda" if gpu else "cpu"))
