"""Layers whose weights are packed, and how a checkpoint describes them."""

from prunekit.packed.formats import FORMATS
from prunekit.packed.modules import FusedGatedMLP, MergedLinear, MergedPart, PackedLinear

__all__ = ["FORMATS", "FusedGatedMLP", "MergedLinear", "MergedPart", "PackedLinear"]
