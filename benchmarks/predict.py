"""The whole `predict` command against the bare model on one fixed batch.

`bare` runs the network forward on a fixed, normalised batch, for as many rows. `resident` is
everything after decoding: normalisation, the forward pass, the top clusters, the search for the
nearest of 20,000 own images, the table and the Parquet file. `whole` is the command without the
imports: it also loads the run (of 600 images), and reads and decodes PNG files from disk. The three
take turns in one run; ratios are to `bare` of the same round, and their medians count.

    python -m benchmarks.predict [--out FILE] [--encoder convnet|resnet18|both] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from benchmarks.epoch import noise, now
from benchmarks.report import describe_machine, print_table, save
from snscc_ray.answers.nearest import KnownImages
from snscc_ray.answers.predict import PredictRequest, conclude, predict, prepare
from snscc_ray.config import recipes
from snscc_ray.config.overrides import override
from snscc_ray.config.settings import Recipe
from snscc_ray.core.display import Display
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.names import Names
from snscc_ray.runs.local import run_here
from snscc_ray.runs.run import Request

SIDE = 32
OWN, KNOWN, BATCH = 600, 20_000, 1024
QUIET = Console(quiet=True)
# A run with untrained weights: the speed does not depend on training.
SETTINGS = [
    f"data.image_size={SIDE}", "data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]",
    *(f"{stage}.epochs=0" for stage in ("pretrain", "train", "boost")),
]  # fmt: skip
ENCODERS = {
    "convnet": ["encoder.name=convnet", "encoder.width=24"],
    "resnet18": ["encoder.name=resnet18"],
}


def write_images(recipe: Recipe, rows: int, folder: Path) -> Path:
    """Write random images as PNG files."""
    folder.mkdir()
    for number, pixels in enumerate(noise(recipe, rows).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{number:06}.png")
    return folder


def measure(encoder: str, rows: int, repeats: int, place: Path) -> dict[str, object]:
    settings = [*SETTINGS, *ENCODERS[encoder]]
    recipe = override(recipes.get("images"), settings)
    own = write_images(recipe, OWN, place / "own")
    new = write_images(recipe, rows, place / "new")
    run_here(Request("images", [*settings, f"data.path={own}"], place / "run"), QUIET)
    question = PredictRequest(place / "run", str(new), place / "answers.parquet")
    display = Display(QUIET)
    answerer, _, _ = prepare(question, display, "auto")
    model = answerer.model
    assert answerer.known is not None
    features_MD = torch.randn(KNOWN, answerer.known.features_MD.shape[1])
    features_MD = F.normalize(features_MD, dim=1).to(model.device)
    known = KnownImages(pa.array([f"{row:06}.png" for row in range(KNOWN)]), features_MD, 3)
    answerer = replace(answerer, known=known)
    data = ResidentData(noise(recipe, rows), model.device)
    ids = Names.of(map(str, range(rows)))
    fixed = torch.randn(min(BATCH, rows), 3, SIDE, SIDE, device=model.device)
    fixed = fixed.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare() -> None:
        model.network.eval()
        for first in range(0, rows, BATCH):
            with torch.autocast(model.device.type, torch.bfloat16, model.device.type == "cuda"):
                model.network(fixed[: rows - first])

    def resident() -> None:
        parts: list[pa.Table] = [answerer(images) for images in data.slices(0, rows, BATCH)]
        conclude(question, ids, [], parts, display)

    def whole() -> None:
        predict(question, QUIET)

    kinds: dict[str, Callable[[], None]] = {"bare": bare, "resident": resident, "whole": whole}
    for kind in kinds.values():
        kind()
    rounds = [{name: _seconds(kind, fixed) for name, kind in kinds.items()} for _ in range(repeats)]
    speed = {name: rows / statistics.median(r[name] for r in rounds) for name in kinds}
    ratios = {name: sorted(r["bare"] / r[name] for r in rounds) for name in ("resident", "whole")}
    row: dict[str, object] = {"encoder": encoder, "images": rows, "resident_own_images": KNOWN}
    row["whole_own_images"] = OWN
    row |= {f"{name}_images_per_second": round(value, 1) for name, value in speed.items()}
    for name, found in ratios.items():
        row |= {
            f"{name}_ratio": round(statistics.median(found), 3),
            f"{name}_ratio_min": round(found[0], 3),
            f"{name}_ratio_max": round(found[-1], 3),
        }
    return row


def _seconds(work: Callable[[], None], on: Tensor) -> float:
    began = now(on.device)
    work()
    return now(on.device) - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="save the figures as JSON")
    parser.add_argument("--encoder", choices=(*ENCODERS, "both"), default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpu = torch.cuda.is_available()
    images = {"convnet": 65_536 if gpu else 4096, "resnet18": 32_768 if gpu else 1024}
    chosen = tuple(ENCODERS) if arguments.encoder == "both" else (arguments.encoder,)
    rows = []
    for encoder in chosen:
        with tempfile.TemporaryDirectory() as place:
            rows.append(measure(encoder, images[encoder], arguments.repeats, Path(place)))
    print_table(rows)
    if arguments.out:
        save(arguments.out, describe_machine(arguments.threads), rows)


if __name__ == "__main__":
    main()
