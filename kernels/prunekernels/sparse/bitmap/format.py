"""A weight of any sparsity in the packed format of `bitmap.layout`: packing, stacking, storing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from prunekernels.sparse.bitmap import former
from prunekernels.sparse.bitmap.expand import bitmap_unpack, dense_rows
from prunekernels.sparse.bitmap.layout import (
    CHUNK_UNITS,
    UNIT_BYTES,
    VALUE_CODES,
    VALUE_NAMES,
    VERSION,
    WORD_UNITS,
    check_parts,
    chunks_of,
    count_bits,
    line_ranges,
    lines_tiles,
    most_chunks,
    record_units,
    words_of,
)
from prunekernels.sparse.bitmap.linear import bitmap_expected, bitmap_gate_up, bitmap_linear
from prunekernels.sparse.bitmap.packing import as_starts, pack, pack_rows
from prunekernels.sparse.layer import Expected, GateUp, check_tensor, unchecked
from prunekernels.sparse.stacking import ROWS, split_lines, stacked_rows

_NAMES = frozenset({"records", "starts", "room", "header"})
_TYPES = {code: dtype for dtype, code in VALUE_CODES.items()}


@dataclass(frozen=True, eq=False)
class BitmapSparse:
    """A weight of any sparsity in the packed format of `bitmap.layout`.

    Attributes:
        records: int32 (units, 4), contiguous.
        starts: int32 (lines·tiles + 1,), contiguous.
        shape: (N, K) of the dense weight.
        dtype: Type of the values: bfloat16, float16 or float32.
        chunks: The most pieces of 512 bytes that a record takes; results are NaN where a kernel
            meets a record that takes more.
        version: Version of the format.
    """

    records: Tensor
    starts: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    chunks: int
    version: int = VERSION
    format: ClassVar[str] = "bitmap"
    row_multiple: ClassVar[int] = ROWS
    gate_up: ClassVar[GateUp | None] = staticmethod(bitmap_gate_up)
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"packed bitmap format version {self.version} is unknown (this build reads "
                f"{former.VERSION} and {VERSION}): upgrade prunekernels or pack the weight again"
            )
        check_parts(self.records, self.starts, self.chunks, self.dtype, *self.shape)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.records.device

    @property
    def nbytes(self) -> int:
        """Bytes the two tensors really hold."""
        return self.records.nbytes + self.starts.nbytes

    @classmethod
    def pack(cls, weight: Tensor) -> BitmapSparse:
        """`bitmap_pack`."""
        return bitmap_pack(weight)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> BitmapSparse:
        """The weight from the tensors of a `state_dict()` that is known to be valid, unchecked."""
        if "records" not in tensors:
            raise ValueError(
                f"a packed bitmap weight of version {former.VERSION} must be converted: load it "
                "once in memory, without offloading, and save it again"
            )
        records, starts, chunks = tensors["records"], tensors["starts"], len(tensors["room"])
        parts = {"records": records, "starts": starts, "shape": shape, "dtype": dtype}
        return unchecked(cls, **parts, chunks=chunks, version=VERSION)

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

    def to_dense(self) -> Tensor:
        """The dense (N, K) weight: a new tensor of `dtype`."""
        return bitmap_unpack(self.records, self.starts, self.dtype, *self.shape)

    def kept_values(self) -> list[Tensor]:
        """A vector of every value that is not zero, tile after tile (a copy)."""
        words = self.starts[:-1].long()[:, None] + torch.arange(WORD_UNITS, device=self.device)
        holds = torch.ones(len(self.records), dtype=torch.bool, device=self.device)
        holds[words.view(-1)] = False
        values = self.records[holds].view(self.dtype).view(-1)
        return [values[values != 0]]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BitmapSparse:
        """This weight on another device or with values of another type (rounded)."""
        if dtype is not None and dtype not in VALUE_CODES:
            raise ValueError(f"packed bitmap values must be {VALUE_NAMES}, not {dtype}")
        weight = self
        if dtype is not None and dtype != self.dtype:
            weight = self._converted(dtype)
        if device is None:
            return weight
        records, starts = weight.records.to(device), weight.starts.to(device)
        return replace(weight, records=records, starts=starts)

    def _converted(self, dtype: torch.dtype) -> BitmapSparse:
        if self.device.type == "meta":
            return replace(self, dtype=dtype, chunks=min(self.chunks, most_chunks(dtype)))
        rows = dense_rows(self.records, self.starts, self.dtype, *self.shape)
        records, starts = pack_rows(part.to(dtype) for _, part in rows)
        return BitmapSparse(records, starts, self.shape, dtype, chunks_of(starts))

    def requires_grad_(self, requires_grad: bool = True) -> BitmapSparse:
        """Refused: a packed weight has no gradient."""
        if requires_grad:
            raise ValueError(
                "a packed bitmap weight cannot be trained: train the dense weight, to_dense(), "
                "with its mask and pack it again"
            )
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Records, starts, `room`, and a `header` (int64: version, N, K, value type)."""
        return {
            "records": self.records,
            "starts": self.starts,
            "room": torch.zeros(self.chunks, dtype=torch.int8, device=self.device),
            "header": torch.tensor([self.version, *self.shape, VALUE_CODES[self.dtype]]),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> BitmapSparse:
        """The weight that `state_dict()` described, of version 3 or 2 (which is converted).

        Raises:
            ValueError: If an entry is missing, the version or value type is unknown, the tensors
                do not have the sizes that the header promises, or `starts` or `room` do not
                agree with the bits (which are counted: kernels rely on it).
        """
        header = state["header"].tolist() if "header" in state else [VERSION]
        wanted = former.NAMES if header[0] == former.VERSION else _NAMES
        if missing := wanted - set(state):
            raise ValueError(f"a packed bitmap weight lacks {sorted(missing)}: save it again")
        if len(header) != 4:
            raise ValueError(
                f"a packed bitmap header has 4 numbers, not {len(header)}: save it again"
            )
        version, rows, columns, code = header
        if version in (former.VERSION, VERSION) and code not in _TYPES:
            raise ValueError(
                f"a packed bitmap header says value type {code}, which is unknown: upgrade "
                "prunekernels or save it again"
            )
        shape, dtype = (rows, columns), _TYPES.get(code, torch.bfloat16)
        if version == former.VERSION:
            records, starts = pack_rows(former.dense_rows(state))
            return cls(records, starts, shape, dtype, chunks_of(starts))
        parts = state["records"], state["starts"]
        packed = cls(*parts, shape, dtype, len(state["room"]), version)
        packed._check_starts()
        return packed

    def _check_starts(self) -> None:
        lines, tiles = lines_tiles(*self.shape)
        sizes, itemsize = self.starts.diff(), self.dtype.itemsize
        fine = int(self.starts[0]) == 0 and int(self.starts[-1]) == len(self.records)
        fine &= bool((sizes >= WORD_UNITS).all())
        for first, last in line_ranges(lines, self.shape[1]) if fine else ():
            here = slice(first * tiles, last * tiles)
            counts = count_bits(words_of(self.records, self.starts[here]))
            fine &= bool((sizes[here] == record_units(counts, itemsize)).all())
        if not fine:
            raise ValueError("packed bitmap: starts do not agree with the bits; pack it again")
        if self.chunks != chunks_of(self.starts):
            raise ValueError(
                f"packed bitmap: a record takes {chunks_of(self.starts)} chunks of "
                f"{UNIT_BYTES * CHUNK_UNITS} bytes, there is room for {self.chunks}; pack it again"
            )

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
    check_tensor("bitmap_pack: weight", weight)
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"bitmap_pack takes a non-empty matrix, not a weight of shape {tuple(weight.shape)}"
        )
    if weight.dtype not in VALUE_CODES:
        raise ValueError(
            f"bitmap_pack takes {VALUE_NAMES} values, not {weight.dtype}: convert the weight "
            "first, for example weight.to(torch.bfloat16)"
        )
    records, starts = pack(weight.detach())
    rows, columns = weight.shape
    return BitmapSparse(records, starts, (rows, columns), weight.dtype, chunks_of(starts))


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
    rows, first = stacked_rows("bitmap_cat", weights, BitmapSparse), weights[0]
    return replace(
        first,
        records=torch.cat([w.records for w in weights]),
        starts=as_starts(torch.cat([w.starts.diff() for w in weights])),
        shape=(rows, first.shape[1]),
        chunks=max(w.chunks for w in weights),
    )


def bitmap_split(weight: BitmapSparse, rows: Sequence[int]) -> list[BitmapSparse]:
    """Undo `bitmap_cat`: the lines that hold `rows[0]`, `rows[1]`, … rows; only `starts` is copied.

    Raises:
        ValueError: If the rows don't add up, or a part but the last is no multiple of 16.
    """
    parts, line = [], 0
    tiles = lines_tiles(*weight.shape)[1]
    for lines, count in zip(split_lines("bitmap_split", weight.shape[0], rows), rows, strict=True):
        starts = weight.starts[line * tiles : (line + lines) * tiles + 1]
        begin, end = (int(starts[i]) for i in (0, -1))
        part = replace(
            weight,
            records=weight.records[begin:end],
            starts=starts - begin,
            shape=(count, weight.shape[1]),
            chunks=chunks_of(starts),
        )
        parts.append(part)
        line += lines
    return parts
