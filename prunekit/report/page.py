"""The HTML page: one self-contained file that loads nothing from the network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

_SCRIPTS = ("elements", "page", "texts", "answers", "questions")  # the last one draws


def render(payload: dict[str, Any], methods: str | None = None) -> str:
    """The page that shows `payload` (what the scripts in `assets` read), as UTF-8 text.

    `methods` is HTML that says how the numbers are made, by default that of a study.

    Everything in `payload` may be text that a model wrote: it enters the page as JSON only, and the
    script puts it into the document as text, never as HTML.
    """
    title = f"{payload['names']['dense']} → {payload['names']['pruned']} · prunekit"
    methods = asset("methods.html") if methods is None else methods
    return document(
        title,
        Template(asset("page.html")).substitute(methods=methods),
        asset("page.css"),
        [asset(f"{name}.js") for name in _SCRIPTS],
        payload,
        first=f"<script>\n{asset('theme.js')}\n</script>\n",
        place="study",
    )


def document(
    title: str,
    body: str,
    style: str,
    scripts: Sequence[str],
    payload: Any,
    *,
    first: str = "",
    place: str = "data",
) -> str:
    """A page around what stands in `<body>`: one file whose security policy loads nothing.

    Args:
        title: Plain text.
        body: HTML.
        style: CSS.
        scripts: JavaScript, joined; it reads `payload` from the element `place`.
        payload: JSON-able; see `render` for why texts enter the page so.
        first: HTML of the head that must run before anything is drawn.
        place: Id of the element that holds `payload`.
    """
    return Template(asset("document.html")).substitute(
        title=escape(title),
        first=first,
        style=style,
        body=body,
        place=place,
        data=embed(payload),
        script="\n\n".join(scripts),
    )


def embed(payload: Any) -> str:
    """JSON that is safe inside a <script> element, whatever texts it holds.

    `<`, `>` and `&` are escaped, so that neither `</script>` nor `<!--` can occur; so are the line
    separators that JavaScript once didn't allow in strings. Lone surrogates, which are no text and
    make browsers crash, become U+FFFD.
    """
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def asset(name: str, package: str = "prunekit.report") -> str:
    """The text of a file in a package's `assets`."""
    return resources.files(package).joinpath("assets", name).read_text("utf-8").rstrip("\n")
