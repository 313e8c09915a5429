"""The bitmap format: any sparsity, one bit per weight and the non-zero values.

A weight has N rows (outputs) and K columns (inputs), padded to lines of 16 rows and blocks of 64
columns. A line and a block meet in a *tile* of 1024 weights, read in the order in which the lanes
of a warp hold the left operand of four `mma.m16n8k16`: step (16 columns), lane, element. For
lane = 4·g + t, element i = 4·u + 2·h + c is row g + 8·h, column 16·step + 8·u + 2·t + c.

    bitmap  int32 (lines, blocks, 32): bit 8·step + i of a lane's word says element i is not zero
    values  (8·units,): the non-zeros of tile after tile, each tile filled up with zeros to a unit
            of 8 values, so that tiles can be copied 16 bytes at a time
    starts  int32 (lines·blocks + 1,): the unit where each tile starts, and the number of units

Nothing depends on how the non-zeros are spread: full and empty rows, tiles and weights are all
exact, and a lane finds its values by counting the bits before its own. −0.0 is not stored; every
other value, NaN included, comes back bit for bit. Bytes per weight at sparsity s and value size v:
v·(1 − s) + 1/8, and for `starts` and the filling at most (4 + 7·v) / 1024 more.
Source: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekernels.sparse.stacking import ROWS, split_lines, stacked_rows

VERSION = 1
BLOCK_K, TILE = 64, 1024
UNIT = 8

#: Value types and their numbers in a stored header.
VALUE_CODES: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

# Integers as wide as one value, and as two, by the bytes of a value.
_INTEGERS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}

# Elements handled at once: temporaries stay in cache, and small beside the weight.
_CHUNK_ELEMENTS = 1 << 18


def line_blocks(out_features: int, in_features: int) -> tuple[int, int]:
    """Lines of 16 rows and blocks of 64 columns of an (N, K) weight."""
    return -(-out_features // ROWS), -(-in_features // BLOCK_K)


@dataclass(frozen=True, eq=False)
class BitmapSparse:
    """A weight of any sparsity in the packed format of this module.

    Attributes:
        bitmap: int32 (lines, blocks, 32), contiguous.
        starts: int32 (lines·blocks + 1,), contiguous.
        values: (8·units,) of bfloat16, float16 or float32, contiguous.
        shape: (N, K) of the dense weight.
        version: Version of the format.
    """

    bitmap: Tensor
    starts: Tensor
    values: Tensor
    shape: tuple[int, int]
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"packed bitmap format version {self.version} is unknown (this build reads "
                f"{VERSION}): upgrade prunekernels or pack the weight again"
            )
        check_parts(self.bitmap, self.starts, self.values, *self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.bitmap.device

    @property
    def nbytes(self) -> int:
        """Bytes the three tensors really hold."""
        return sum(t.numel() * t.element_size() for t in (self.bitmap, self.starts, self.values))

    def to_dense(self) -> Tensor:
        """The dense (N, K) weight: a new tensor of `dtype`."""
        return bitmap_unpack(self.bitmap, self.starts, self.values, *self.shape)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BitmapSparse:
        """This weight on another device or with values of another type (rounded)."""
        if dtype is not None and dtype not in VALUE_CODES:
            raise ValueError(f"packed bitmap values must be {_names()}, not {dtype}")
        values = self.values
        if dtype is not None and dtype != self.dtype:
            # a value rounded down to −0.0 becomes 0.0
            values = values.to(dtype) + 0.0
        if device is None:
            return replace(self, values=values)
        return replace(
            self,
            bitmap=self.bitmap.to(device),
            starts=self.starts.to(device),
            values=values.to(device),
        )

    def requires_grad_(self, requires_grad: bool = True) -> BitmapSparse:
        """Refused: a packed weight has no gradient."""
        if requires_grad:
            raise ValueError(
                "a packed bitmap weight cannot be trained: train the dense weight, to_dense(), "
                "with its mask and pack it again"
            )
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors and a `header` (int64: version, N, K, value type), for safetensors."""
        header = torch.tensor([self.version, *self.shape, VALUE_CODES[self.dtype]])
        parts = {"bitmap": self.bitmap, "starts": self.starts, "values": self.values}
        return {**parts, "header": header}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> BitmapSparse:
        """The weight that `state_dict()` described.

        Raises:
            ValueError: If an entry is missing, the version or value type is unknown, the tensors
                do not have the sizes that the header promises, or `starts` does not agree with the
                bits (which are counted: kernels rely on it).
        """
        missing = {"bitmap", "starts", "values", "header"} - set(state)
        if missing:
            raise ValueError(f"a packed bitmap weight lacks {sorted(missing)}: save it again")
        header = state["header"].tolist()
        if len(header) != 4:
            raise ValueError(
                f"a packed bitmap header has 4 numbers, not {len(header)}: save it again"
            )
        version, rows, columns, code = header
        values = state["values"]
        if version == VERSION and code != VALUE_CODES.get(values.dtype):
            raise ValueError(
                f"a packed bitmap header says value type {code}, the values are {values.dtype}: "
                "upgrade prunekernels or save it again"
            )
        packed = cls(state["bitmap"], state["starts"], values, (rows, columns), version)
        packed._check_starts()
        return packed

    def _check_starts(self) -> None:
        lines = line_blocks(*self.shape)[0]
        fine = int(self.starts[0]) == 0 and int(self.starts[-1]) * UNIT == self.values.numel()
        for first, last in _chunks(lines, self.shape[1]):
            starts = _starts_of(self.starts, first, last, self.shape[1])
            counts = _flags(self.bitmap[first:last]).sum((1, 2, 3))
            fine &= bool((starts.diff() * UNIT == counts + _filling(counts)).all())
        if not fine:
            raise ValueError("packed bitmap: starts do not agree with the bits; pack it again")

    def __repr__(self) -> str:
        return (
            f"BitmapSparse(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"nbytes={self.nbytes}, version={self.version})"
        )


def check_parts(bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int) -> None:
    """Raise ValueError unless the tensors can hold a packed (rows, columns) weight."""
    lines, blocks = line_blocks(rows, columns)
    for name, tensor, wanted in (
        ("bitmap", bitmap, (lines, blocks, 32)),
        ("starts", starts, (lines * blocks + 1,)),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != wanted:
            raise ValueError(
                f"the {name} of a packed ({rows}, {columns}) weight is int32 of shape {wanted}, "
                f"not {tensor.dtype} {tuple(tensor.shape)}: pack the weight again"
            )
    if values.dtype not in VALUE_CODES or values.ndim != 1 or values.shape[0] % UNIT:
        raise ValueError(
            f"packed bitmap values are a vector of {_names()} whose length is a multiple of "
            f"{UNIT}, not {values.dtype} {tuple(values.shape)}: pack the weight again"
        )
    for name, tensor in (("bitmap", bitmap), ("starts", starts), ("values", values)):
        if not tensor.is_contiguous():
            raise ValueError(f"packed {name} must be contiguous: call .contiguous() on it")
        if tensor.device != bitmap.device:
            raise ValueError(
                f"packed {name} is on {tensor.device}, the bitmap on {bitmap.device}: move the "
                "whole weight with .to(device)"
            )


def bitmap_pack(weight: Tensor) -> BitmapSparse:
    """Pack a weight of any sparsity; it is never pruned here.

    Args:
        weight: (N, K), bfloat16, float16 or float32.

    Returns:
        The packed weight, on the same device.

    Raises:
        ValueError: If the weight is not a non-empty matrix of such a type.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"bitmap_pack takes a non-empty matrix, not a weight of shape {tuple(weight.shape)}"
        )
    if weight.dtype not in VALUE_CODES:
        raise ValueError(
            f"bitmap_pack takes {_names()} values, not {weight.dtype}: convert the weight first, "
            "for example weight.to(torch.bfloat16)"
        )
    weight = weight.detach()
    rows, columns = weight.shape
    lines, blocks = line_blocks(rows, columns)
    bitmap = torch.empty((lines, blocks, 32), dtype=torch.int32, device=weight.device)
    values: list[Tensor] = []
    units: list[Tensor] = []
    for first, last in _chunks(lines, columns):
        chunk = weight[first * ROWS : last * ROWS]
        padded = weight.new_zeros((last - first) * ROWS, blocks * BLOCK_K)
        padded[: chunk.shape[0], :columns] = chunk
        # row = (h, g), column = (block, step, u, t, c)
        elements = padded.view(last - first, 2, 8, blocks, 4, 2, 4, 2)
        elements = elements.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(-1, TILE)
        used = elements != 0
        counts = used.sum(1)
        bitmap[first:last] = _words(used).view(last - first, blocks, 32)
        chosen = _with_filling(used, counts)
        values.append(torch.nn.functional.pad(elements, (0, UNIT - 1))[chosen])
        units.append((counts + _filling(counts)) // UNIT)
    ends = torch.cat(units).cumsum(0)
    starts = _as_starts("bitmap_pack", ends, int(ends[-1]))
    return BitmapSparse(bitmap, starts, torch.cat(values), (rows, columns))


def bitmap_unpack(
    bitmap: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int
) -> Tensor:
    """The dense (rows, columns) weight that the three tensors hold.

    Args:
        bitmap: int32 (lines, blocks, 32).
        starts: int32 (lines·blocks + 1,).
        values: (8·units,).
        rows: N.
        columns: K.

    Returns:
        A new contiguous tensor of the values' type, on their device.
    """
    lines, blocks = line_blocks(rows, columns)
    dense = torch.empty((rows, columns), dtype=values.dtype, device=values.device)
    bits, pair = _INTEGERS[values.dtype.itemsize]
    for first, last in _chunks(lines, columns):
        begin, end = (int(starts[blocks * line]) * UNIT for line in (first, last))
        target = dense[first * ROWS : last * ROWS]
        if begin == end:
            target.zero_()
            continue
        used = _flags(bitmap[first:last]).flatten(1)
        # values are numbered with their filling, which follows each tile
        used = _with_filling(used, used.sum(1))
        number = (used.view(-1).cumsum(0, dtype=torch.int32) - 1).clamp_(min=0)
        # indexing and masking integers is several times faster than scattering by a mask
        elements = values[begin:end].view(bits).index_select(0, number).view_as(used)
        elements = (elements & -used.to(bits))[:, :TILE].flatten()
        # the pairs of columns c = 0, 1 stay together: half as many elements to move
        pairs = elements.view(pair).view(last - first, blocks, 4, 8, 4, 2, 2)
        pairs = pairs.permute(0, 6, 3, 1, 2, 5, 4).reshape(-1, blocks * BLOCK_K // 2)
        target.copy_(pairs.view(values.dtype)[: target.shape[0], :columns])
    return dense


def bitmap_cat(weights: Sequence[BitmapSparse]) -> BitmapSparse:
    """Stack packed weights along their rows, as for merged query, key and value projections.

    Equivalent to packing `torch.cat([w.to_dense() for w in weights])`, without unpacking.

    Args:
        weights: Packed weights with the same columns, value type and device; the rows of all but
            the last are multiples of 16.

    Returns:
        The packed weight of all rows, in new tensors.

    Raises:
        ValueError: If there are none, they do not fit together, or hold too many non-zeros.
    """
    rows, first = stacked_rows("bitmap_cat", weights), weights[0]
    before, ends = 0, []
    for w in weights:
        ends.append(w.starts[1:].long() + before)
        before += w.values.shape[0] // UNIT
    starts = _as_starts("bitmap_cat", torch.cat(ends), before)
    bitmap, values = (torch.cat([getattr(w, n) for w in weights]) for n in ("bitmap", "values"))
    return BitmapSparse(bitmap, starts, values, (rows, first.shape[1]), first.version)


def bitmap_split(weight: BitmapSparse, rows: Sequence[int]) -> list[BitmapSparse]:
    """Undo `bitmap_cat`: the lines that hold `rows[0]`, `rows[1]`, … rows; only `starts` is copied.

    Raises:
        ValueError: If the rows don't add up, or a part but the last is no multiple of 16.
    """
    lines = split_lines("bitmap_split", weight.shape[0], rows)
    parts, line = [], 0
    blocks = weight.bitmap.shape[1]
    for bitmap, count in zip(torch.split(weight.bitmap, lines), rows, strict=True):
        starts = weight.starts[line * blocks : (line + len(bitmap)) * blocks + 1]
        begin, end = (int(starts[i]) for i in (0, -1))
        values = weight.values[begin * UNIT : end * UNIT]
        shape = (count, weight.shape[1])
        parts.append(BitmapSparse(bitmap, starts - begin, values, shape, weight.version))
        line += len(bitmap)
    return parts


def _as_starts(op: str, ends: Tensor, units: int) -> Tensor:
    """`starts` of tiles that end at these units, the last of them at `units`."""
    if units >= 2**31:
        raise ValueError(
            f"{op} holds at most {2**31 * UNIT} non-zeros, not {UNIT * units}: split the weight by "
            "rows"
        )
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)


def _names() -> str:
    return "bfloat16, float16 or float32"


def _chunks(lines: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of lines that are handled at once."""
    size = max(1, _CHUNK_ELEMENTS // (ROWS * columns))
    for first in range(0, lines, size):
        yield first, min(first + size, lines)


def _starts_of(starts: Tensor, first: int, last: int, columns: int) -> Tensor:
    blocks = -(-columns // BLOCK_K)
    return starts[first * blocks : last * blocks + 1]


def _filling(counts: Tensor) -> Tensor:
    """Zeros behind tiles of so many values."""
    return -counts % UNIT


def _with_filling(used: Tensor, counts: Tensor) -> Tensor:
    """Flags of the elements of tiles (…, 1024) and of seven more, true for the filling."""
    more = torch.arange(UNIT - 1, device=used.device) < _filling(counts)[:, None]
    return torch.cat([used, more], 1)


def _words(used: Tensor) -> Tensor:
    """Bitmap words (tiles, 32) of flags (tiles, 1024)."""
    # eight flags are the bytes of a 64-bit word; the product gathers them in its upper byte
    bytes_ = (used.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)
    return bytes_.view(-1, 4, 32).transpose(1, 2).contiguous().view(torch.int32).squeeze(2)


def _flags(bitmap: Tensor) -> Tensor:
    """Flags (tiles, 4 steps, 32 lanes, 8 elements) of bitmap words (…, 32)."""
    bytes_ = bitmap.reshape(-1, 32, 1).view(torch.uint8).transpose(1, 2).reshape(-1)
    # each byte becomes the eight bytes of a 64-bit word
    every = torch.arange(256, device=bitmap.device)[:, None]
    table = (every >> torch.arange(8, device=bitmap.device) & 1).to(torch.uint8).view(torch.int64)
    flags = table.view(-1).index_select(0, bytes_.to(torch.int32)).view(torch.bool)
    return flags.view(-1, 4, 32, 8)
