"""A report inside a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

_LARGEST = 20_000_000  # bytes; a notebook keeps a copy of the page


@dataclass(frozen=True)
class Report:
    """A report file. A notebook shows it as the value of a cell, unless it is over 20 MB."""

    path: str | Path

    def _repr_html_(self) -> str:
        path = Path(self.path)
        size = path.stat().st_size
        if size > _LARGEST:
            return html.escape(
                f"{path} has {size / 1e6:.0f} MB, too much for a notebook: open it in a browser"
            )
        page = html.escape(path.read_text("utf-8"))
        return f'<iframe srcdoc="{page}" title="report" style="width:100%;height:48rem"></iframe>'
