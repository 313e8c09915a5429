"""The packed 2:4 format: one copy of a weight that serves every architecture and batch size.

A weight has N rows (outputs) and K columns (inputs); each group of four columns holds at most two
non-zeros. Rows are padded to 16, columns to 64. The buffer holds one line per 16 rows: first the
*units* of 256 columns, then what is left as *tails* of 64 columns. In 32-bit words, where V is the
number of words that hold the two kept values of a group (16-bit values: 1, 32-bit values: 2):

    unit  8 steps × V planes × 32 lanes × 4 value words, then 32 lanes × 4 metadata words
    tail  2 steps × V planes × 32 lanes × 4 value words, then 32 lanes × 1 metadata word

A step is 32 columns = 8 groups, in the order one `mma.sp.m16n8k32` reads. For lane = 4·g + t:
value word 0 is row g, group t; word 1 is row g + 8; words 2 and 3 are the same rows, group t + 4.
16-bit values stand two in a word, the first kept one in the low half; of 32-bit values plane 0
holds the first kept ones and plane 1 the second. Metadata word j of lanes t = 0, 1 belongs to step
2j and of lanes t = 2, 3 to step 2j + 1; its low half is row g, groups 4·(t mod 2) .. + 3, a nibble
each (index of the first kept value | index of the second << 2), its high half row g + 8.

Groups with fewer than two non-zeros keep explicit zeros. −0.0 is stored as 0.0; every other value,
NaN included, comes back bit for bit. Size: 9/16 of a 16-bit weight, 17/32 of a 32-bit one.
Source: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VERSION = 1
ROWS = 16
STEP_K = 32
UNIT_K, UNIT_STEPS = 256, 8
TAIL_K, TAIL_STEPS = 64, 2

#: Value types and their numbers in a stored header. 8- and 4-bit values take numbers from 3.
VALUE_CODES: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_VALUE_NAMES = "bfloat16, float16 or float32"

# Elements handled at once: temporaries stay in cache, and small beside the weight.
_CHUNK_ELEMENTS = 1 << 18


def line_blocks(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Lines of 16 rows, and units and tails in each line, of a packed (N, K) weight."""
    padded = -(-in_features // TAIL_K) * TAIL_K
    return -(-out_features // ROWS), padded // UNIT_K, padded % UNIT_K // TAIL_K


def value_words(dtype: torch.dtype) -> int:
    """V: 32-bit words that hold the two kept values of a group."""
    return dtype.itemsize // 2


def block_words(steps: int, dtype: torch.dtype) -> int:
    """32-bit words of a unit (8 steps) or a tail (2 steps): values and metadata."""
    return steps * (128 * value_words(dtype) + 16)


def packed_shape(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of the int32 buffer that holds a packed (N, K) weight with values of `dtype`."""
    lines, units, tails = line_blocks(out_features, in_features)
    return lines, units * block_words(UNIT_STEPS, dtype) + tails * block_words(TAIL_STEPS, dtype)


@dataclass(frozen=True, eq=False)
class Sparse24:
    """A 2:4 weight in the packed format of this module.

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

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"packed 2:4 format version {self.version} is unknown (this build reads {VERSION}):"
                " upgrade prunekernels or pack the weight again"
            )
        if self.dtype not in VALUE_CODES:
            raise ValueError(f"packed 2:4 values must be {_VALUE_NAMES}, not {self.dtype}")
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

    def to_dense(self) -> Tensor:
        """The dense (N, K) weight: a new tensor of `dtype`."""
        return sparse24_unpack(self.packed, self.shape[0], self.shape[1], self.dtype)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Sparse24:
        """This weight on another device or with values of another type (rounded)."""
        moved = self
        if device is not None:
            moved = Sparse24(self.packed.to(device), self.shape, self.dtype, self.version)
        if dtype is not None and dtype != self.dtype:
            if dtype not in VALUE_CODES:
                raise ValueError(f"packed 2:4 values must be {_VALUE_NAMES}, not {dtype}")
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


def sparse24_pack(weight: Tensor) -> Sparse24:
    """Pack a weight that already is 2:4; it is never pruned here.

    Args:
        weight: (N, K), bfloat16, float16 or float32, at most two non-zeros (NaN counts as one) in
            each group of four columns; columns past K count as zero.

    Returns:
        The packed weight, on the same device.

    Raises:
        ValueError: If the weight is not a non-empty matrix of such a type, or not 2:4 (names the
            first row and column).
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"sparse24_pack takes a non-empty matrix, not a weight of shape {tuple(weight.shape)}"
        )
    if weight.dtype not in VALUE_CODES:
        raise ValueError(
            f"sparse24_pack takes {_VALUE_NAMES} values, not {weight.dtype}: convert the weight "
            "first, for example weight.to(torch.bfloat16)"
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
    if not weights:
        raise ValueError("sparse24_cat needs at least one packed weight")
    first = weights[0]
    for w in weights:
        if (w.shape[1], w.dtype, w.device) != (first.shape[1], first.dtype, first.device):
            raise ValueError(f"sparse24_cat: {w} does not fit {first}; pack them alike")
    for w in weights[:-1]:
        if w.shape[0] % ROWS:
            raise ValueError(
                f"sparse24_cat: all but the last weight need a multiple of {ROWS} rows, not "
                f"{w.shape[0]}; concatenate the dense weights and pack the result"
            )
    rows = sum(w.shape[0] for w in weights)
    return Sparse24(torch.cat([w.packed for w in weights]), (rows, first.shape[1]), first.dtype)


def sparse24_split(weight: Sparse24, rows: Sequence[int]) -> list[Sparse24]:
    """Undo `sparse24_cat`: views of the lines that hold `rows[0]`, `rows[1]`, … rows.

    Raises:
        ValueError: If the rows don't add up, or a part but the last is no multiple of 16.
    """
    if sum(rows) != weight.shape[0] or any(count % ROWS for count in rows[:-1]):
        raise ValueError(
            f"sparse24_split: {list(rows)} are not parts of {weight.shape[0]} rows, all but the "
            f"last multiples of {ROWS}"
        )
    lines = [-(-count // ROWS) for count in rows]
    return [
        Sparse24(part, (count, weight.shape[1]), weight.dtype, weight.version)
        for part, count in zip(torch.split(weight.packed, lines), rows, strict=True)
    ]


def sparse24_unpack(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense (rows, columns) weight held by a packed buffer.

    Args:
        packed: int32, shape `packed_shape(rows, columns, dtype)`.
        rows: N.
        columns: K.
        dtype: Type of the values.

    Returns:
        A new contiguous tensor, on the buffer's device.
    """
    lines, units, tails = line_blocks(rows, columns)
    dense = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    split, middle = units * UNIT_K, units * block_words(UNIT_STEPS, dtype)
    per_chunk = max(1, _CHUNK_ELEMENTS // (ROWS * columns))
    for first in range(0, lines, per_chunk):
        last = min(first + per_chunk, lines)
        part = packed[first:last]
        full = _expand(part[:, :middle], units, UNIT_STEPS, dtype)
        rest = _expand(part[:, middle:], tails, TAIL_STEPS, dtype)
        target = dense[first * ROWS : last * ROWS].view(_bits(dtype))
        count = target.shape[0]
        target[:, :split] = full[:count, : min(split, columns)]
        target[:, split:] = rest[:count, : max(columns - split, 0)]
    return dense


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


def _bits(dtype: torch.dtype) -> torch.dtype:
    """The integer type as wide as a value."""
    return torch.int16 if dtype.itemsize == 2 else torch.int32


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
    bits = _bits(weight.dtype)
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


def _expand(part: Tensor, blocks: int, steps: int, dtype: torch.dtype) -> Tensor:
    """Bits of the dense values (16·lines, 32·steps·blocks): inverse of `_interleave`."""
    lines, per_group = part.shape[0], value_words(dtype)
    count = steps * per_group * 128
    part = part.reshape(lines, blocks, count + steps * 16)
    # (t, high, line, g, block, step, upper): the nibbles of a metadata word then are far apart,
    # and every shift below is by one number
    words = part[..., :count].reshape(lines, blocks, steps, per_group, 8, 4, 2, 2)
    words = words.permute(3, 5, 7, 0, 4, 1, 2, 6).contiguous()
    meta = part[..., count:].reshape(lines, blocks, 8, 2, 2, steps // 2)
    meta = meta.permute(0, 2, 1, 5, 3, 4).reshape(words.shape[3:])
    shifts = [[16 * high + 4 * t for high in range(2)] for t in range(4)]
    nibbles = torch.stack([torch.stack([meta >> s for s in pair]) for pair in shifts])
    dense = _place_16(words[0], nibbles) if per_group == 1 else _place_32(words, nibbles)
    dense = dense.permute(2, 1, 3, 4, 5, 6, 0, 7).reshape(lines * ROWS, -1)
    return dense.view(_bits(dtype))


def _place_16(words: Tensor, nibbles: Tensor) -> Tensor:
    """Groups (..., 1) of four 16-bit values as one 64-bit word."""
    dense = (words & 0xFFFF).to(torch.int64) << ((nibbles & 3) << 4).to(torch.int64)
    dense |= ((words >> 16) & 0xFFFF).to(torch.int64) << ((nibbles & 12) << 2).to(torch.int64)
    return dense[..., None]


def _place_32(words: Tensor, nibbles: Tensor) -> Tensor:
    """Groups (..., 4) of four 32-bit values."""
    low, high = words
    first, second = nibbles & 3, (nibbles >> 2) & 3
    dense = torch.empty((*low.shape, 4), dtype=torch.int32, device=low.device)
    # the first kept value is never in column 3, the second never in column 0
    dense[..., 0] = low & _mask(first == 0, torch.int32)
    for column in (1, 2):
        kept = low & _mask(first == column, torch.int32)
        dense[..., column] = kept | (high & _mask(second == column, torch.int32))
    dense[..., 3] = high & _mask(second == 3, torch.int32)
    return dense
