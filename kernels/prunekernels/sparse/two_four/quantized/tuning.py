"""Order of the implementations for 2:4 weights with 8- and 4-bit values.

Pure functions of shape, type and architecture; nothing is probed at import or at run time.
"""

from __future__ import annotations


def quantized24_order(
    tokens: int, rows: int, columns: int, capability: tuple[int, int], itemsize: int = 2
) -> list[tuple[str, str]]:
    """Implementations of such a layer on an NVIDIA GPU, preferred first, with reasons.

    There is no kernel yet.

    Args:
        tokens: M.
        rows: N.
        columns: K.
        capability: CUDA compute capability.
        itemsize: Bytes of an activation.

    Returns:
        `(name, reason)` pairs, never empty.
    """
    return [("eager", "expand, then dense: no kernel yet")]
