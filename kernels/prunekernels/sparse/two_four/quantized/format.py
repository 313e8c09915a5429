"""2:4 weights with 8- and 4-bit values in the packed format of `two_four.quantized.layout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from prunekernels.sparse.layer import Expected, GateUp, check_tensor, unchecked
from prunekernels.sparse.stacking import split_lines, stacked_rows
from prunekernels.sparse.two_four.quantized.expand import unpack
from prunekernels.sparse.two_four.quantized.layout import (
    GROUPS,
    KINDS,
    ROWS,
    VALUE_CODES,
    VALUE_NAMES,
    VERSION,
    ValueKind,
    group_of,
    groups_of,
    packed_shape,
    scales_shape,
)
from prunekernels.sparse.two_four.quantized.linear import (
    quantized24_expected,
    quantized24_gate_up,
    quantized24_linear,
)
from prunekernels.sparse.two_four.quantized.packing import (
    pack_numbers,
    packed_rows,
    round_to_nearest,
    unpacked_rows,
)

_DTYPES = {code: dtype for dtype, code in VALUE_CODES.items()}


@dataclass(frozen=True, eq=False)
class Quantized24:
    """A 2:4 weight, (code − zero)·scale where it is kept; its formats are the subclasses.

    Attributes:
        packed: The buffer, int32, shape `packed_shape(*shape, bits)`, contiguous.
        scales: float32, shape `scales_shape(*shape, group)`, contiguous.
        zeros: Zero points, uint8 like the scales, or None.
        shape: (N, K) of the dense weight.
        dtype: Type that a layer multiplies in and `to_dense` gives: bfloat16, float16 or float32.
        version: Version of the format.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    version: int = VERSION
    format: ClassVar[str]
    row_multiple: ClassVar[int] = ROWS
    gate_up: ClassVar[GateUp | None] = staticmethod(quantized24_gate_up)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"packed {self.format} format version {self.version} is unknown (this build reads "
                f"{VERSION}): upgrade prunekernels or pack the weight again"
            )
        if self.dtype not in VALUE_CODES:
            raise ValueError(f"a packed {self.format} weight is {VALUE_NAMES}, not {self.dtype}")
        wanted = packed_shape(*self.shape, self.kind.bits)
        if self.packed.dtype != torch.int32 or tuple(self.packed.shape) != wanted:
            raise ValueError(
                f"a packed {self.format} weight of shape {tuple(self.shape)} is an int32 buffer of "
                f"shape {wanted}, not {self.packed.dtype} {tuple(self.packed.shape)}: pack it again"
            )
        groups = self.scales.shape[1] if self.scales.ndim == 3 else 0
        group = group_of(self.shape[1], groups) if groups else None
        wanted3 = scales_shape(*self.shape, group or 0)
        if group is None or (self.scales.dtype, tuple(self.scales.shape)) != (
            torch.float32,
            wanted3,
        ):
            raise ValueError(
                f"scales of a packed {self.format} weight of shape {tuple(self.shape)} are float32 "
                f"(lines, groups, 16) with groups of a row or {GROUPS} columns, not "
                f"{self.scales.dtype} {tuple(self.scales.shape)}: pack it again"
            )
        if self.zeros is not None and (self.zeros.dtype, self.zeros.shape) != (
            torch.uint8,
            self.scales.shape,
        ):
            raise ValueError(
                f"zeros of a packed {self.format} weight are uint8 of shape "
                f"{tuple(self.scales.shape)}, not {self.zeros.dtype} {tuple(self.zeros.shape)}: "
                "pack it again"
            )
        if not all(tensor.is_contiguous() for tensor in self._tensors().values()):
            raise ValueError("the packed tensors must be contiguous: call .contiguous() on them")

    @property
    def kind(self) -> ValueKind:
        """How its values are held."""
        return KINDS[self.format]

    @property
    def group(self) -> int:
        """Columns that share a scale; 0: the whole row."""
        return group_of(self.shape[1], self.scales.shape[1]) or 0

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes the tensors really hold."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        held = {"packed": self.packed, "scales": self.scales}
        return held if self.zeros is None else {**held, "zeros": self.zeros}

    def _with(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """A weight like this one, of other tensors."""
        packed, scales, zeros = tensors["packed"], tensors["scales"], tensors.get("zeros")
        return replace(self, packed=packed, scales=scales, zeros=zeros, shape=shape)

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """`quantized24_round` of this format, with its usual scales."""
        made = quantized24_round(weight, cls.format)
        assert isinstance(made, cls)
        return made

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        """The weight from the tensors of a `state_dict()` that is known to be valid, unchecked."""
        parts = {name: tensors.get(name) for name in ("packed", "scales", "zeros")}
        return unchecked(cls, **parts, shape=shape, dtype=dtype, version=VERSION)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`quantized24_linear` with this weight."""
        return quantized24_linear(x, self, bias)

    def expected(self, tokens: int) -> Expected:
        """`quantized24_expected` of this weight."""
        return quantized24_expected(tokens, self)

    @classmethod
    def cat(cls, weights: Sequence[Self]) -> Self:
        """The weights stacked along their rows, as for merged projections, in new tensors.

        Raises:
            ValueError: If there are none, or they do not fit together.
        """
        rows, first = stacked_rows("quantized24_cat", weights, cls), weights[0]
        for w in weights:
            if (w.format, w.group, w.zeros is None) != (
                first.format,
                first.group,
                first.zeros is None,
            ):
                raise ValueError(f"quantized24_cat: {w} does not fit {first}; pack them alike")
        joined = {
            name: torch.cat([w._tensors()[name] for w in weights]) for name in first._tensors()
        }
        return first._with(joined, (rows, first.shape[1]))

    def split(self, rows: Sequence[int]) -> list[Self]:
        """Undo `cat`: views of the lines that hold `rows[0]`, `rows[1]`, … rows.

        Raises:
            ValueError: If the rows don't add up, or a part but the last is no multiple of 16.
        """
        lines = split_lines("quantized24_split", self.shape[0], rows)
        parts = {name: torch.split(tensor, lines) for name, tensor in self._tensors().items()}
        return [
            self._with({name: part[i] for name, part in parts.items()}, (count, self.shape[1]))
            for i, count in enumerate(rows)
        ]

    def to_dense(self) -> Tensor:
        """The dense (N, K) weight, rounded once to `dtype`: a new tensor."""
        return unpack(self.packed, self.scales, self.zeros, *self.shape, self.kind, self.dtype)

    def kept_values(self) -> list[Tensor]:
        """The scales, which every value is a multiple of (sharing memory)."""
        return [self.scales]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """This weight on another device, or for layers of another type: its codes stay.

        Raises:
            ValueError: There is no layer of such a type.
        """
        if dtype is not None and dtype not in VALUE_CODES:
            raise ValueError(f"a packed {self.format} weight is {VALUE_NAMES}, not {dtype}")
        tensors = self._tensors()
        if device is not None:
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return replace(self._with(tensors, self.shape), dtype=dtype or self.dtype)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refused: a packed weight has no gradient."""
        if requires_grad:
            raise ValueError(
                f"a packed {self.format} weight cannot be trained: train the dense weight, "
                "to_dense(), with its mask and pack it again"
            )
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors and a `header` (int64: version, N, K, type, kind of value, group)."""
        numbers = [self.version, *self.shape, VALUE_CODES[self.dtype], self.kind.code, self.group]
        return {**self._tensors(), "header": torch.tensor(numbers)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The weight that `state_dict()` described.

        Raises:
            ValueError: If an entry is missing, the version or a type is unknown, a tensor does not
                have the size that the header promises, or a scale is not finite.
        """
        if missing := {"packed", "scales", "header"} - set(state):
            raise ValueError(f"a packed {cls.format} weight lacks {sorted(missing)}: save it again")
        header = state["header"].tolist()
        if len(header) != 6:
            raise ValueError(
                f"a packed {cls.format} header has 6 numbers, not {len(header)}: save it again"
            )
        version, rows, columns, code, kind, group = header
        if version == VERSION and code not in _DTYPES:
            raise ValueError(f"packed {cls.format} type {code} is unknown: upgrade prunekernels")
        if version == VERSION and kind != KINDS[cls.format].code:
            raise ValueError(
                f"a packed {cls.format} weight has values of kind {KINDS[cls.format].code}, not "
                f"{kind}: load it in its own format"
            )
        made = cls(
            state["packed"],
            state["scales"],
            state.get("zeros"),
            (rows, columns),
            _DTYPES.get(code, torch.bfloat16),
            version,
        )
        if made.group != group:
            raise ValueError(
                f"a packed {cls.format} weight with groups of {group} columns has not "
                f"{made.scales.shape[1]} groups: save it again"
            )
        _check_finite(made.scales, "packed")
        if made.zeros is not None and int(made.zeros.max()) > 15:
            raise ValueError(
                f"zeros of a packed {cls.format} weight reach {int(made.zeros.max())}, not 15: "
                "save it again"
            )
        return made

    def __repr__(self) -> str:
        group = f"group={self.group}" if self.group else "scale per row"
        zeros = ", with zeros" if self.zeros is not None else ""
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, {group}{zeros}, "
            f"dtype={self.dtype}, device={self.device}, nbytes={self.nbytes}, "
            f"version={self.version})"
        )


class Int8Sparse24(Quantized24):
    """2:4 with values of 8 bits, −127 … 127."""

    format: ClassVar[str] = "2:4-int8"


class Fp8Sparse24(Quantized24):
    """2:4 with values of type float8_e4m3fn and a scale for each row."""

    format: ClassVar[str] = "2:4-fp8"


class Int4Sparse24(Quantized24):
    """2:4 with values of 4 bits, −8 … 7, or 0 … 15 with zero points."""

    format: ClassVar[str] = "2:4-int4"


CLASSES: dict[str, type[Quantized24]] = {
    kind.format: kind for kind in (Int8Sparse24, Fp8Sparse24, Int4Sparse24)
}
# scales of a weight that is packed without saying which
_USUAL_GROUP = {"2:4-int8": 0, "2:4-fp8": 0, "2:4-int4": 128}


def quantized24_pack(
    integers: Tensor,
    mask: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    kind: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Quantized24:
    """Pack integers with their scales: (integer − zero)·scale where the mask keeps, else 0.

    Nothing is rounded, clipped or pruned.

    Args:
        integers: (N, K) int8: "2:4-int8" −127 … 127; "2:4-int4" −8 … 7, with zeros 0 … 15;
            "2:4-fp8": float8_e4m3fn. What the mask does not keep is ignored.
        mask: (N, K) bool, True = keep, at most two of four columns.
        scales: (N, groups) float32, finite: one for each row, or for each 64 or 128 columns, of
            which the last may be fewer; "2:4-fp8" has one for each row.
        zeros: (N, groups) int8, 0 … 15, for "2:4-int4" only, or None.
        kind: "2:4-int8", "2:4-fp8" or "2:4-int4".
        dtype: Type of the layer: bfloat16, float16 or float32.

    Raises:
        ValueError: Something does not fit; names both values, or the first row and column.
    """
    values = _kind(kind)
    given = {"integers": integers, "mask": mask, "scales": scales}
    for argument, value in (given if zeros is None else {**given, "zeros": zeros}).items():
        check_tensor(f"quantized24_pack: {argument}", value)
    _check_matrix("integers", integers, values.dtype, tuple(integers.shape))
    shape = rows, columns = integers.shape[0], integers.shape[1]
    _check_matrix("the mask", mask, torch.bool, shape)
    groups = scales.shape[1] if scales.ndim == 2 else 0
    group = group_of(columns, groups) if groups else None
    if group is None:
        counts = {size: groups_of(columns, size) for size in GROUPS}
        raise ValueError(
            f"quantized24_pack: scales of shape {tuple(scales.shape)} do not divide {columns} "
            f"columns: give 1 for each row, {counts[64]} (groups of 64) or {counts[128]} (of 128)"
        )
    if group and kind == "2:4-fp8":
        raise ValueError(f"quantized24_pack: {kind} has 1 scale for each row, not {groups}")
    _check_matrix("scales", scales, torch.float32, (rows, groups))
    _check_finite(scales, "given")
    if zeros is not None:
        if kind != "2:4-int4":
            raise ValueError(f"quantized24_pack: {kind} has no zero points: give zeros=None")
        _check_matrix("zeros", zeros, torch.int8, (rows, groups))
        _check_range("zeros", zeros, 0, 15)
    for name, tensor in (("mask", mask), ("scales", scales), ("zeros", zeros)):
        if tensor is not None and tensor.device != integers.device:
            raise ValueError(
                f"quantized24_pack: the integers are on {integers.device} and the {name} on "
                f"{tensor.device}: move one of them"
            )
    if kind == "2:4-fp8":
        bits = integers.view(torch.uint8).masked_fill(~mask, 0)
        # NaN, the only code that is no number; −0 is 0
        if bool((bits & 0x7F == 0x7F).any()):
            row, column = (bits & 0x7F == 0x7F).nonzero()[0].tolist()
            raise ValueError(f"quantized24_pack: NaN in row {row}, column {column}: not a number")
        numbers = bits.masked_fill_(bits == 0x80, 0).to(torch.int16)
    else:
        least, most = (0, 15) if zeros is not None else (values.least, values.most)
        kept = integers.masked_fill(~mask, max(least, 0))
        _check_range("integers", kept, least, most)
        numbers = kept.to(torch.int16)
        if zeros is not None:
            size = group or columns
            numbers -= zeros.to(torch.int16).repeat_interleave(size, 1)[:, :columns]
    below = None if zeros is None else packed_rows(zeros.to(torch.uint8))
    packed = pack_numbers(numbers, mask, below, group, values)
    return CLASSES[kind](packed, packed_rows(scales), below, shape, dtype)


def quantized24_round(
    weight: Tensor,
    kind: str,
    *,
    group: int | None = None,
    symmetric: bool = True,
    mask: Tensor | None = None,
) -> Quantized24:
    """Pack a dense 2:4 weight with its values rounded to the nearest 8- or 4-bit ones.

    Args:
        weight: (N, K), bfloat16, float16 or float32, finite, at most two non-zeros in four columns.
        kind: "2:4-int8", "2:4-fp8" or "2:4-int4".
        group: Columns that share a scale: 64, 128, or 0 for the whole row. None: 128 of "2:4-int4",
            else 0.
        symmetric: Without zero points; only "2:4-int4" can have them.
        mask: (N, K) bool, True = keep: what it does not keep counts as zero.

    Raises:
        ValueError: The weight is no such matrix, or an option does not fit the kind.
    """
    values = _kind(kind)
    check_tensor("quantized24_round: weight", weight)
    if mask is not None:
        check_tensor("quantized24_round: mask", mask)
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"quantized24_round takes a non-empty matrix, not a weight of shape "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype not in VALUE_CODES:
        raise ValueError(
            f"quantized24_round takes {VALUE_NAMES} values, not {weight.dtype}: convert the weight "
            "first, for example weight.to(torch.bfloat16)"
        )
    size = _USUAL_GROUP[kind] if group is None else group
    if size not in (0, *GROUPS) or (size and kind == "2:4-fp8"):
        known = "0" if kind == "2:4-fp8" else f"0, {', '.join(map(str, GROUPS))}"
        raise ValueError(f"quantized24_round: the group of {kind} is one of {known}, not {size}")
    if not symmetric and kind != "2:4-int4":
        raise ValueError(f"quantized24_round: {kind} has no zero points: symmetric=True")
    weight = weight.detach()
    kept = weight != 0 if mask is None else mask
    _check_matrix("the mask", kept, torch.bool, tuple(weight.shape))
    weight = weight.masked_fill(~kept, 0)
    if not bool(weight.isfinite().all()):
        row, column = weight.isfinite().logical_not().nonzero()[0].tolist()
        raise ValueError(
            f"quantized24_round: {weight[row, column].item()} in row {row}, column {column} is not "
            "finite: prune or replace it first"
        )
    rounded = round_to_nearest(weight, size, symmetric, values)
    return quantized24_pack(
        rounded.integers, kept, rounded.scales, rounded.zeros, kind=kind, dtype=weight.dtype
    )


def quantized24_parts(w: Quantized24) -> tuple[Tensor, Tensor | None]:
    """Scales (N, groups) float32 and zeros (N, groups) int8 or None of a packed weight."""
    rows = w.shape[0]
    zeros = None if w.zeros is None else unpacked_rows(w.zeros, rows).to(torch.int8)
    return unpacked_rows(w.scales, rows), zeros


def _kind(name: str) -> ValueKind:
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"the kind must be one of {', '.join(KINDS)}, not {name!r}")
    return KINDS[name]


def _check_matrix(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (
        tensor.ndim != 2
        or tensor.numel() == 0
        or (tensor.dtype, tuple(tensor.shape))
        != (
            dtype,
            shape,
        )
    ):
        wanted = f" of shape {shape}" if len(shape) == 2 and 0 not in shape else ", a matrix"
        raise ValueError(
            f"quantized24_pack: {name} must be {dtype}{wanted}, not {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )


def _check_range(name: str, tensor: Tensor, least: int, most: int) -> None:
    wrong = (tensor < least) | (tensor > most)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"quantized24_pack: {name} must be {least} to {most}, not {int(tensor[row, column])} "
            f"(row {row}, column {column}): round them into that range"
        )


def _check_finite(scales: Tensor, which: str) -> None:
    if not bool(scales.isfinite().all()):
        at = tuple(scales.isfinite().logical_not().nonzero()[0].tolist())
        raise ValueError(
            f"quantized24_pack: the {which} scale at {at} is {scales[at].item()}, not finite: "
            "quantise the weight again"
        )
