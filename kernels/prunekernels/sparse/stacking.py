"""What stacking packed weights along their rows demands, whatever the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Packed rows come in lines of so many, which a seam must not cut.
ROWS = 16


def stacked_rows(op: str, weights: Sequence[Any], kind: type[Any]) -> int:
    """Rows of packed weights stacked on each other.

    Args:
        op: The operation's name, for messages.
        weights: Packed weights, with `shape`, `dtype` and `device`.
        kind: The class that packs them.

    Raises:
        ValueError: If there are none, one is not of that class, their columns, value types or
            devices differ, or the rows of any but the last are no multiple of 16.
    """
    if not weights:
        raise ValueError(f"{op} needs at least one packed weight")
    first = weights[0]
    for w in weights:
        if not isinstance(w, kind):
            raise ValueError(
                f"{op} stacks weights of {kind.__name__}, not {type(w).__name__}: pack each with "
                f"{kind.__name__}.pack"
            )
        if (w.shape[1], w.dtype, w.device) != (first.shape[1], first.dtype, first.device):
            raise ValueError(f"{op}: {w} does not fit {first}; pack them alike")
    for w in weights[:-1]:
        if w.shape[0] % ROWS:
            raise ValueError(
                f"{op}: all but the last weight need a multiple of {ROWS} rows, not "
                f"{w.shape[0]}; concatenate the dense weights and pack the result"
            )
    return sum(w.shape[0] for w in weights)


def split_lines(op: str, total: int, rows: Sequence[int]) -> list[int]:
    """Lines of 16 rows of each part, when `total` rows are parted into `rows[0]`, `rows[1]`, ….

    Raises:
        ValueError: If the rows don't add up, a part has none, or a part but the last is no multiple
            of 16.
    """
    whole = sum(rows) == total and all(count > 0 for count in rows)
    if not whole or any(count % ROWS for count in rows[:-1]):
        raise ValueError(
            f"{op}: {list(rows)} are not parts of {total} rows, all but the last multiples of "
            f"{ROWS}"
        )
    return [-(-count // ROWS) for count in rows]
