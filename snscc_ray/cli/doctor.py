"""What this machine offers, and what a run would use."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import psutil
import torch
from PIL import features

from snscc_ray.core.clustering.neighbors import describe_faiss
from snscc_ray.data.formats import PACKAGES, installed


def examine() -> list[tuple[str, str]]:
    """Return rows of (what, finding), for display."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory()
    rows = [
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("torchvision", _version("torchvision")),
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used"),
        ("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
    ]
    for index, gpu in enumerate(gpus):
        rows.append((f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"))
    if not gpus:
        rows.append(("GPU", "none that torch sees"))
    rows.append(("ray", _version("ray")))
    rows.append(("faiss", describe_faiss()))
    rows.append(("AVIF images", "read" if features.check("avif") else "not read by this Pillow"))
    for kind, package in PACKAGES.items():
        rows.append(
            (
                f"{kind} images",
                f"read with {package} {_version(package)}"
                if installed(kind)
                else f"not read; pip install {package}",
            )
        )
    device = "cuda, bfloat16 autocast" if gpus else "cpu, float32"
    rows.append(("a run would use", device))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
