"""Prune Hugging Face language models, and see what pruning did from h to z to p.

    import prunekit as pk

    model, tokenizer = pk.load("demo")
    report = pk.prune_(model, pk.Wanda(pattern="2:4"), pk.Calibration())
    pk.save(model, tokenizer, "out/wanda24", report=report.to_dict())

Importing prunekit registers its `prunekit_<base>` models with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.analysis.sweep import sweep
    from prunekit.calibration import Calibration
    from prunekit.checkpoint import load, save
    from prunekit.comparison import compare
    from prunekit.pruning import Drop, Magnitude, Recipe, SparseGPT, Wanda, drop_, prune_
    from prunekit.study import Study
    from prunekit.swap import SwapReport, swap_, unswap_

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Drop",
    "Magnitude",
    "PrunekitError",
    "Recipe",
    "SparseGPT",
    "Study",
    "SwapReport",
    "Wanda",
    "compare",
    "drop_",
    "load",
    "prune_",
    "save",
    "swap_",
    "sweep",
    "unswap_",
]

_HOMES = {
    "Study": "prunekit.study",
    "compare": "prunekit.comparison",
    "sweep": "prunekit.analysis.sweep",
    "Calibration": "prunekit.calibration",
    **dict.fromkeys(("load", "save"), "prunekit.checkpoint"),
    **dict.fromkeys(
        ("Drop", "Magnitude", "Recipe", "SparseGPT", "Wanda", "drop_", "prune_"),
        "prunekit.pruning",
    ),
    **dict.fromkeys(("SwapReport", "swap_", "unswap_"), "prunekit.swap"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'prunekit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The Auto classes must know our models as soon as prunekit is imported. The command line alone
# puts off importing torch and transformers, so that --help answers at once (argv[0] is "-m" while
# `python -m prunekit` looks for its __main__).
if Path(sys.argv[0] if sys.argv else "").stem not in ("prunekit", "-m"):
    importlib.import_module("prunekit.modeling")
