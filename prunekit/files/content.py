"""A digest of gigabytes of weights at the speed of memory, for telling one model from another.

SHA-256 of all bytes takes about a second per gigabyte. Here each 4 KiB of a chunk are a row of 512
words of 64 bits; SHA-256 is taken of the wrapping sums of all rows and of all columns. A change
inside one word always changes its row's sum, and a move of words changes row or column sums: only
four or more changes that cancel in rows and columns alike are missed, which accidents do not make.
It is no protection against someone who makes such changes on purpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROW = 512  # words of 64 bits
_CHUNK = 1 << 20  # bytes: read twice, the second time from a cache


def add_content(digest: Any, data: NDArray[np.uint8]) -> None:
    """Update a hashlib digest with the sums of `data` (n,), and with the bytes of its odd end."""
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        whole = len(chunk) // (8 * _ROW) * (8 * _ROW)
        table = chunk[:whole].view(np.uint64).reshape(-1, _ROW)
        for axis in (0, 1):
            digest.update(np.add.reduce(table, axis, dtype=np.uint64).tobytes())
        digest.update(chunk[whole:].tobytes())
