"""The page of a comparison: one self-contained file that loads nothing from the network."""

from __future__ import annotations

from typing import Any

from prunekit.report.page import asset, document


def render(payload: dict[str, Any]) -> str:
    """The page that shows `Kld.page_data()`, as UTF-8 text.

    Texts enter it as JSON only, and the script puts them into the document as text.
    """
    return document(
        f"KLD from {payload['reference']['name']} · prunekit",
        _asset("kld.html"),
        asset("plain.css"),
        [asset("elements.js"), asset("points.js"), _asset("kld.js")],
        payload,
    )


def _asset(name: str) -> str:
    return asset(name, "prunekit.divergence")
