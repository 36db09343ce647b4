"""`snscc fit` on folders with known content: number of kinds estimated, accuracy and time.

digits    scikit-learn's 1,797 digits as PNG files, the number of clusters estimated
kinds-N   pictures of 3, 7 and 15 kinds (benchmarks.kinds), the number estimated
uneven    710 of the digits, class sizes from 174 down to 17, ten clusters, three seeds each. `even`
          and `free`: 0 is the most frequent and 9 the rarest; without and with a
          --max-cluster-imbalance of 10. `drawn`: with it, and the seed draws which digit has
          which size
photos    2,100 photographs from CIFAR-10 (its shards: --shards), equally many automobiles, horses
          and ships, three clusters, three seeds

Every encoder is trained from scratch. Labels are only used afterwards. A case that is in the JSON
file already is not run again.

    python -m benchmarks.fit --out FILE.json --work FOLDER [--shards FOLDER] [--cases NAME,…]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from benchmarks.kinds import make
from benchmarks.report import describe_machine, print_table, revision, save
from snscc_ray.fit.choose import Preferences
from snscc_ray.fit.fit import FitRequest, fit_images

PHOTOS, PHOTOS_EACH = ("automobile", "horse", "ship"), 700
UNEVEN = np.round(174 * 0.1 ** (np.arange(10) / 9)).astype(int)


@dataclass(frozen=True)
class Case:
    images: Callable[[Path], Path]  # writes the images into the folder, and returns it
    kinds: int
    wishes: Preferences
    seed: int = 0


def digits(folder: Path, sizes: np.ndarray | None = None) -> Path:
    """Write digits, with a subfolder per class; `sizes`: only the first so many of each."""
    pixels_NHW, label_N = load_digits().images, load_digits().target
    for label in range(10):
        place = folder / str(label)
        place.mkdir(parents=True)
        rows = np.flatnonzero(label_N == label)
        for row in rows if sizes is None else rows[: sizes[label]]:
            pixels = np.round(pixels_NHW[row] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{row:04}.png")
    return folder


def photos(folder: Path, shards: Path) -> Path:
    """Write the first images of some classes of CIFAR-10's shards, with a subfolder per class."""
    table = pq.read_table(sorted(shards.glob("*.parquet"))[0])
    for kind in PHOTOS:
        place = folder / kind
        place.mkdir(parents=True)
        own = table.filter(pc.equal(table["class_name"], kind))
        for number, image in enumerate(own["image"][:PHOTOS_EACH].to_pylist()):
            (place / f"{number:04}.jpg").write_bytes(image)
    return folder


def cases(shards: Path | None) -> dict[str, Case]:
    found = {"digits": Case(digits, 10, Preferences(None, from_scratch=True))}
    for kinds, each in ((3, 200), (7, 90), (15, 45)):
        found[f"kinds-{kinds}"] = Case(
            lambda folder, kinds=kinds, each=each: make(folder, kinds, each, seed=kinds),  # type: ignore[misc]
            kinds,
            Preferences(None, from_scratch=True),
        )
    for seed in range(3):
        for name, ratio in (("even", 1.0), ("free", 10.0)):
            found[f"uneven-{name}-{seed}"] = Case(
                lambda folder: digits(folder, UNEVEN),
                10,
                Preferences(10, None, ratio, from_scratch=True),
                seed,
            )
        sizes = np.random.default_rng(seed).permutation(UNEVEN)
        found[f"uneven-drawn-{seed}"] = Case(
            lambda folder, sizes=sizes: digits(folder, sizes),  # type: ignore[misc]
            10,
            Preferences(10, None, 10.0, from_scratch=True),
            seed,
        )
        if shards is not None:
            found[f"photos-{seed}"] = Case(
                partial(photos, shards=shards),
                len(PHOTOS),
                Preferences(len(PHOTOS), from_scratch=True),
                seed,
            )
    return found


def measured(name: str, case: Case, work: Path) -> dict[str, Any]:
    """Run or resume one case; return its row."""
    images = work / "images" / name
    if not images.exists():
        case.images(images)
    request = FitRequest(
        str(images),
        work / "runs" / name,
        case.wishes,
        folders_are_labels=True,
        overrides=(f"seed={case.seed}",),
    )
    began = time.monotonic()
    done = fit_images(request, Console())
    taken = time.monotonic() - began
    stages = done.result.figures["stages"]
    # None: resumed, so the measured time is not the whole.
    told = None if done.expected_end is None else done.expected_end - began
    path = request.folder / "clusters.json"
    count = json.loads(path.read_text()) if path.exists() else {}
    return {
        "case": name,
        "images": done.result.figures["rows"],
        "kinds": case.kinds,
        "counted": count.get("chosen"),
        "runner_up": count.get("runner_up"),
        "acc_pretext_kmeans": stages["pretrain"]["oracle/acc"],
        "acc_train": stages["train"]["oracle/acc"],
        "acc_boost": stages["boost"]["oracle/acc"],
        "forced_balance": stages["train"]["health/forced_balance"],
        "minutes_told": None if told is None else told / 60,
        "minutes_taken": None if told is None else taken / 60,
        "revision": revision(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shards", type=Path, help="of CIFAR-10, for the photographs")
    parser.add_argument("--cases", help="of them, with commas between; else all")
    arguments = parser.parse_args()
    found = cases(arguments.shards)
    known = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else []
    rows = {row["case"]: row for row in known}
    for name in arguments.cases.split(",") if arguments.cases else found:
        if name not in rows:
            rows[name] = measured(name, found[name], arguments.work)
            machine = describe_machine(torch.get_num_threads())
            save(arguments.out, machine, list(rows.values()))
    print_table(list(rows.values()))


if __name__ == "__main__":
    main()
