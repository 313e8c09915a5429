"""Patterns: a fraction of all weights stays ("unstructured"), or N of every M in a row ("N:M")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prunekit.errors import PrunekitError

UNSTRUCTURED = "unstructured"
DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    Attributes:
        name: "unstructured" or "N:M".
        sparsity: Fraction of the weights to prune, in (0, 1).
        keep: N: weights kept in each group; 0 when unstructured.
        of: M: consecutive weights of a row that form a group; 0 when unstructured.
    """

    name: str
    sparsity: float
    keep: int = 0
    of: int = 0

    @property
    def structured(self) -> bool:
        """Whether this is N:M."""
        return self.of > 0


def parse(pattern: str, sparsity: float | None = None) -> Pattern:
    """Read "unstructured" or "N:M" (N kept of M).

    Args:
        pattern: The pattern's name.
        sparsity: Fraction to prune, in (0, 1). None means 0.5, or what N:M implies, 1 - N/M.

    Raises:
        PrunekitError: No such pattern, a sparsity outside (0, 1), or one that contradicts N:M.
    """
    if sparsity is not None and not 0 < sparsity < 1:
        raise PrunekitError(f"sparsity {sparsity} is outside (0, 1): use for example 0.5")
    if pattern == UNSTRUCTURED:
        return Pattern(pattern, DEFAULT_SPARSITY if sparsity is None else sparsity)
    match = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if match is None:
        raise PrunekitError(
            f"pattern '{pattern}' is unknown: use 'unstructured', or 'N:M' such as '2:4'"
        )
    keep, of = int(match[1]), int(match[2])
    if not 0 < keep < of:
        raise PrunekitError(
            f"pattern '{pattern}' keeps {keep} of {of}: use N:M with 0 < N < M, such as '2:4'"
        )
    implied = 1 - keep / of
    if sparsity is not None and abs(sparsity - implied) > 1e-6:
        raise PrunekitError(
            f"sparsity {sparsity} contradicts pattern '{pattern}', which prunes {implied:g}: leave "
            "sparsity out, or use pattern 'unstructured'"
        )
    return Pattern(f"{keep}:{of}", implied, keep, of)
