"""The methods there are, in the order of their table. Needs no torch, so that help is quick."""

from __future__ import annotations

import difflib

from snscc_ray.config.errors import UserError

TITLES = {
    "kmeans": "K-Means on pixels",
    "sc": "Spectral on pixels",
    "ac": "Agglomerative on pixels",
    "nmf": "NMF on pixels",
    "ae": "AE + K-Means",
    "dae": "DAE + K-Means",
    "vae": "VAE + K-Means",
    "dec": "DEC",
    "iic": "IIC",
    "pica": "PICA",
    "cc": "CC",
    "pretext": "Pretrain + K-Means",
    "scan": "SCAN",
    "snscc": "SNSCC (ours)",
}


def chosen(text: str) -> tuple[str, ...]:
    """The methods that `all` or `name,…` means, in the table's order, each once.

    Raises UserError for a name that is none.
    """
    if text.strip() == "all":
        return tuple(TITLES)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TITLES:
            near = difflib.get_close_matches(name, TITLES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"--methods {text}: there is no method {name!r}; {hint}"
                f"use all, or some of {', '.join(TITLES)}"
            )
    return tuple(name for name in TITLES if name in names)
