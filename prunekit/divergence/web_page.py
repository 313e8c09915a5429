"""The page of a comparison: one self-contained file that loads nothing from the network."""

from __future__ import annotations

from html import escape
from string import Template
from typing import Any

from prunekit.report.page import asset, embed


def render(payload: dict[str, Any]) -> str:
    """The page that shows `Kld.page_data()`, as UTF-8 text.

    Texts enter it as JSON only, and the script puts them into the document as text.
    """
    return Template(_asset("kld.html")).substitute(
        title=escape(f"KLD from {payload['reference']['name']} · prunekit"),
        style=asset("plain.css"),
        script="\n\n".join((asset("elements.js"), asset("points.js"), _asset("kld.js"))),
        data=embed(payload),
    )


def _asset(name: str) -> str:
    return asset(name, "prunekit.divergence")
