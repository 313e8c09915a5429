"""What the launchers of the tensor-core kernels prepare: rows of x, and room for split sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels.sparse.counters import counters


def padded_rows(x: Tensor, columns: int) -> Tensor:
    """x (M, K) with zeros up to `columns`, in rows that can be copied in chunks of 16 bytes."""
    if x.shape[1] != columns:
        return F.pad(x, (0, columns - x.shape[1]))
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def split_columns(pieces: int, splits: int) -> tuple[int, int]:
    """Pieces of a split and number of splits, none empty, when `pieces` are shared by `splits`."""
    per_split = max(1, -(-pieces // splits))
    return per_split, max(1, -(-pieces // per_split))


def room_for_parts(
    y: Tensor, token_blocks: int, row_blocks: int, splits: int, tokens: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Sums and counters of `fragments.finish`, for blocks of `tokens` × `rows`.

    Returns:
        float32 (token_blocks, splits, tokens, row_blocks·rows) and zeroed int32 (at least
        token_blocks·row_blocks,); y twice, which nobody reads, if there is nothing to split.
    """
    if splits == 1:
        return y, y
    shape = (token_blocks, splits, tokens, row_blocks * rows)
    parts = torch.empty(shape, dtype=torch.float32, device=y.device)
    return parts, counters(token_blocks * row_blocks, y.device)


def difference(got: Tensor, x: Tensor, weight: Tensor) -> str | None:
    """None if `got` equals x·Wᵀ of small integers (all sums are exact), else what differs."""
    wanted = (x.cpu().double() @ weight.cpu().double().T).to(got.dtype)
    wrong = int((got.cpu() != wanted).sum())
    if not wrong:
        return None
    return f"{wrong} of {wanted.numel()} results differ ({got.dtype}, {len(x)} tokens)"
