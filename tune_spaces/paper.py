"""The results printed in the paper (Duan et al., IEEE TIP 2025), by table, in its order."""

from __future__ import annotations

from snscc_ray.config.settings import StageName
from tune_spaces.space import Figures

# The paper's name for the dataset of a recipe. Its CIFAR-100 has the 20 superclasses.
DATA_SETS = {
    "cifar10": "CIFAR-10",
    "cifar20": "CIFAR-100",
    "stl10": "STL-10",
    "imagenet10": "ImageNet-10",
    "imagenet_dogs": "ImageNet-Dogs",
}


def printed(nmi: float, acc: float, ari: float | None = None) -> Figures:
    """Return figures in our order (ACC, NMI, ARI) from the paper's order (NMI, ACC, ARI)."""
    return acc, nmi, ari


# Table IV, last two rows: everything at its default (ε = 5, γ = 0.99, σ = 0.7, K = 10).
TABLE_IV: dict[str, dict[StageName, Figures]] = {
    "CIFAR-10": {"train": printed(0.743, 0.842, 0.706), "boost": printed(0.795, 0.886, 0.777)},
    "CIFAR-100": {"train": printed(0.473, 0.475, 0.305), "boost": printed(0.502, 0.508, 0.347)},
    "STL-10": {"train": printed(0.609, 0.733, 0.552), "boost": printed(0.612, 0.736, 0.559)},
    "ImageNet-10": {"train": printed(0.837, 0.918, 0.832), "boost": printed(0.855, 0.931, 0.856)},
    "ImageNet-Dogs": {"train": printed(0.417, 0.428, 0.271), "boost": printed(0.445, 0.463, 0.308)},
}

# Table V: the losses of Train that are on.
TABLE_V: dict[str, dict[str, Figures]] = {
    "CIFAR-10": {
        "local": printed(0.722, 0.827),
        "global": printed(0.727, 0.827),
        "cluster": printed(0.713, 0.816),
        "local + global": printed(0.731, 0.831),
        "local + global + cluster": printed(0.743, 0.842),
    },
    "CIFAR-100": {
        "local": printed(0.449, 0.443),
        "global": printed(0.454, 0.449),
        "cluster": printed(0.452, 0.420),
        "local + global": printed(0.462, 0.456),
        "local + global + cluster": printed(0.473, 0.475),
    },
    "ImageNet-10": {
        "local": printed(0.829, 0.908),
        "global": printed(0.831, 0.909),
        "cluster": printed(0.826, 0.905),
        "local + global": printed(0.835, 0.913),
        "local + global + cluster": printed(0.837, 0.918),
    },
}

# Table VI: the threshold γ, in Boost.
TABLE_VI: dict[str, dict[str, Figures]] = {
    "CIFAR-10": {
        "0.9": printed(0.781, 0.876, 0.761),
        "0.95": printed(0.788, 0.879, 0.764),
        "0.99": printed(0.795, 0.886, 0.777),
    },
    "CIFAR-100": {
        "0.9": printed(0.489, 0.492, 0.330),
        "0.95": printed(0.499, 0.501, 0.342),
        "0.99": printed(0.502, 0.508, 0.347),
    },
    "ImageNet-10": {
        "0.9": printed(0.846, 0.926, 0.847),
        "0.95": printed(0.850, 0.928, 0.850),
        "0.99": printed(0.855, 0.931, 0.856),
    },
    "ImageNet-Dogs": {
        "0.9": printed(0.423, 0.422, 0.269),
        "0.95": printed(0.425, 0.430, 0.286),
        "0.99": printed(0.445, 0.463, 0.308),
    },
}

# Table VII: the pretext method, without and with soft neighbours (SN).
TABLE_VII: dict[str, dict[StageName, dict[str, Figures]]] = {
    "ImageNet-10": {
        "train": {
            "SimCLR": printed(0.821, 0.898),
            "SimCLR + SN": printed(0.833, 0.903),
            "MoCo": printed(0.826, 0.905),
            "MoCo + SN": printed(0.837, 0.918),
        },
        "boost": {
            "SimCLR": printed(0.839, 0.918),
            "SimCLR + SN": printed(0.848, 0.936),
            "MoCo": printed(0.844, 0.924),
            "MoCo + SN": printed(0.855, 0.931),
        },
    },
    "ImageNet-Dogs": {
        "train": {
            "SimCLR": printed(0.401, 0.410),
            "SimCLR + SN": printed(0.404, 0.416),
            "MoCo": printed(0.408, 0.421),
            "MoCo + SN": printed(0.417, 0.428),
        },
        "boost": {
            "SimCLR": printed(0.410, 0.429),
            "SimCLR + SN": printed(0.419, 0.452),
            "MoCo": printed(0.432, 0.436),
            "MoCo + SN": printed(0.445, 0.463),
        },
    },
}


def default_point(label: str, *stages: StageName) -> dict[str, dict[StageName, dict[str, Figures]]]:
    """Return Table IV's results of the point with all defaults, in the form of `Space.paper`."""
    return {
        name: {stage: {label: figures[stage]} for stage in stages}
        for name, figures in TABLE_IV.items()
    }
