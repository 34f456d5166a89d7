"""HTML: a `Page` as one file, with Vega's code, the charts and the styles inside.

A content security policy in the file forbids every request, and every script but the file's own two. Texts are
escaped: in HTML by Jinja, in the charts' JSON so that no text can end its script.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import rankloom
from rankloom.pages.pieces import Chart, Page

THEME: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": 500, "gridOpacity": 0.5, "tickCount": 6},
    "legend": {"orient": "bottom", "labelFontSize": 11, "symbolSize": 80, "columns": 6},
}
"""Vega-Lite's configuration of a page; the colours of text and lines are the style sheet's."""


def render(page: Page) -> str:
    """Return the page as one HTML file."""
    library, script = load_vega(), _read_asset("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read_asset("page.html")).render(
        page=page,
        style=Markup(_read_asset("page.css")),
        library=Markup(library),
        script=Markup(script),
        hashes=[_hash(library), _hash(script)],
        specs={chart.id: size_chart(chart) for chart in page.charts},
        version=rankloom.__version__,
    )


def size_chart(chart: Chart) -> dict[str, Any]:
    """Return a chart's specification at the width of its place."""
    return chart.spec | {
        "width": "container",
        "height": chart.height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": THEME,
    }


@cache
def load_vega() -> str:
    """Return the code of Vega, Vega-Lite and Vega-Embed as one script, which sets `vegaEmbed`."""
    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return code.replace("</script", "<\\/script")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _read_asset(name: str) -> str:
    return files("rankloom.pages").joinpath("assets", name).read_text(encoding="utf-8")
