"""Product with quantised 2:4 weights on NVIDIA's sparse tensor cores, for few to some tokens.

    y[m, n] = act(Σ_g s[n, g]·Σ_{k ∈ g} x[m, k]·(c[n, k] − z[n, g]) + b[n]),  or silu(gate)·up

As in `two_four.mma`, each warp loads units of 256 columns into registers, x goes through a ring in
shared memory, and columns may be split. As a unit has few bytes here, two are on their way while
one is multiplied, in two sets of registers that take turns: the loop goes on by two. Before a
product, codes become pairs of 16-bit floats (`codes`): a logical instruction puts them into
mantissas, and one `fma` for each pair takes the offset away or multiplies a power of two back. So
the operand holds whole numbers (e4m3 values, as they are), or these divided by a power of two,
without any rounding. Where groups have scales, sums start anew in each group and are scaled in
float32; a row's scale multiplies its sum at the end, after that power of two.
Format: `two_four.quantized.layout`.

DENSE takes the sparsity out, for benchmarks: a register of the operand then holds two neighbours
instead of two kept values of four, a step has 16 columns, and there is no metadata.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"
# Triton compiles tuple + tuple, not (*tuple, item): RUF005 is waived where that matters.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from prunekernels.compilation import Arch, KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.runtime import capability, processors
from prunekernels.sparse.fragments import axis, finish, multiply_dense, x_layout
from prunekernels.sparse.gluon_compat import barrier
from prunekernels.sparse.launching import difference, padded_rows, room_for_parts, split_columns
from prunekernels.sparse.two_four.mma import CAPABILITIES as CAPABILITIES
from prunekernels.sparse.two_four.mma import multiply_fragments
from prunekernels.sparse.two_four.quantized.codes import (
    add_scaled,
    minus_of,
    operand,
    quarters,
    scales_of_rows,
    step_of,
)
from prunekernels.sparse.two_four.quantized.layout import KINDS, ROWS, Parts, filled, line_blocks
from prunekernels.sparse.two_four.quantized.portable import case_parts, shared_options
from prunekernels.sparse.two_four.quantized.tuning import quantized24_mma
from prunekernels.sparse.two_four.quantized.unit import (
    at_unit,
    load_scales,
    load_unit,
    multiply_unit,
)
from prunekernels.sparse.two_four.tuning import MmaConfig


@gluon.jit(do_not_specialize=["M", "N", "lines", "units", "tails", "units_per_split", "groups"])
def _mma24q_fwd_kernel(
    x_ptr,  # (M, columns padded to two steps) as 32-bit words, rows stride_xm words apart
    packed_ptr,  # int32 (lines, words): the weight, or the gate's
    scales_ptr,  # float32 (lines, groups, 16)
    zeros_ptr,  # int16 (lines, groups, 8): pairs of zero points, read if HAS_ZEROS
    up_ptr,  # the same of the up's weight, read if GATED
    up_scales_ptr,
    up_zeros_ptr,
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # as for `sum_parts`, if SPLIT
    counter_ptr,
    stride_xm,
    M,
    N,
    lines,
    words,  # words in a line
    units,
    tails,
    units_per_split,
    groups,
    KIND: gl.constexpr,  # "bf16" or "f16"
    BITS: gl.constexpr,  # of a value
    FP8: gl.constexpr,  # whether 8 bits are an e4m3 number, else an integer
    CONVERTS: gl.constexpr,  # whether an instruction makes e4m3 values f16: compute capability 8.9
    HAS_ZEROS: gl.constexpr,
    GROUP: gl.constexpr,  # columns of a group: 0 (a row), 64 or 128
    DENSE: gl.constexpr,  # whether every value is kept
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    NW: gl.constexpr,  # warps
    MT: gl.constexpr,  # tiles of 16 rows per warp; gated: the gate's tile and the up's
    NT: gl.constexpr,  # tiles of 8 tokens
    STAGES: gl.constexpr,  # of the ring, a power of two
):
    TILES: gl.constexpr = NW * MT
    P: gl.constexpr = BITS // 4  # words of a lane in a step
    STEP_K: gl.constexpr = 16 if DENSE else 32
    META: gl.constexpr = 0 if DENSE else 16  # words of a step
    UNIT: gl.constexpr = 8 * (32 * P + META)
    X_WORDS: gl.constexpr = 4 * STEP_K  # of a token in a unit
    STEP: gl.constexpr = step_of(BITS, FP8, CONVERTS, KIND)
    PER_UNIT: gl.constexpr = 8 * STEP_K // GROUP if GROUP else 0
    W: gl.constexpr = gl.BlockedLayout([MT, 4], [1, 32], [NW, 1], [1, 0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // X_WORDS, X_WORDS // 4], [NW, 1], [1, 0])
    X: gl.constexpr = x_layout(NT, NW)
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, MT, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    ROWS_OF: gl.constexpr = gl.BlockedLayout(
        [1, MT, 1, 1, 2], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    # eight rows of 16-byte chunks, rotated: ldmatrix then meets every bank once
    RING: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    # blocks of tokens first: those that read the same rows of the weight run together
    block = gl.program_id(1)
    split = gl.program_id(2)
    token0 = gl.program_id(0) * (8 * NT)
    first = split * units_per_split
    count = gl.minimum(units_per_split, units - first)

    tile = gl.arange(0, TILES, gl.SliceLayout(1, W))[:, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, W))[None, :]
    row_tile = axis(MT, 1, ROWS_OF)
    pair = axis(32, 3, ROWS_OF) // 4
    # lines past the last are read as the last and not stored
    if GATED:
        line = gl.minimum(block * NW + tile // 2, lines - 1).to(gl.int64)
        line_ptrs = gl.where(tile % 2 == 0, packed_ptr + line * words, up_ptr + line * words)
        line = gl.minimum(block * NW + axis(NW, 0, ROWS_OF), lines - 1).to(gl.int64)
        rows_at = line * groups * 8 + pair
        z_ptrs = gl.where(row_tile == 0, zeros_ptr + rows_at, up_zeros_ptr + rows_at)
        both_at = rows_at * 2 + axis(2, 4, ROWS_OF)
        s_ptrs = gl.where(row_tile == 0, scales_ptr + both_at, up_scales_ptr + both_at)
    else:
        line_ptrs = packed_ptr + gl.minimum(block * TILES + tile, lines - 1).to(gl.int64) * words
        line = (block * NW + axis(NW, 0, ROWS_OF)) * MT + row_tile
        rows_at = gl.minimum(line, lines - 1).to(gl.int64) * groups * 8 + pair
        z_ptrs = zeros_ptr + rows_at
        s_ptrs = scales_ptr + (rows_at * 2 + axis(2, 4, ROWS_OF))
    acc = gl.zeros([NW, MT, NT, 32, 4], gl.float32, ACC)
    zero = gl.full([NW, MT, 1, 32, 1], 0x0808, gl.int16, ROWS_OF)
    if HAS_ZEROS and GROUP == 0:
        zero = gl.load(z_ptrs)
    minus = minus_of(zero, KIND, ACC)
    if count > 0:
        token = token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, COPY))[:, None]
        x_word = gl.arange(0, X_WORDS, gl.SliceLayout(0, COPY))[None, :]
        x_ok = token < M
        x_ptrs = x_ptr + token.to(gl.int64) * stride_xm + x_word
        # of even units and of odd ones: the compiler sees that a copy and the product beside it
        # use different memory, and adds no barrier
        HALF: gl.constexpr = STAGES // 2
        even = gl.allocate_shared_memory(gl.int32, [HALF, 8 * NT, X_WORDS], RING)
        odd = gl.allocate_shared_memory(gl.int32, [HALF, 8 * NT, X_WORDS], RING)
        ring = (even, odd)
        for stage in gl.static_range(STAGES - 1):
            # past the slice, and past the last unit, something readable that nobody uses
            x_at = gl.minimum(first + stage, units - 1).to(gl.int64) * X_WORDS
            async_copy.async_copy_global_to_shared(
                ring[stage % 2].index(stage // 2), x_ptrs + x_at, mask=x_ok
            )
            async_copy.commit_group()
        at = at_unit(first, line_ptrs + word, s_ptrs, z_ptrs, UNIT, PER_UNIT)
        next_at = at_unit(gl.minimum(count - 1, 1), *at, UNIT, PER_UNIT)
        one = load_unit(at, P, PER_UNIT, HAS_ZEROS, DENSE)
        other = load_unit(next_at, P, PER_UNIT, HAS_ZEROS, DENSE)
        scales = load_scales(at, PER_UNIT), load_scales(next_at, PER_UNIT)
        for unit in range(0, count - 1, 2):
            # past the last two units these again, which are in a cache
            at = at_unit(gl.minimum(count - 2 - unit, 2), *at, UNIT, PER_UNIT)
            next_at = at_unit(1, *at, UNIT, PER_UNIT)
            for turn in gl.static_range(2):
                ahead = unit + turn + STAGES - 1
                async_copy.wait_group(STAGES - 2)
                # every warp is done with the slot that is filled next
                barrier()
                x_at = gl.minimum(first + ahead, units - 1).to(gl.int64) * X_WORDS
                slot = ring[1 - turn].index(ahead // 2 & (HALF - 1))
                async_copy.async_copy_global_to_shared(slot, x_ptrs + x_at, mask=x_ok)
                async_copy.commit_group()
                slot = ring[turn].index(unit // 2 & (HALF - 1))
                acc, held = multiply_unit(
                    acc, one, scales[turn], minus, slot, next_at if turn else at,
                    BITS, FP8, CONVERTS, HAS_ZEROS, GROUP, DENSE, KIND, ACC, X,
                )  # fmt: skip
                one, other = other, held
            # here the sums are scaled, so that each of these takes its predecessor's register
            scales = load_scales(at, PER_UNIT), load_scales(next_at, PER_UNIT)
        async_copy.wait_group(0)
        barrier()
        if count % 2 == 1:
            # the last two units are held, or the only one twice
            slot = even.index(count // 2 & (HALF - 1))
            acc, one = multiply_unit(
                acc, other, scales[1], minus, slot, at,
                BITS, FP8, CONVERTS, HAS_ZEROS, GROUP, DENSE, KIND, ACC, X,
            )  # fmt: skip

    if first + units_per_split >= units:
        token = token0 + gl.arange(0, 8 * NT, gl.SliceLayout(1, X))[:, None]
        x_word = gl.arange(0, 16, gl.SliceLayout(0, X))[None, :]
        x_ptrs = x_ptr + token.to(gl.int64) * stride_xm + units * X_WORDS + x_word
        w_ptrs = line_ptrs + units * UNIT
        for tail in range(0, tails):
            # each word of a lane is loaded for all four places that its words have
            if not DENSE:
                meta = gl.load(w_ptrs + 64 * P + word // 4)
            part = acc
            if GROUP:
                group = (units * 4 + tail) // (GROUP // (2 * STEP_K))
                part = gl.zeros_like(acc)
                if HAS_ZEROS:
                    minus = minus_of(gl.load(z_ptrs + group * 8), KIND, ACC)
            held = quarters(gl.load(w_ptrs + word // 4 * (2 * P) + word % (2 * P)), NW, MT, ACC)
            for step in gl.static_range(2):
                if not DENSE or step == 0:
                    b = gl.load(x_ptrs + step * 16, mask=token < M, other=0)
                pair_of = (held[step * P], held[step * P + P - 1])
                values = operand(pair_of, minus, BITS, FP8, CONVERTS, KIND, ACC)
                if DENSE:
                    part = multiply_dense(part, values, b, step, KIND, ACC)
                else:
                    part = multiply_fragments(part, values, b, meta, step, KIND, ACC)
            if GROUP:
                part = add_scaled(acc, part, gl.load(s_ptrs + group * 16), ACC)
            acc = part
            x_ptrs += STEP_K
            w_ptrs += 2 * (32 * P + META)

    if STEP != 1:
        acc = acc * STEP
    if GROUP == 0:
        acc = acc * scales_of_rows(gl.load(s_ptrs), ACC)
    finish(acc, bias_ptr, y_ptr, parts_ptr, counter_ptr, block, token0, M, N,
           ACTIVATION, HAS_BIAS, GATED, SPLIT, ACC)  # fmt: skip


def forward(
    x: Tensor,
    parts: Parts,
    up: Parts | None,
    rows: int,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Launch for x (M, K) with M > 0; `up` selects the gated form."""
    config = configuration(x, parts, rows, kind, up is not None)
    return launch(x, parts, up, rows, kind, bias, activation, config, _converts(x))


def _converts(x: Tensor) -> bool:
    """Whether the GPU that x is on has an instruction that makes e4m3 values f16."""
    return capability(x.device) >= (8, 9)


def configuration(x: Tensor, parts: Parts, rows: int, kind: str, gated: bool) -> MmaConfig:
    """What the table says for x (M, K) and N = rows on the GPU that x is on."""
    device, (tokens, columns) = x.device, x.shape
    group = shared_options(parts, kind, columns)["GROUP"]
    form = tokens, rows, columns, gated, KINDS[kind].bits, group, parts[2] is not None
    return quantized24_mma(*form, processors(device), capability(device))


def prepared(
    x: Tensor,
    parts: Parts,
    up: Parts | None,
    rows: int,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> Launch | None:
    """`forward` as a call to keep, or None if x has to be copied first."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    config = configuration(x, parts, rows, kind, up is not None)
    call = product(x, parts, up, kind, bias, y, activation, config, _converts(x))
    return call if call.arguments[0].data_ptr() == x.data_ptr() else None


def launch(
    x: Tensor,
    parts: Parts,
    up: Parts | None,
    rows: int,
    kind: str,
    bias: Tensor | None,
    activation: str,
    config: MmaConfig,
    converts: bool = False,
) -> Tensor:
    """`forward` with a given configuration, and e4m3 values made f16 by an instruction or not."""
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    product(x, parts, up, kind, bias, y, activation, config, converts).run()
    return y


def product(
    x: Tensor,
    parts: Parts,
    up: Parts | None,
    kind: str,
    bias: Tensor | None,
    y: Tensor,
    activation: str,
    config: MmaConfig,
    converts: bool = False,
    dense: bool = False,
) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device.

    If it `converts`, e4m3 values become f16 by an instruction of compute capability 8.9.

    A `dense` weight, for comparison, is packed as the 2:4 one of twice the columns that has its
    columns 2i and 2i + 1 at 4i and 4i + 1, without that one's metadata.
    """
    tokens, rows = y.shape
    columns = x.shape[1]
    spread = 2 if dense else 1
    lines, units, tails = line_blocks(rows, spread * columns)
    x = padded_rows(x, (256 * units + 64 * tails) // spread)
    per_split, splits = split_columns(units, config.splits)
    blocks = triton.cdiv(lines, config.warps * (1 if up is not None else config.row_tiles))
    token_blocks = triton.cdiv(tokens, 8 * config.token_tiles)
    block = 8 * config.token_tiles, config.warps * config.row_tiles * ROWS
    room, counter = room_for_parts(y, token_blocks, blocks, splits, *block)
    options = shared_options(parts, kind, columns)
    crowded = options["GROUP"] == 64 or (options["GROUP"] > 0 and options["HAS_ZEROS"])
    return Launch(
        _mma24q_fwd_kernel,
        (token_blocks, blocks, splits),
        (
            x.view(torch.int32),
            *_arguments(parts),
            *_arguments(up or parts),
            y if bias is None else bias,
            y,
            room,
            counter,
            x.stride(0) // 2,
            tokens,
            rows,
            lines,
            parts[0].shape[1],
            units,
            tails,
            per_split,
            parts[1].shape[1],
        ),
        {
            "KIND": "bf16" if x.dtype == torch.bfloat16 else "f16",
            "BITS": KINDS[kind].bits,
            "FP8": kind == "2:4-fp8",
            "CONVERTS": converts and kind == "2:4-fp8" and x.dtype == torch.float16,
            "HAS_ZEROS": options["HAS_ZEROS"],
            "GROUP": options["GROUP"],
            "DENSE": dense,
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "GATED": up is not None,
            "SPLIT": splits > 1,
            "NW": config.warps,
            "MT": config.row_tiles,
            "NT": config.token_tiles,
            "STAGES": config.stages,
        },
        num_warps=config.warps,
        # here the assembler would spill so that a third program fits a multiprocessor
        options={"maxnreg": 255} if crowded else None,
    )


def _arguments(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's tensors of a weight, zero points in pairs."""
    packed, scales, zeros = filled(parts)
    return packed, scales, zeros.view(torch.int16)


def self_test(device: torch.device) -> str | None:
    """Compare with the expanded weight on small integers, where every sum is exact.

    Args:
        device: The CUDA device to test.

    Returns:
        None if all results are equal, else what differed.
    """
    from prunekernels.sparse.two_four.quantized.format import quantized24_pack

    random = torch.Generator().manual_seed(0)
    for kind, dtype, tokens, splits in (
        ("2:4-int4", torch.bfloat16, 5, 3),
        ("2:4-int4", torch.float16, 20, 1),
        ("2:4-int8", torch.bfloat16, 20, 1),
        ("2:4-int8", torch.float16, 5, 3),
        ("2:4-fp8", torch.bfloat16, 5, 3),
        ("2:4-fp8", torch.float16, 20, 1),
    ):
        values = torch.randint(0, 16, (200, 1088), generator=random, dtype=torch.int8)
        mask = torch.rand(200, 272, 4, generator=random).argsort(2) < 2
        pointed = kind == "2:4-int4" and tokens == 5
        values = values if pointed else values - 8
        groups = 9 if pointed else 1
        scales = torch.randint(1, 3, (200, groups), generator=random).float()
        zeros = torch.randint(0, 16, (200, groups), generator=random, dtype=torch.int8)
        w = quantized24_pack(
            values.float().to(KINDS[kind].dtype),
            mask.view(200, -1),
            scales,
            zeros if pointed else None,
            kind=kind,
            dtype=dtype,
        )
        x = torch.randint(-3, 4, (tokens, 1088), generator=random).to(device, dtype)
        w = w.to(device)
        config = MmaConfig(2, 1 if tokens <= 8 else 4, 4, splits)
        parts = w.packed, w.scales, w.zeros
        got = launch(x, parts, None, 200, kind, None, "none", config, _converts(x))
        if problem := difference(got, x, w.to(dtype=torch.float32).to_dense()):
            return problem
    return None


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    every: Sequence[Arch] = (80, 89, 90)
    return [
        *(
            # sm_89 has smaller programs of the one form that takes 64 tokens with groups
            _case(name, kind, tokens, False, True, (80, 90) if name == "int4g128" else every)
            for name in _CASES
            for kind in ("bf16", "f16")
            for tokens in (1, 64)
        ),
        *(_case("int4g128", "bf16", tokens, False, True, every) for tokens in (16, 32)),
        _case("int4g128", "bf16", 1, False, False, every),
        *(_case(name, "bf16", 1, True, True, every) for name in ("int8", "int4g128")),
        *(_case("int4g64z", "bf16", 16, gated, True, every) for gated in (False, True)),
        *(_case("fp8", "f16", tokens, False, True, (89, 90), True) for tokens in (1, 64)),
        _case("int4g128", "bf16", 1, False, True, (120,)),
    ]


# kind, columns of a group, zero points
_CASES = {
    "int8": ("2:4-int8", 0, False),
    "int8g128": ("2:4-int8", 128, False),
    "fp8": ("2:4-fp8", 0, False),
    "int4": ("2:4-int4", 0, False),
    "int4g128": ("2:4-int4", 128, False),
    "int4g64z": ("2:4-int4", 64, True),
}


def _case(
    name: str,
    kind: str,
    tokens: int,
    gated: bool,
    split: bool,
    archs: Sequence[Arch],
    converts: bool = False,
) -> KernelCase:
    rows, columns = 14336, 4096
    values, group, zeros = _CASES[name]
    config = quantized24_mma(tokens, rows, columns, gated, KINDS[values].bits, group, zeros, 132)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    parts = case_parts(rows, columns, values, group, zeros)
    call = product(
        meta((tokens, columns), dtype),
        parts,
        parts if gated else None,
        values,
        None if gated else meta((rows,), dtype, aligned=False),
        meta((tokens, rows), dtype),
        "silu" if gated else "none",
        config._replace(splits=4 if split else 1),
        converts,
    )
    return call.case(
        f"quantized24/mma_sp/{name}/{kind}/t{8 * config.token_tiles}"
        + "/cvt" * converts
        + "/gated" * gated
        + "/split" * split,
        opcodes=("HMMA.SP.16832.F32" + (".BF16" if kind == "bf16" else ""), "LDSM", "LDGSTS"),
        elements_per_iteration=config.row_tiles * ROWS * 256,
        per_iteration=("HMMA.SP", 8 * config.row_tiles * config.token_tiles),
        archs=archs,
    )
