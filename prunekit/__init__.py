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
    from prunekit.checkpoint import load, save
    from prunekit.data.calibration import Calibration
    from prunekit.divergence.recovery import KeepMasks, Recovery, recover_
    from prunekit.divergence.result import Kld
    from prunekit.divergence.run import kld
    from prunekit.evaluation.retrieval.searching import retrieve
    from prunekit.mixing.result import SearchResult
    from prunekit.mixing.run import search
    from prunekit.packed.warming import warm_up_
    from prunekit.pruning import (
        ADMM,
        OWL,
        RIA,
        Drop,
        Magnitude,
        Recipe,
        Reconstruction,
        SparseGPT,
        Wanda,
        drop_,
        prune_,
    )
    from prunekit.study.comparison import compare
    from prunekit.study.several import Several, compare_several
    from prunekit.study.study import Study
    from prunekit.swap import SwapReport, swap_, unswap_
    from prunekit.sweeping.result import Sweep
    from prunekit.sweeping.run import sweep

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "OWL",
    "RIA",
    "Calibration",
    "Drop",
    "KeepMasks",
    "Kld",
    "Magnitude",
    "PrunekitError",
    "Recipe",
    "Reconstruction",
    "Recovery",
    "SearchResult",
    "Several",
    "SparseGPT",
    "Study",
    "SwapReport",
    "Sweep",
    "Wanda",
    "compare",
    "compare_several",
    "drop_",
    "kld",
    "load",
    "prune_",
    "recover_",
    "retrieve",
    "save",
    "search",
    "swap_",
    "sweep",
    "unswap_",
    "warm_up_",
]

_HOMES = {
    "Study": "prunekit.study.study",
    "compare": "prunekit.study.comparison",
    **dict.fromkeys(("Several", "compare_several"), "prunekit.study.several"),
    "Sweep": "prunekit.sweeping.result",
    "sweep": "prunekit.sweeping.run",
    "Calibration": "prunekit.data.calibration",
    "Kld": "prunekit.divergence.result",
    "kld": "prunekit.divergence.run",
    "SearchResult": "prunekit.mixing.result",
    "search": "prunekit.mixing.run",
    **dict.fromkeys(("load", "save"), "prunekit.checkpoint"),
    **dict.fromkeys(
        (
            "ADMM",
            "OWL",
            "RIA",
            "RIA",
            "Drop",
            "Magnitude",
            "Recipe",
            "Reconstruction",
            "SparseGPT",
            "Wanda",
            "drop_",
            "prune_",
        ),
        "prunekit.pruning",
    ),
    **dict.fromkeys(("KeepMasks", "Recovery", "recover_"), "prunekit.divergence.recovery"),
    **dict.fromkeys(("SwapReport", "swap_", "unswap_"), "prunekit.swap"),
    "retrieve": "prunekit.evaluation.retrieval.searching",
    "warm_up_": "prunekit.packed.warming",
}


# where modules were before 0.2, and where they are
_MOVED = {
    "prunekit.absent": "prunekit.models.absent",
    "prunekit.analysis.baseline": "prunekit.study.baseline",
    "prunekit.analysis.kl_report": "prunekit.divergence.two_models",
    "prunekit.analysis.scores": "prunekit.analysis.quality",
    "prunekit.analysis.sharing": "prunekit.study.sharing",
    "prunekit.analysis.whole_texts": "prunekit.analysis.sequence_metrics",
    "prunekit.architectures": "prunekit.models.architectures",
    "prunekit.atomic": "prunekit.files.atomic",
    "prunekit.blocks": "prunekit.models.blocks",
    "prunekit.calibration": "prunekit.data.calibration",
    "prunekit.comparison": "prunekit.study.comparison",
    "prunekit.distributed": "prunekit.process.distributed",
    "prunekit.evaluation.statistics": "prunekit.evaluation.intervals",
    "prunekit.evaluation.text": "prunekit.evaluation.text_similarity",
    "prunekit.generation": "prunekit.models.generation",
    "prunekit.layouts": "prunekit.models.layouts",
    "prunekit.modeling": "prunekit.models.dropped",
    "prunekit.packed_checkpoint": "prunekit.packed.described",
    "prunekit.progress": "prunekit.process.progress",
    "prunekit.pruning.scores": "prunekit.pruning.importance",
    "prunekit.pruning.statistics": "prunekit.pruning.input_statistics",
    "prunekit.report.build": "prunekit.report.contents",
    "prunekit.report.curves": "prunekit.report.grid_charts",
    "prunekit.report.examples": "prunekit.report.answer_charts",
    "prunekit.report.figures": "prunekit.report.png",
    "prunekit.report.tables": "prunekit.report.terminal",
    "prunekit.report.view": "prunekit.report.summary_tables",
    "prunekit.texts": "prunekit.data.text_files",
    "prunekit.timing": "prunekit.speed.timing",
    "prunekit.variants": "prunekit.speed.variants",
    "prunekit.weight_refs": "prunekit.models.weight_refs",
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
    importlib.import_module("prunekit.models.quantizer")
    importlib.import_module("prunekernels.moved").keep_old_names(_MOVED)
