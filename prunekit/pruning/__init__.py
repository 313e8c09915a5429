"""Make a model sparse, or take parts of it out."""

from prunekit.pruning.dropping import Drop, Dropped, DropReport, drop_
from prunekit.pruning.patterns import Pattern
from prunekit.pruning.recipes import (
    ADMM,
    DEFAULT_IGNORE,
    METHODS,
    OWL,
    RIA,
    Magnitude,
    Method,
    Recipe,
    SparseGPT,
    Wanda,
    method_from_dict,
)
from prunekit.pruning.reconstruction import Reconstruction
from prunekit.pruning.report import BlockFit, MatrixReport, PruneReport
from prunekit.pruning.sequential import prune_

__all__ = [
    "ADMM",
    "DEFAULT_IGNORE",
    "METHODS",
    "OWL",
    "RIA",
    "BlockFit",
    "Drop",
    "DropReport",
    "Dropped",
    "Magnitude",
    "MatrixReport",
    "Method",
    "Pattern",
    "PruneReport",
    "Recipe",
    "Reconstruction",
    "SparseGPT",
    "Wanda",
    "drop_",
    "method_from_dict",
    "prune_",
]
