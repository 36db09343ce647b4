"""Render the content of a report as one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from snscc_ray.answers.report.charts import HEIGHT, WIDTH, draw
from snscc_ray.answers.report.sprites import Sprites
from snscc_ray.answers.report.words import CRITERIA, FIGURES, STAGE_MEANING, STAGE_NAMES
from snscc_ray.config.settings import NO_ENCODER
from snscc_ray.texts import shown

_GOLDEN_ANGLE = 137.508


def render(content: dict[str, Any], sprites: Sprites | None) -> str:
    """Render `content`, the values of report.json. Names and ids may be any text; all is escaped.

    Characters that change the reading direction are escaped here, but not in report.json.

    sprites: the thumbnails; None: there are no pictures, and ids take their place.
    """
    exact = {row: image["id"] for row, image in content["images"].items()}
    content = _shown(content)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "fraction": fraction,
        "number": number,
        "duration": duration,
        # A person's own names stay as they are.
        "starting": lambda text: re.sub(r"^cluster (?=\d)", "Cluster ", text),
    }
    script = _text("page.js") + _text("page.map.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    clusters, encoder = content["summary"]["clusters"], content["summary"]["recipe"]["encoder"]
    return environment.from_string(_text("page.html.j2")).render(
        **content,
        places=sprites.places if sprites else {},
        sheets=[
            {
                "columns": sheet.columns,
                "lines": sheet.lines,
                "data": base64.b64encode(sheet.webp).decode(),
            }
            for sheet in (sprites.sheets if sprites else ())
        ],
        pixelated=sprites is not None and sprites.size <= 48,
        # Our own style and script, unescaped; everything else is escaped.
        style=Markup(_text("page.css")),
        script=Markup(script),
        script_hash=digest,
        recipe_text=json.dumps(content["summary"]["recipe"], indent=2),
        data=_data(content, exact, sprites, clusters),
        draw=draw,
        zip=zip,
        chart_size=(WIDTH, HEIGHT),
        figure_names=FIGURES,
        criteria_names=CRITERIA,
        stage_names=STAGE_NAMES | ({"pretrain": "Features"} if encoder["frozen"] else {}),
        noun="embeddings" if encoder["name"] == NO_ENCODER else "images",
        stage_meaning=STAGE_MEANING,
    )


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {name: _shown(part) for name, part in value.items()}
    return [_shown(part) for part in value] if isinstance(value, list | tuple) else value


def _data(
    content: dict[str, Any], exact: dict[int, str], sprites: Sprites | None, clusters: int
) -> dict[str, Any]:
    """Return the data for the page's script. exact: the ids before anything was escaped."""
    return {
        "images": {
            row: image if image["id"] == exact[row] else image | {"exact": exact[row]}
            for row, image in content["images"].items()
        },
        "names": content["names"],
        "total": content["summary"]["images"],
        "places": {
            row: [place.sheet, place.column, place.line]
            for row, place in (sprites.places.items() if sprites else ())
        },
        "scatter": content["scatter"],
        "groups": [line["group"][0] for line in content["clusters"]],
        "group_names": [
            line["label"] if len(line["group"]) > 1 else name
            for line, name in zip(content["clusters"], content["names"], strict=True)
        ],
        "class_names": content["class_names"],
        "colors": colors(max(clusters, len(content["class_names"] or ()))),
    }


def colors(count: int) -> list[str]:
    """Return colours as far apart as possible, visible on white and on black."""
    step = 360 / count if count <= 12 else _GOLDEN_ANGLE
    return [
        f"oklch({0.58 + 0.12 * (number % 2)} 0.16 {number * step % 360:.1f})"
        for number in range(count)
    ]


def percent(share: float) -> str:
    return f"{share:.0%}" if share < 0.995 or share == 1 else "99%+"


def fraction(share: float) -> str:
    """Format as a percentage with one decimal; only exactly 0 is shown as 0."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def number(value: float) -> str:
    """Format integers in full and others to three digits; tiny ones short, to fit an axis."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.0e}"


def duration(seconds: float) -> str:
    """Format a duration as seconds, minutes, or hours and minutes."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _text(name: str) -> str:
    return resources.files("snscc_ray.answers.report").joinpath(name).read_text("utf-8")
