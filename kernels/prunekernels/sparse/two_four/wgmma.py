"""2:4 matrix multiplication on Hopper's sparse `wgmma`, for many tokens.

    y[m, n] = act(Σ_k x[m, k]·W[n, k] + b[n])

Two warpgroups per program, 64 weight rows each. The packed words are the registers of the sparse
operand, as for `mma.sp`; x is copied into a ring in shared memory, in rows of 128 swizzled bytes,
where the instruction reads it through a descriptor. Triton gives no shared-memory address, so
inline assembly names the symbol `global_smem`: the ring must be the program's first allocation.
It is right on an H200 and slower there than the dense product, so `impl="auto"` never takes it: it
runs when asked for by name, after the self-test, until `wgmma_tma` has been measured.
Format: `two_four.layout`. Instruction: PTX ISA, `wgmma.mma_async.sp`, A in registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.sparse.fragments import finish
from prunekernels.sparse.gluon_compat import barrier
from prunekernels.sparse.launching import difference, padded_rows
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.layout import ROWS, line_blocks, packed_shape

#: Compute capabilities that have the instruction.
CAPABILITIES = ((9, 0),)
WARPS, TOKENS, STAGES = 8, 128, 4

# K-major rows of 128 bytes, swizzled by 128 bytes; eight rows are 1024 bytes.
_DESCRIPTOR = gl.constexpr(0x4000004000010000)


@gluon.constexpr_function
def _wgmma_text(kind, tokens):
    """Two steps of 32 columns. Operands, `tokens / 2` registers each: sums, A, A, E, B, B."""
    name = f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind}"
    count = tokens // 2
    sums = ",".join(f"${i}" for i in range(count))

    def register(operand, index=0):
        # outputs and the inputs tied to them come first
        return f"${(2 + operand) * count + index}"

    lines = ["wgmma.fence.sync.aligned;"]
    for step in range(2):
        a = ",".join(register(step, i) for i in range(4))
        lines.append(
            f"{name} {{{sums}}}, {{{a}}}, {register(3 + step)}, {register(2)}, {step}, 1, 1, 1, 0;"
        )
    return "\n".join(
        [*lines, "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    )


@gluon.constexpr_function
def _wgmma_constraints(tokens):
    count = tokens // 2
    tied = [str(i) for i in range(count)]
    return ",".join(["=f"] * count + tied + ["r"] * (3 * count) + ["l"] * (2 * count))


@gluon.jit(do_not_specialize=["M", "N", "lines", "units", "blocks"])
def _wgmma24_fwd_kernel(
    x_ptr,  # (M, columns padded to 64), rows stride_xm apart
    packed_ptr,  # int32 (lines, words)
    bias_ptr,  # (N,), read if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    stride_xm,
    M,
    N,
    lines,
    words,  # words in a line
    units,
    blocks,  # of 64 columns
    KIND: gl.constexpr,  # "bf16" or "f16"
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NW: gl.constexpr,  # warps
    NT: gl.constexpr,  # tiles of 8 tokens
    STAGES: gl.constexpr,  # of the ring, a power of two
):
    TOKENS: gl.constexpr = 8 * NT
    W: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [NW, 1], [1, 0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NW, 1], [1, 0])
    ACC: gl.constexpr = gl.BlockedLayout(
        [1, 1, NT, 1, 4], [1, 1, 1, 32, 1], [NW, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    RING: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    token0 = gl.program_id(0) * TOKENS
    row_block = gl.program_id(1)
    ring = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, TOKENS, 64], RING)
    zero = gl.zeros([NW, 1, 1, 32, 4], gl.int32, ACC)
    base = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [zero], dtype=gl.int32, is_pure=True, pack=1
    )
    descriptor = ((base >> 4) & 0x3FFF).to(gl.int64) | _DESCRIPTOR

    token = token0 + gl.arange(0, TOKENS, gl.SliceLayout(1, COPY))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, COPY))[None, :]
    x_ok = token < M
    x_ptrs = x_ptr + token.to(gl.int64) * stride_xm + column
    for stage in gl.static_range(STAGES - 1):
        # past the last block, something readable that nobody uses
        at = gl.minimum(stage, blocks - 1) * 64
        async_copy.async_copy_global_to_shared(ring.index(stage), x_ptrs + at, mask=x_ok)
        async_copy.commit_group()

    # lines past the last are read as the last and not stored
    line = row_block * NW + gl.arange(0, NW, gl.SliceLayout(1, W))[:, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, W))[None, :]
    line_ptrs = packed_ptr + gl.minimum(line, lines - 1).to(gl.int64) * words
    acc = gl.zeros([NW, 1, NT, 32, 4], gl.float32, ACC)
    for block in range(0, blocks):
        # block 4u + j is quarter j of unit u; the blocks after the units are tails
        whole = block < 4 * units
        quarter = gl.where(whole, block % 4, 0)
        start = gl.where(whole, block // 4 * 1152, units * 1152 + (block - 4 * units) * 288)
        a0 = gl.load(line_ptrs + (start + quarter * 256) + word)
        a1 = gl.load(line_ptrs + (start + quarter * 256 + 128) + word)
        # one metadata word per lane, loaded for each of its four value words
        meta = word // 4 * gl.where(whole, 4, 1) + quarter + gl.where(whole, 1024, 256)
        e = gl.load(line_ptrs + start + meta)
        async_copy.wait_group(STAGES - 2)
        # what this thread copied becomes visible to the instruction, then to all threads
        fence_async_shared()
        barrier()
        ahead = block + STAGES - 1
        at = gl.minimum(ahead, blocks - 1) * 64
        slot = ring.index(ahead & (STAGES - 1))
        async_copy.async_copy_global_to_shared(slot, x_ptrs + at, mask=x_ok)
        async_copy.commit_group()
        b = descriptor + (block & (STAGES - 1)) * (TOKENS * 8)
        acc = gl.inline_asm_elementwise(
            _wgmma_text(KIND, TOKENS),
            _wgmma_constraints(TOKENS),
            [
                acc,
                gl.convert_layout(gl.reshape(a0, [NW, 1, 1, 32, 4]), ACC),
                gl.convert_layout(gl.reshape(a1, [NW, 1, 1, 32, 4]), ACC),
                gl.convert_layout(gl.reshape(e, [NW, 1, 1, 32, 4]), ACC),
                b,
                b + 4,
            ],
            dtype=gl.float32,
            is_pure=False,
            pack=4 * NT,
        )
    async_copy.wait_group(0)
    finish(
        acc, bias_ptr, y_ptr, y_ptr, y_ptr, row_block, token0, M, N, ACTIVATION, HAS_BIAS,
        False, False, ACC,
    )  # fmt: skip


def forward(
    x: Tensor, packed: Tensor, up: Tensor | None, rows: int, bias: Tensor | None, activation: str
) -> Tensor:
    """Launch for x (M, K) with M > 0; the gated form takes two launches."""
    if up is not None:
        gate = forward(x, packed, None, rows, None, activation)
        return gate * forward(x, up, None, rows, None, "none")
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    product(x, packed, bias, y, activation).run()
    return y


def product(x: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor, activation: str) -> Launch:
    """The kernel's call for x (M, K) and y (M, N), real or on the meta device."""
    tokens, rows = y.shape
    lines, units, tails = line_blocks(rows, x.shape[1])
    x = padded_rows(x, 256 * units + 64 * tails)
    return Launch(
        _wgmma24_fwd_kernel,
        (triton.cdiv(tokens, TOKENS), triton.cdiv(lines, WARPS)),
        (
            x,
            packed,
            y if bias is None else bias,
            y,
            x.stride(0),
            tokens,
            rows,
            lines,
            packed.shape[1],
            units,
            4 * units + tails,
        ),
        {
            "KIND": "bf16" if x.dtype == torch.bfloat16 else "f16",
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "NW": WARPS,
            "NT": TOKENS // 8,
            "STAGES": STAGES,
        },
        num_warps=WARPS,
    )


def self_test(device: torch.device) -> str | None:
    """Compare with the dense product on small integers, where every sum is exact.

    Args:
        device: The CUDA device to test.

    Returns:
        None if all results are equal, else what differed.
    """
    random = torch.Generator().manual_seed(0)
    for dtype, tokens, columns in ((torch.bfloat16, 20, 1088), (torch.float16, 131, 256)):
        weight = torch.randint(-2, 3, (200, columns), generator=random)
        weight *= torch.rand(200, columns // 4, 4, generator=random).argsort(2).view(200, -1) < 2
        x = torch.randint(-3, 4, (tokens, columns), generator=random)
        packed = sparse24_pack(weight.to(device, dtype)).packed
        got = forward(x.to(device, dtype), packed, None, 200, None, "none")
        if problem := difference(got, x, weight):
            return problem
    return None


def compile_cases() -> list[KernelCase]:
    """The specialisations that tests compile without a GPU."""
    tokens, rows, columns = 1024, 14336, 4096
    cases = []
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        call = product(
            meta((tokens, columns), dtype),
            meta(packed_shape(rows, columns, dtype), torch.int32),
            meta((rows,), dtype, aligned=False),
            meta((tokens, rows), dtype),
            "none",
        )
        cases.append(
            call.case(
                f"sparse24/wgmma_sp/{kind}/t{TOKENS}",
                opcodes=(f"HGMMA.SP.64x{TOKENS}x32.F32", "LDGSTS"),
                elements_per_iteration=ROWS * 64,
                per_iteration=("HGMMA.SP", 2),
                archs=(90,),
            )
        )
    return cases
