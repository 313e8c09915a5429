"""A weight of any sparsity in the packed format of `bitmap.layout`: packing, stacking, storing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from prunekernels.sparse.bitmap.expand import bitmap_unpack
from prunekernels.sparse.bitmap.layout import (
    BLOCK_K,
    LANES,
    TILE,
    UNIT,
    VALUE_CODES,
    VALUE_NAMES,
    VERSION,
    check_parts,
    chunks,
    line_blocks,
    set_bits,
    starts_of,
    step_bytes,
)
from prunekernels.sparse.bitmap.linear import bitmap_expected, bitmap_linear
from prunekernels.sparse.layer import Expected, GateUp, unchecked
from prunekernels.sparse.stacking import ROWS, split_lines, stacked_rows


@dataclass(frozen=True, eq=False)
class BitmapSparse:
    """A weight of any sparsity in the packed format of `bitmap.layout`.

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
    format: ClassVar[str] = "bitmap"
    row_multiple: ClassVar[int] = ROWS
    gate_up: ClassVar[GateUp | None] = None

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

    @classmethod
    def pack(cls, weight: Tensor) -> BitmapSparse:
        """`bitmap_pack` without a mask."""
        return bitmap_pack(weight)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> BitmapSparse:
        """The weight from the tensors of a `state_dict()` that is known to be valid, unchecked."""
        parts = {name: tensors[name] for name in ("bitmap", "starts", "values")}
        return unchecked(cls, **parts, shape=shape, version=VERSION)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bitmap_linear` with this weight."""
        return bitmap_linear(x, self, bias)

    def expected(self, tokens: int) -> Expected:
        """`bitmap_expected` of this weight."""
        return bitmap_expected(tokens, self)

    @classmethod
    def cat(cls, weights: Sequence[BitmapSparse]) -> BitmapSparse:
        """`bitmap_cat`."""
        return bitmap_cat(weights)

    def split(self, rows: Sequence[int]) -> list[BitmapSparse]:
        """`bitmap_split` of this weight."""
        return bitmap_split(self, rows)

    def kept_values(self) -> list[Tensor]:
        """A tensor that holds every value which is not zero (shares memory)."""
        return [self.values]

    def to_dense(self) -> Tensor:
        """The dense (N, K) weight: a new tensor of `dtype`."""
        return bitmap_unpack(self.bitmap, self.starts, self.values, *self.shape)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BitmapSparse:
        """This weight on another device or with values of another type (rounded)."""
        if dtype is not None and dtype not in VALUE_CODES:
            raise ValueError(f"packed bitmap values must be {VALUE_NAMES}, not {dtype}")
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
        count = set_bits(self.device).sum(1)
        fine = int(self.starts[0]) == 0 and int(self.starts[-1]) * UNIT == self.values.numel()
        for first, last in chunks(lines, self.shape[1]):
            starts = starts_of(self.starts, first, last, self.shape[1])
            counts = count.index_select(0, step_bytes(self.bitmap[first:last]))
            counts = counts.view(-1, TILE // 8).sum(1)
            fine &= bool((starts.diff() * UNIT == counts + _filling(counts)).all())
        if not fine:
            raise ValueError("packed bitmap: starts do not agree with the bits; pack it again")

    def __repr__(self) -> str:
        return (
            f"BitmapSparse(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"nbytes={self.nbytes}, version={self.version})"
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
            f"bitmap_pack takes {VALUE_NAMES} values, not {weight.dtype}: convert the weight "
            "first, for example weight.to(torch.bfloat16)"
        )
    weight = weight.detach()
    rows, columns = weight.shape
    lines, blocks = line_blocks(rows, columns)
    bitmap = torch.empty((lines, blocks, 32), dtype=torch.int32, device=weight.device)
    values: list[Tensor] = []
    units: list[Tensor] = []
    for first, last in chunks(lines, columns):
        chunk = weight[first * ROWS : last * ROWS]
        padded = weight.new_zeros((last - first) * ROWS, blocks * BLOCK_K)
        padded[: chunk.shape[0], :columns] = chunk
        # row = (h, g), column = (block, step, u, t, c)
        elements = padded.view(last - first, 2, 8, blocks, 4, 2, 4, 2)
        elements = elements.permute(0, 3, 4, 5, 2, 6, 1, 7).reshape(-1, TILE)
        used = elements != 0
        counts = used.sum(1)
        bitmap[first:last] = _words(used).view(last - first, blocks, 32)
        chosen = _with_filling(used, counts)
        values.append(torch.nn.functional.pad(elements, (0, UNIT - 1))[chosen])
        units.append((counts + _filling(counts)) // UNIT)
    ends = torch.cat(units).cumsum(0)
    starts = _as_starts("bitmap_pack", ends, int(ends[-1]))
    return BitmapSparse(bitmap, starts, torch.cat(values), (rows, columns))


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


def _filling(counts: Tensor) -> Tensor:
    """Zeros behind tiles of so many values."""
    return -counts % UNIT


def _with_filling(used: Tensor, counts: Tensor) -> Tensor:
    """Flags of the elements of tiles (…, 1024) and of seven more, true for the filling."""
    more = torch.arange(UNIT - 1, device=used.device) < _filling(counts)[:, None]
    return torch.cat([used, more], 1)


def _words(used: Tensor) -> Tensor:
    """Bitmap words (tiles, 32) of flags (tiles, 1024) in the order of the values."""
    # four flags are the bytes of a 32-bit word; the product gathers them in its top nibble
    runs = (used.view(torch.int32) * 0x01020408 >> 24 & 15).to(torch.uint8).view(-1, 4, 2, LANES)
    bytes_ = runs[:, :, 0] | runs[:, :, 1] << 4
    return bytes_.transpose(1, 2).contiguous().view(torch.int32).squeeze(2)
