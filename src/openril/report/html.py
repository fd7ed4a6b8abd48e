"""Render the page that shows runs: as one self-contained file, or as the shell that `ril view` serves."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

from jinja2 import Environment
from markupsafe import Markup

SCRIPTS = (
    "dom.js",
    "query.js",
    "store.js",
    "chart.js",
    "overview.js",
    "cards.js",
    "groups.js",
    "discriminator.js",
    "audit.js",
    "teachers.js",
    "app.js",
)
"""The parts of the page's one script, in order. They share a scope and are only read when the page has been parsed."""

SERVED_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy header that goes with the served page."""


def page_script() -> str:
    """Return the page's JavaScript, as one function that leaves no global names."""
    parts = "\n".join(_asset(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


def page_style() -> str:
    """Return the page's CSS."""
    return _asset("page.css")


def render_page(document: Mapping[str, Any], mode: Literal["embedded", "served"] = "embedded") -> str:
    """Return the page's HTML, which can be encoded as UTF-8 whatever the document holds.

    Args:
        document: The report document (see docs/report.md). The served page fetches it and embeds nothing.
        mode: "embedded" puts script, style and document into the page, so that it opens from disk and needs no
            network. "served" refers to ``/page.js`` and ``/page.css`` of the server.

    Raises:
        ValueError: A number of the document is NaN or infinite, which JSON cannot hold.
    """
    # markupsafe and json leave no way out of their elements: the title is escaped, and the data block holds no "<".
    names = ", ".join(str(run.get("name", "")) for run in document.get("runs", []))
    title = f"{names} - OpenRIL" if names else "OpenRIL"
    values: dict[str, Any] = {"title": title.encode("utf-8", "backslashreplace").decode("utf-8"), "mode": mode}
    if mode == "embedded":
        script, style = page_script(), page_style()
        data = json.dumps(document, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        values |= {
            "script": Markup(script),
            "style": Markup(style),
            "data": Markup(data),
            "policy": f"default-src 'none'; img-src data:; script-src {_source(script)}; style-src {_source(style)}; "
            "base-uri 'none'; form-action 'none'",
        }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(values)


def _source(text: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows exactly this inline text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _asset(name: str) -> str:
    return (resources.files("openril.report") / "assets" / name).read_text(encoding="utf-8")
