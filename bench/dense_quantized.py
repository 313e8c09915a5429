"""Our quantised 2:4 kernel with its sparsity taken out, as a peer: what sparsity alone gains.

The same tensor-core kernel, staging, words in registers, splits and epilogue as `2:4-int8` and
`2:4-int4` have, for a weight of which every value is kept. A dense (N, K) weight is packed as a 2:4
one of 2·K columns whose kept values are neighbours; what tells their places is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from prunekernels import quantized24_pack
from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import meta
from prunekernels.runtime import capability
from prunekernels.sparse.two_four.layout import STEP_K
from prunekernels.sparse.two_four.quantized import mma
from prunekernels.sparse.two_four.quantized.layout import (
    KINDS,
    ROWS,
    TAIL_STEPS,
    UNIT_STEPS,
    Parts,
    block_words,
    group_of,
    groups_of,
    line_blocks,
    scales_shape,
)
from prunekernels.sparse.two_four.quantized.packing import (
    Rounded,
    packed_rows,
)
from prunekernels.sparse.two_four.quantized.tuning import quantized24_mma
from prunekernels.sparse.two_four.tuning import MmaConfig
from torch import Tensor

#: Words of a step that hold metadata, in the 2:4 formats alone.
_META = 16


class Dense(NamedTuple):
    """A packed weight of which every value is kept.

    Attributes:
        parts: The kernel's tensors: int32 words, float32 scales, uint8 zero points or None.
        shape: (N, K).
        kind: How a value is held, by the name of the 2:4 format.
    """

    parts: Parts
    shape: tuple[int, int]
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors."""
        return sum(tensor.nbytes for tensor in self.parts if tensor is not None)


def pack(given: Rounded, kind: str) -> Dense:
    """Pack integers with their scales and zero points, on the integers' device.

    Args:
        given: Integers (N, K) of the kind's type; scales, and zero points of 4-bit ones, (N,
            groups): one for a row, or for 64 or 128 columns.
        kind: "2:4-int8" or "2:4-int4".
    """
    integers, scales, zeros = given
    rows, columns = integers.shape
    group = group_of(columns, scales.shape[1]) or 0
    wide = 2 * (columns + columns % 2)
    pairs = F.pad(integers, (0, columns % 2)).view(rows, -1, 2)
    mask = torch.zeros(rows, wide // 4, 4, dtype=torch.bool, device=integers.device)
    mask[..., :2] = True
    # columns stand twice as far apart, and so do groups: of 128 they are two of the largest
    times = max(1, group // 64)

    def of_wide(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(times, 1)[:, : groups_of(wide, 128 if group else 0)]

    sparse = quantized24_pack(
        F.pad(pairs, (0, 2)).view(rows, wide),
        mask.view(rows, wide),
        of_wide(scales),
        None if zeros is None else of_wide(zeros),
        kind=kind,
    )
    levels = None if zeros is None else packed_rows(zeros.to(torch.uint8))
    parts = _without_metadata(sparse.packed, kind, wide), packed_rows(scales), levels
    return Dense(parts, (rows, columns), kind)


def exact(given: Rounded) -> Tensor:
    """The weight that integers stand for, (N, K) float64."""
    columns = given.integers.shape[1]
    group = group_of(columns, given.scales.shape[1]) or columns

    def of_columns(groups: Tensor) -> Tensor:
        return groups.double().repeat_interleave(group, 1)[:, :columns]

    numbers = given.integers.double()
    if given.zeros is not None:
        numbers = numbers - of_columns(given.zeros)
    return numbers * of_columns(given.scales)


def _without_metadata(packed: Tensor, kind: str, wide: int) -> Tensor:
    lines, units, tails = line_blocks(ROWS * len(packed), wide)
    unit, tail = (block_words(steps, KINDS[kind].bits) for steps in (UNIT_STEPS, TAIL_STEPS))
    whole, rest = packed.split((units * unit, tails * tail), 1)
    values = (
        whole.reshape(lines, units, unit)[..., : unit - _META * UNIT_STEPS],
        rest.reshape(lines, tails, tail)[..., : tail - _META * TAIL_STEPS],
    )
    return torch.cat([part.flatten(1) for part in values], 1)


def unfit(weight: Tensor) -> str:
    """Why the kernel cannot multiply with a weight where it is ("" if it can)."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"activations are bfloat16 or float16, not {weight.dtype}"
    if capability(weight.device) not in mma.CAPABILITIES:
        return f"not on compute capability {capability(weight.device)}"
    return ""


def linear(x: Tensor, w: Dense, config: MmaConfig | None = None) -> Tensor:
    """x·Wᵀ, (M, N), for x (M, K) bfloat16 or float16 on an NVIDIA GPU.

    Args:
        x: Activations, M > 0.
        w: The weight.
        config: Tile; by default that of the 2:4 kernel for the same layer.
    """
    rows, _ = w.shape
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    config = config or mma.configuration(x, w.parts, rows, w.kind, False)
    mma.product(x, w.parts, None, w.kind, None, y, "none", config, dense=True).run()
    return y


def case_name(kind: str, group: int, zeros: bool, tokens: int) -> str:
    """Name of a compiled program for so many tokens, as `bench.bounds` finds it."""
    name = kind.removeprefix("2:4-") + f"g{group}" * bool(group) + "z" * zeros
    return f"dense_quantized/mma/{name}/bf16/t{tokens}/split"


#: What is measured: kind, columns of a group, zero points.
FORMS = (
    ("2:4-int8", 0, False),
    ("2:4-int4", 128, False),
    ("2:4-int4", 64, False),
    ("2:4-int4", 128, True),
)


def compile_cases() -> list[KernelCase]:
    """The specialisations whose instructions are counted, and that must not spill."""
    every: Sequence[Arch] = (80, 89, 90)
    rows, columns, dtype = 14336, 4096, torch.bfloat16
    cases = []
    for kind, group, zeros in FORMS:
        packed, scales, levels = _case_parts(rows, columns, kind, group, zeros)
        programs = {}
        for tokens in (1, 16, 32, 64):
            form = tokens, rows, columns, False, KINDS[kind].bits, group, zeros
            config = quantized24_mma(*form, 132)._replace(splits=4)
            programs.setdefault(config.token_tiles, (tokens, config))
        for tokens, config in programs.values():
            x, y = meta((tokens, columns), dtype), meta((tokens, rows), dtype)
            parts = packed, scales, levels
            call = mma.product(x, parts, None, kind, None, y, "none", config, dense=True)
            cases.append(
                call.case(
                    case_name(kind, group, zeros, 8 * config.token_tiles),
                    opcodes=("HMMA.16816.F32.BF16", "LDSM", "LDGSTS"),
                    elements_per_iteration=config.row_tiles * ROWS * UNIT_STEPS * STEP_K // 2,
                    per_iteration=("HMMA", UNIT_STEPS * config.row_tiles * config.token_tiles),
                    # sm_89 has smaller programs of the one form that takes 64 tokens with groups
                    archs=(80, 90) if group and config.token_tiles == 8 else every,
                )
            )
    return cases


def _case_parts(rows: int, columns: int, kind: str, group: int, zeros: bool) -> Parts:
    """A weight on the meta device."""
    lines, units, tails = line_blocks(rows, 2 * columns)
    steps = UNIT_STEPS * units + TAIL_STEPS * tails
    shape = scales_shape(rows, columns, group)
    return (
        meta((lines, steps * 8 * KINDS[kind].bits), torch.int32),
        meta(shape, torch.float32),
        meta(shape, torch.uint8) if zeros else None,
    )
