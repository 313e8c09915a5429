"""A weight in the packed 2:4 format of `two_four.layout`: packing, stacking, unpacking, storing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunekernels.sparse.layer import Expected, GateUp, check_tensor, unchecked
from prunekernels.sparse.stacking import split_lines, stacked_rows
from prunekernels.sparse.two_four.expand import sparse24_unpack
from prunekernels.sparse.two_four.layout import (
    ROWS,
    TAIL_K,
    TAIL_STEPS,
    UNIT_K,
    UNIT_STEPS,
    VALUE_CODES,
    VALUE_NAMES,
    VERSION,
    bits_type,
    block_words,
    line_blocks,
    packed_shape,
)
from prunekernels.sparse.two_four.linear import (
    sparse24_expected,
    sparse24_gate_up,
    sparse24_linear,
)

# Elements handled at once: temporaries stay in cache, and small beside the weight.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, eq=False)
class Sparse24:
    """A 2:4 weight in the packed format of `two_four.layout`.

    Attributes:
        packed: The buffer, int32, shape `packed_shape(*shape, dtype)`, contiguous.
        shape: (N, K) of the dense weight.
        dtype: Type of the values: bfloat16, float16 or float32.
        version: Version of the format.
    """

    packed: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    version: int = VERSION
    format: ClassVar[str] = "2:4"
    row_multiple: ClassVar[int] = ROWS
    gate_up: ClassVar[GateUp | None] = staticmethod(sparse24_gate_up)
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"packed 2:4 format version {self.version} is unknown (this build reads {VERSION}):"
                " upgrade prunekernels or pack the weight again"
            )
        if self.dtype not in VALUE_CODES:
            raise ValueError(f"packed 2:4 values must be {VALUE_NAMES}, not {self.dtype}")
        wanted = packed_shape(*self.shape, self.dtype)
        if self.packed.dtype != torch.int32 or tuple(self.packed.shape) != wanted:
            raise ValueError(
                f"a packed {tuple(self.shape)} weight of {self.dtype} is an int32 buffer of shape "
                f"{wanted}, not {self.packed.dtype} {tuple(self.packed.shape)}: pack it again"
            )
        if not self.packed.is_contiguous():
            raise ValueError("the packed buffer must be contiguous: call .contiguous() on it")

    @property
    def device(self) -> torch.device:
        """Device of the buffer."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes the buffer really holds."""
        return self.packed.numel() * self.packed.element_size()

    @classmethod
    def pack(cls, weight: Tensor) -> Sparse24:
        """`sparse24_pack` without a mask."""
        return sparse24_pack(weight)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Sparse24:
        """The weight from the tensors of a `state_dict()` that is known to be valid, unchecked."""
        return unchecked(cls, packed=tensors["packed"], shape=shape, dtype=dtype, version=VERSION)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`sparse24_linear` with this weight."""
        return sparse24_linear(x, self, bias)

    def expected(self, tokens: int) -> Expected:
        """`sparse24_expected` of this weight."""
        return sparse24_expected(tokens, self)

    @classmethod
    def cat(cls, weights: Sequence[Sparse24]) -> Sparse24:
        """`sparse24_cat`."""
        return sparse24_cat(weights)

    def split(self, rows: Sequence[int]) -> list[Sparse24]:
        """`sparse24_split` of this weight."""
        return sparse24_split(self, rows)

    def to_dense(self) -> Tensor:
        """The dense (N, K) weight: a new tensor of `dtype`."""
        return sparse24_unpack(self.packed, self.shape[0], self.shape[1], self.dtype)

    def kept_values(self) -> list[Tensor]:
        """Views of the buffer that hold its values, the zeros of emptier groups among them."""
        _, units, tails = line_blocks(*self.shape)
        views, start = [], 0
        for blocks, steps in ((units, UNIT_STEPS), (tails, TAIL_STEPS)):
            words = block_words(steps, self.dtype)
            part = self.packed[:, start : start + blocks * words].view(
                len(self.packed), blocks, words
            )
            views.append(part[..., : -16 * steps].view(self.dtype))
            start += blocks * words
        return views

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Sparse24:
        """This weight on another device or with values of another type (rounded)."""
        moved = self
        if device is not None:
            moved = Sparse24(self.packed.to(device), self.shape, self.dtype, self.version)
        if dtype is not None and dtype != self.dtype:
            if dtype not in VALUE_CODES:
                raise ValueError(f"packed 2:4 values must be {VALUE_NAMES}, not {dtype}")
            moved = sparse24_pack(moved.to_dense().to(dtype))
        return moved

    def requires_grad_(self, requires_grad: bool = True) -> Sparse24:
        """Refused: a packed weight has no gradient."""
        if requires_grad:
            raise ValueError(
                "a packed 2:4 weight cannot be trained: train the dense weight, to_dense(), with "
                "its mask and pack it again"
            )
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """`packed` and a `header` (int64: version, N, K, value type), as safetensors can hold."""
        header = torch.tensor([self.version, *self.shape, VALUE_CODES[self.dtype]])
        return {"packed": self.packed, "header": header}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Sparse24:
        """The weight that `state_dict()` described.

        Raises:
            ValueError: If an entry is missing, the version or value type is unknown, or the buffer
                does not have the size that the header promises.
        """
        missing = {"packed", "header"} - set(state)
        if missing:
            raise ValueError(f"a packed 2:4 weight lacks {sorted(missing)}: save it again")
        header = state["header"].tolist()
        if len(header) != 4:
            raise ValueError(f"a packed 2:4 header has 4 numbers, not {len(header)}: save it again")
        version, rows, columns, code = header
        dtypes = {number: dtype for dtype, number in VALUE_CODES.items()}
        if version == VERSION and code not in dtypes:
            raise ValueError(f"packed 2:4 value type {code} is unknown: upgrade prunekernels")
        return cls(state["packed"], (rows, columns), dtypes.get(code, torch.bfloat16), version)

    def __repr__(self) -> str:
        return (
            f"Sparse24(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"nbytes={self.nbytes}, version={self.version})"
        )


def sparse24_pack(weight: Tensor, mask: Tensor | None = None) -> Sparse24:
    """Pack a weight that already is 2:4, or the part of one that a 2:4 mask keeps.

    Nothing is pruned here. With a mask, such as `nm_mask` gives, no masked copy of the weight is
    made: a few lines at a time are masked and packed.

    Args:
        weight: (N, K), bfloat16, float16 or float32, at most two non-zeros (NaN counts as one) in
            each group of four columns; columns past K count as zero.
        mask: (N, K) bool, True = keep: what it does not keep counts as zero. None keeps all.

    Returns:
        The packed weight, on the same device.

    Raises:
        ValueError: If the weight is not a non-empty matrix of such a type, the mask does not fit
            it, or what is kept is not 2:4 (names the first row and column).
    """
    check_tensor("sparse24_pack: weight", weight)
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"sparse24_pack takes a non-empty matrix, not a weight of shape {tuple(weight.shape)}"
        )
    if weight.dtype not in VALUE_CODES:
        raise ValueError(
            f"sparse24_pack takes {VALUE_NAMES} values, not {weight.dtype}: convert the weight "
            "first, for example weight.to(torch.bfloat16)"
        )
    if mask is not None:
        check_tensor("sparse24_pack: mask", mask)
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"sparse24_pack: the mask must be bool of shape {tuple(weight.shape)}, not "
                f"{mask.dtype} of shape {tuple(mask.shape)}"
            )
        if mask.device != weight.device:
            raise ValueError(
                f"sparse24_pack: the weight is on {weight.device} and the mask on {mask.device}: "
                "move one of them"
            )
    weight = weight.detach()
    rows, columns = weight.shape
    lines, units, tails = line_blocks(rows, columns)
    shape = packed_shape(rows, columns, weight.dtype)
    packed = weight.new_empty(shape, dtype=torch.int32)
    per_chunk = max(1, _CHUNK_ELEMENTS // (ROWS * columns))
    for first in range(0, lines, per_chunk):
        last = min(first + per_chunk, lines)
        chunk = weight[first * ROWS : last * ROWS]
        if mask is not None:
            chunk = chunk.masked_fill(mask[first * ROWS : last * ROWS].logical_not(), 0)
        _check_pattern(chunk, first * ROWS)
        padded = weight.new_zeros((last - first) * ROWS, units * UNIT_K + tails * TAIL_K)
        padded[: chunk.shape[0], :columns] = chunk
        words, nibbles = _select(padded)
        split, middle = units * UNIT_K // 4, units * block_words(UNIT_STEPS, weight.dtype)
        out = packed[first:last]
        out[:, :middle] = _interleave(words[:, :, :split], nibbles[:, :split], UNIT_STEPS)
        out[:, middle:] = _interleave(words[:, :, split:], nibbles[:, split:], TAIL_STEPS)
    return Sparse24(packed, (rows, columns), weight.dtype)


def sparse24_cat(weights: Sequence[Sparse24]) -> Sparse24:
    """Stack packed weights along their rows, as for merged query, key and value projections.

    Equivalent to packing `torch.cat([w.to_dense() for w in weights])`, without unpacking.

    Args:
        weights: Packed weights with the same columns, value type and device; the rows of all but
            the last are multiples of 16.

    Returns:
        The packed weight of all rows, in a new buffer.

    Raises:
        ValueError: If there are none, or they do not fit together.
    """
    rows, first = stacked_rows("sparse24_cat", weights, Sparse24), weights[0]
    return Sparse24(torch.cat([w.packed for w in weights]), (rows, first.shape[1]), first.dtype)


def sparse24_split(weight: Sparse24, rows: Sequence[int]) -> list[Sparse24]:
    """Undo `sparse24_cat`: views of the lines that hold `rows[0]`, `rows[1]`, … rows.

    Raises:
        ValueError: If the rows don't add up, or a part but the last is no multiple of 16.
    """
    lines = split_lines("sparse24_split", weight.shape[0], rows)
    return [
        Sparse24(part, (count, weight.shape[1]), weight.dtype, weight.version)
        for part, count in zip(torch.split(weight.packed, lines), rows, strict=True)
    ]


def _check_pattern(weight: Tensor, first_row: int) -> None:
    """Raise for the first group of four columns that holds three or four non-zeros."""
    missing = -weight.shape[1] % 4
    used = torch.nn.functional.pad(weight != 0, (0, missing))
    counts = used.view(used.shape[0], -1, 4).sum(2, dtype=torch.uint8)
    bad = counts > 2
    if bool(bad.any()):
        row, group = divmod(int(bad.flatten().to(torch.uint8).argmax()), counts.shape[1])
        raise ValueError(
            f"not 2:4: row {first_row + row}, columns {4 * group} to {4 * group + 3} hold "
            f"{int(counts[row, group])} non-zeros; prune first, for example "
            "weight * nm_mask(weight.abs(), keep=2, of=4)"
        )


def _select(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Value words (rows, V, groups) and index nibbles (rows, groups), int32, of a padded weight."""
    columns = weight.view(weight.shape[0], -1, 4).permute(2, 0, 1).contiguous()
    used = columns != 0
    u0, u1, u2, u3 = used
    # Masks of bits instead of selections and tables: several times faster on a CPU.
    # Kept columns: the used ones; beside a single one, its partner in 0, 1 or 2, 3.
    upper = u2 | u3
    first_is_1, first_is_2 = u1 & upper & ~u0, upper & ~u1 & ~u0
    second_is_2 = u2 & ~u3 & (u0 | u1)
    bits = bits_type(weight.dtype)
    a, b, c, d = columns.view(bits)
    low = (a & _mask(u0, bits)) | (b & _mask(first_is_1, bits)) | (c & _mask(first_is_2 & u2, bits))
    high = (b & _mask(u1 & ~upper, bits)) | (c & _mask(second_is_2, bits)) | (d & _mask(u3, bits))
    if bits is torch.int16:
        words = ((low.to(torch.int32) & 0xFFFF) | (high.to(torch.int32) << 16))[:, None]
    else:
        words = torch.stack((low, high), 1)
    first = first_is_1.to(torch.int32) + first_is_2.to(torch.int32) * 2
    second = 1 + upper.to(torch.int32) * 2 - second_is_2.to(torch.int32)
    return words, first | (second << 2)


def _mask(chosen: Tensor, bits: torch.dtype) -> Tensor:
    """All bits of the integer type `bits` where chosen, none elsewhere."""
    return -chosen.to(bits)


def _interleave(words: Tensor, nibbles: Tensor, steps: int) -> Tensor:
    """Packed lines of value words (16·lines, V, groups) and nibbles (16·lines, groups).

    groups = 8·steps·blocks.
    """
    per_group = words.shape[1]
    lines, blocks = words.shape[0] // ROWS, words.shape[2] // (8 * steps)
    # row = (high, g); group = (block, step, upper, t)
    values = words.reshape(lines, 2, 8, per_group, blocks, steps, 2, 4)
    values = values.permute(0, 4, 5, 3, 2, 7, 6, 1)
    # group = (block, pair of steps, step of the pair, half of the step, nibble)
    quads = nibbles.reshape(lines, 2, 8, blocks, steps // 2, 2, 2, 4)
    halves = quads[..., 0] | quads[..., 1] << 4 | quads[..., 2] << 8 | quads[..., 3] << 12
    meta = (halves[:, 0] | halves[:, 1] << 16).permute(0, 2, 1, 4, 5, 3)
    count = steps * per_group * 128
    parts = values.reshape(lines, blocks, count), meta.reshape(lines, blocks, steps * 16)
    return torch.cat(parts, 2).reshape(lines, blocks * (count + steps * 16))
