"""Export a finished run as one file that works without snscc_ray.

The file takes uint8 images, or embeddings if the run is on those, and returns cluster probabilities
and features. It contains the normalisation of training. Each file is loaded again and compared with
the model before it is written to its target.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snscc_ray.answers.names import read_naming
from snscc_ray.answers.predict import Model, load_model
from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import NO_ENCODER
from snscc_ray.core.storage import is_disk_full, write_whole
from snscc_ray.core.views import Normalize, clean_view
from snscc_ray.models.encoders import ClusterNet, Exact
from snscc_ray.models.frozen import WholeEncoder
from snscc_ray.runs.folder import reading

Format = Literal["onnx", "torch"]
# The loaded file as a function: its input to probabilities and features.
Answer = Callable[[Tensor], list[Tensor]]

_TOLERANCE = 1e-4
_BATCHES = (1, 5)  # sizes other than the traced one
_OUTPUTS = ["probabilities", "features"]
_METADATA = "snscc.json"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Classifier(nn.Module):
    """Map uint8 images (B, C, H, W) to cluster probabilities (B, C) and unit features (B, D)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: ClusterNet, normalize: Normalize) -> None:
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(v)[:, None, None] for v in (normalize.mean, normalize.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features_BD, logits_HBC = self.network(images.float() * self.scale + self.shift)
        return logits_HBC[0].softmax(1), features_BD


class VectorClassifier(nn.Module):
    """Map embeddings, float32 (B, D), to cluster probabilities (B, C) and unit features."""

    def __init__(self, network: ClusterNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        features_BD, logits_HBC = self.network(_as_stored(embeddings))
        return logits_HBC[0].softmax(1), features_BD


def _as_stored(embeddings_BD: Tensor) -> Tensor:
    """Divide embeddings by their lengths and round them, as a run does."""
    return F.normalize(embeddings_BD, dim=1).half().float()


def export(run: Path, targets: dict[Format, Path]) -> dict[Format, float]:
    """Write the model of a finished run to each target.

    Returns the largest difference from the model for each target. Raises UserError, and writes
    nothing, if the run is not finished, a package is missing, or a file's output differs from the
    model's.
    """
    missing = [name for name in _ONNX_PACKAGES if not find_spec(name)] if "onnx" in targets else []
    if missing:
        raise UserError(
            f"--onnx needs {' and '.join(missing)}; pip install {' '.join(missing)}, or use --torch"
        )
    with reading(run):
        model = load_model(run, "cpu")
        labels = read_naming(run, model.recipe.data.num_clusters).labels()
    for part in model.network.modules():
        if isinstance(part, Exact):
            part.exact = False  # few readers of such files know float64
    program = traced(model)
    with tempfile.TemporaryDirectory() as folder:
        made = {kind: Path(folder) / f"model.{kind}.pt2" for kind in targets}
        found: dict[Format, float] = {}
        for kind, path in made.items():
            write, read = _FORMATS[kind]
            try:
                write(program, path, describe(model, labels))
            except (OSError, RuntimeError) as error:
                if not is_disk_full(error):
                    raise
                raise UserError(
                    f"no space left in {folder}, where --{kind} is written first: free some space"
                ) from error
            found[kind] = difference(model, read(path))
            if not found[kind] <= _TOLERANCE:  # also true for NaN
                raise UserError(
                    f"--{kind}: the exported file differs from the model by {found[kind]:.2g}, "
                    f"more than {_TOLERANCE:g}; nothing was written, so use the other format"
                )
        for kind, target in targets.items():
            with made[kind].open("rb") as whole:
                write_whole(target, partial(shutil.copyfileobj, whole))
    return found


def traced(model: Model) -> torch.export.ExportedProgram:
    """Trace the model and its normalisation as one graph, for batches of any size."""
    module: nn.Module = Classifier(model.network, model.normalize)
    if _embedded(model):
        module = VectorClassifier(model.network)
    module.eval()
    module.to(memory_format=torch.contiguous_format)
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        return torch.export.export(module, (_inputs(model, 2),), dynamic_shapes=(batch,))


def describe(model: Model, labels: list[str] | None = None) -> dict[str, str | int | list[str]]:
    """Return the metadata stored in the file. labels: of the clusters, if some have names."""
    data = model.recipe.data
    try:
        version = importlib.metadata.version("snscc_ray")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"  # run from a source tree that is not installed
    inputs = {"image_size": data.image_size, "channels": data.channels}
    return {
        "clusters": data.num_clusters,
        **({"names": labels} if labels else {}),
        **({"numbers": _inputs(model, 1).shape[1]} if _embedded(model) else inputs),
        "recipe": model.recipe.name,
        "snscc_version": version,
    }


def difference(model: Model, answer: Answer) -> float:
    """Return the largest difference between the model's and the file's output on random input."""
    model.network.eval()
    found = []
    for batch in _BATCHES:
        inputs = _inputs(model, batch)
        with torch.no_grad():
            given = _embedded(model)
            clean = _as_stored(inputs) if given else clean_view(inputs, model.normalize)
            features_BD, logits_HBC = model.network(clean)
        expected = [logits_HBC[0].softmax(1), features_BD]
        for want, have in zip(expected, answer(inputs), strict=True):
            found.append((want - have).abs().max())
    return float(torch.stack(found).max())  # torch's max keeps NaN


def _embedded(model: Model) -> bool:
    return model.recipe.encoder.name == NO_ENCODER


def _inputs(model: Model, batch: int) -> Tensor:
    """Return random images, or random embeddings."""
    data, encoder = model.recipe.data, model.network.encoder
    generator = torch.Generator().manual_seed(batch)
    if _embedded(model) and isinstance(encoder, WholeEncoder):
        return torch.randn(batch, encoder.adapter.in_features, generator=generator)
    shape = (batch, data.channels, data.image_size, data.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --------------------------------------------------------------------------------- the formats


def _write_torch(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    # Saved to memory first: on a full disk, torch's own writer prints a page of C++ errors.
    whole = io.BytesIO()
    torch.export.save(program, whole, extra_files={_METADATA: json.dumps(about)})
    path.write_bytes(whole.getvalue())


def _read_torch(path: Path) -> Answer:
    with warnings.catch_warnings():  # torch 2.11 warns about its own loading code
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        module = torch.export.load(path).module()

    def answer(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(module(images))

    return answer


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    import onnx

    written = torch.onnx.export(
        program,
        dynamo=True,
        output_names=_OUTPUTS,
        dynamic_shapes=({0: "batch"},),  # only names the dimension; the program makes it dynamic
        verbose=False,
    )
    assert written is not None
    proto = written.model_proto  # includes the weights: one file
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in about.items()}
    onnx.helper.set_model_props(proto, texts)
    path.write_bytes(proto.SerializeToString())


def _read_onnx(path: Path) -> Answer:
    import onnxruntime

    running = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    name = running.get_inputs()[0].name

    def answer(images: Tensor) -> list[Tensor]:
        values = running.run(_OUTPUTS, {name: images.numpy()})
        return [torch.from_numpy(value) for value in values]

    return answer


_FORMATS: dict[Format, tuple[Callable[..., None], Callable[[Path], Answer]]] = {
    "torch": (_write_torch, _read_torch),
    "onnx": (_write_onnx, _read_onnx),
}
