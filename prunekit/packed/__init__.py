"""Layers whose weights are packed, and how a checkpoint describes them."""

from prunekit.packed.formats import FORMATS, PackedWeight, Shape
from prunekit.packed.modules import (
    FusedGatedMLP,
    MergedLinear,
    MergedPart,
    PackedLinear,
    own_layer,
    packed_layers,
)
from prunekit.packed.sizes import plain_parts, weight_bytes, weight_count
from prunekit.packed.warming import prove_kernels

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
    "plain_parts",
    "prove_kernels",
    "weight_bytes",
    "weight_count",
]
