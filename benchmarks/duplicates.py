"""Near-duplicates planted among real photographs: how many are found, and how many are wrong.

5,000 photographs of Imagenette (96 px) are written as JPEG files, and with them 300 resized ones,
300 recompressed ones and 300 cropped by 5 %, each of another photograph. `snscc fit` groups them
and `snscc duplicates` finds the duplicates. Precision and recall count pairs: two photographs in
one group are a pair. Pairs of two of the 5,000 are real duplicates of the set, or errors. They
count as errors, and are written out to be looked at.

    python -m benchmarks.duplicates SHARDS FOLDER [--out FILE] [--photos 5000] [--planted 300]
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.report import describe_machine, print_table, save


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def resized(image: Image.Image, draw: np.random.Generator) -> bytes:
    """Half to nine tenths of the size, or 1.2 to 1.6 times."""
    scale = draw.uniform(0.5, 0.9) if draw.random() < 0.7 else draw.uniform(1.2, 1.6)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return jpeg(image.resize((width, height), Image.Resampling.BICUBIC), 90)


def recompressed(image: Image.Image, draw: np.random.Generator) -> bytes:
    return jpeg(image, int(draw.integers(30, 71)))


def cropped(image: Image.Image, draw: np.random.Generator) -> bytes:
    """Without 5 % of the width and of the height, taken off anywhere at the edges."""
    width, height = (round(side * 0.95) for side in image.size)
    left = int(draw.integers(0, image.width - width + 1))
    top = int(draw.integers(0, image.height - height + 1))
    return jpeg(image.crop((left, top, left + width, top + height)), 90)


KINDS: dict[str, Callable[[Image.Image, np.random.Generator], bytes]] = {
    "resized": resized, "recompressed": recompressed, "cropped": cropped,
}  # fmt: skip


def plant(shards: Path, folder: Path, photos: int, planted: int) -> None:
    """Write the files; `00012.jpg` is a photograph and `00012-cropped.jpg` was made from it."""
    draw = np.random.default_rng(0)
    table = pq.read_table(shards, columns=["image"])
    rows = draw.permutation(table.num_rows)[:photos]
    folder.mkdir(parents=True)
    kinds = [kind for kind in KINDS for _ in range(planted)]
    for number, row in enumerate(rows):
        encoded = table["image"][int(row)].as_py()
        (folder / f"{number:05}.jpg").write_bytes(encoded)
        if number < len(kinds):
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            made = KINDS[kinds[number]](image, draw)
            (folder / f"{number:05}-{kinds[number]}.jpg").write_bytes(made)


def command(*words: object) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "snscc_ray", *map(str, words)], check=True)
    return time.monotonic() - began


def measure(found: Path, planted: int) -> tuple[dict[str, object], list[tuple[str, str]]]:
    """Return precision and recall over pairs, and the pairs of two photographs of the set."""
    groups: dict[str, list[str]] = defaultdict(list)
    with found.open(newline="") as file:
        for line in csv.DictReader(file):
            groups[line["group"]].append(line["id"])
    pairs = [pair for ids in groups.values() for pair in combinations(sorted(ids), 2)]
    right: Counter[str] = Counter()
    others = []
    for a, b in pairs:
        kind = b.removesuffix(".jpg").partition("-")[2] or a.removesuffix(".jpg").partition("-")[2]
        if a[:5] == b[:5]:
            right[kind] += 1
        else:
            others.append((a, b))
    total = sum(right.values())
    row: dict[str, object] = {"pairs": len(pairs), "precision": round(total / len(pairs), 4)}
    row |= {"recall": round(total / (len(KINDS) * planted), 4)}
    row |= {f"recall_{kind}": round(right[kind] / planted, 4) for kind in KINDS}
    return row, others


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("folder", type=Path, help="for the images, the run and what is found")
    parser.add_argument("--out", type=Path, help="save the figures as JSON")
    parser.add_argument("--photos", type=int, default=5000)
    parser.add_argument("--planted", type=int, default=300, help="of each kind")
    arguments = parser.parse_args()
    images, run = arguments.folder / "images", arguments.folder / "run"
    found = arguments.folder / "duplicates.csv"
    if not images.exists():
        plant(arguments.shards, images, arguments.photos, arguments.planted)
    if not (run / "metrics.json").exists():
        command("fit", images, "--clusters", 10, "--out", run)
    seconds = command("duplicates", run, "-o", found, "--overwrite")
    row, others = measure(found, arguments.planted)
    row = {"photographs": arguments.photos, "planted": len(KINDS) * arguments.planted, **row}
    row["seconds"] = round(seconds, 1)
    print_table([row])
    for a, b in others:
        print("not planted:", a, b)
    if arguments.out:
        save(arguments.out, describe_machine(os.cpu_count() or 1), [row])


if __name__ == "__main__":
    main()
