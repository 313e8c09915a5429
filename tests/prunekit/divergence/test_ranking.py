"""The ranked table on terminals: nothing that a reader must know is left out."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from prunekit.divergence.ranking import ranked


def interval(mean: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"mean": mean, "low": low, "high": high}


TOLD = {
    "reference": {"name": "big", "dtype": "float32"},
    "plan": {
        "positions": 512,
        "count": 2,
        "windows": "llama.cpp",
        "context": 512,
        "stride": None,
        "blocks": 9,
        "block_unit": "window",
    },
    "candidates": [
        {
            "name": "small",
            "error": None,
            "bytes_on_disk": 145_000_000,
            "bytes_in_memory": 145_000_000,
            "bits_per_weight": 8.5,
            "summary": {"kl_p99.9": 1.25},
            "means": {
                "kl": interval(1.2345, 0.98765, 1.5),
                "same_top": interval(0.9, 0.8, 1.0),
                "ppl_ratio": interval(1.01, None, None),
            },
        },
        {"name": "broken", "error": "no tokenizer"},
    ],
    "differences": [],
}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_table_keeps_values_and_failures(width):
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(ranked(TOLD))
    text = out.getvalue()
    assert "1.234 [0.988, 1.500]" in text and "1.01" in text and "failed: no tokenizer" in text
    assert ("145 MB" in text) == (width == 200)
    assert max(map(len, text.splitlines())) <= width
