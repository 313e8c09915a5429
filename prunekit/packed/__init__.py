"""Layers whose weights are packed, and how a checkpoint describes them."""

from prunekit.packed.formats import FORMATS, PackedWeight, Shape
from prunekit.packed.modules import (
    FusedGatedMLP,
    MergedLinear,
    MergedPart,
    PackedLinear,
    own_layer,
    packed_layers,
    prove_kernels,
    weight_bytes,
    weight_count,
)

__all__ = [
    "FORMATS",
    "FusedGatedMLP",
    "MergedLinear",
    "MergedPart",
    "PackedLinear",
    "PackedWeight",
    "Shape",
    "own_layer",
    "packed_layers",
    "prove_kernels",
    "weight_bytes",
    "weight_count",
]
