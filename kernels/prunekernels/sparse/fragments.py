"""Pieces of the tensor-core kernels: layouts of the operands, and what follows the sums.

The accumulators are a tensor (warps, row tiles, token tiles, 32 lanes, 4 registers) whose layout
gives each lane the four numbers that `mma.m16n8k…` gives it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from prunekernels.sparse.epilogue import activate
from prunekernels.sparse.gluon_compat import barrier


@gluon.constexpr_function
def x_layout(token_tiles, warps):
    """B fragments of (8·token_tiles tokens, 16 words): what `ldmatrix` gives, in every warp."""
    registers = [[0, 4], [0, 8]] + [[8 << i, 0] for i in range(token_tiles.bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    replicated = [[0, 0]] * (warps.bit_length() - 1)
    return gl.DistributedLinearLayout(registers, lanes, replicated, [], [8 * token_tiles, 16])


@gluon.constexpr_function
def dense_text(kind, half):
    """`mma.sync` of 16 columns: A is $4 … $7, B the half of $8 … $11 that `half` (0 or 1) names."""
    b = "{$8,$9}" if half == 0 else "{$10,$11}"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {b}, {{$12,$13,$14,$15}};"
    )


@gluon.jit
def x_registers(b, NT: gl.constexpr, ACC: gl.constexpr):
    """B as the lanes hold it, (1, 1, token tiles, 32, 4), of (8·token tiles, 16) words."""
    # word = 4·register + thread of the quad, token = quad
    b = gl.permute(gl.reshape(b, [NT, 8, 4, 4]), [0, 1, 3, 2])
    return gl.convert_layout(gl.reshape(b, [1, 1, NT, 32, 4]), ACC)


@gluon.jit
def multiply_dense(acc, a, b, HALF: gl.constexpr, KIND: gl.constexpr, ACC: gl.constexpr):
    """acc + A·B of 16 columns: a as the lanes hold it, b the words of 32, of which HALF counts."""
    return gl.inline_asm_elementwise(
        dense_text(KIND, HALF),
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,0,1,2,3",
        [a, x_registers(b, acc.shape[2], ACC), acc],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.constexpr_function
def _axis_layout(layout, axis, rank):
    for dim in reversed(range(rank)):
        if dim != axis:
            layout = gl.SliceLayout(dim, layout)
    return layout


@gluon.jit
def axis(SIZE: gl.constexpr, AXIS: gl.constexpr, LAYOUT: gl.constexpr):
    """0 .. SIZE − 1 along one axis of a five-dimensional layout, broadcastable."""
    index = gl.arange(0, SIZE, _axis_layout(LAYOUT, AXIS, 5))
    for dim in gl.static_range(5):
        if dim != AXIS:
            index = gl.expand_dims(index, dim)
    return index


@gluon.jit
def _store(total, bias_ptr, y_ptr, block, token0, M, N,
            ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
            ACC: gl.constexpr):  # fmt: skip
    """Bias, activation or gate, and the store of float32 sums in the accumulators' layout."""
    NW: gl.constexpr = total.shape[0]
    MT: gl.constexpr = total.shape[1]
    lane = axis(32, 3, ACC)
    register = axis(4, 4, ACC)
    token = token0 + axis(total.shape[2], 2, ACC) * 8 + lane % 4 * 2 + register % 2
    if GATED:
        line = block * NW + axis(NW, 0, ACC)
    else:
        line = (block * NW + axis(NW, 0, ACC)) * MT + axis(MT, 1, ACC)
    row = line * 16 + lane // 4 + register // 2 * 8
    if HAS_BIAS:
        total += gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
    y = activate(total, ACTIVATION)
    ok = (row < N) & (token < M)
    offset = token.to(gl.int64) * N + row
    if GATED:
        # the second axis is (gate, up)
        gate, _ = gl.split(gl.permute(y, [0, 2, 3, 4, 1]))
        _, up = gl.split(gl.permute(total, [0, 2, 3, 4, 1]))
        y = gate * up
        offset, _ = gl.broadcast(offset, total)
        ok, _ = gl.broadcast(ok, total)
        offset, _ = gl.split(gl.permute(offset, [0, 2, 3, 4, 1]))
        ok, _ = gl.split(gl.permute(ok.to(gl.int32), [0, 2, 3, 4, 1]))
        ok = ok != 0
    gl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=ok)


@gluon.jit
def sum_parts(acc, parts_ptr, counter_ptr, token0, M, ACC: gl.constexpr):
    """Store this program's sums; the program that arrives last gets all parts, added in order.

    The grid is (token blocks, row blocks, splits). Parts are stored as the lanes hold them, four
    sums in a row, so that a warp stores and loads whole lines. Token tiles past M are left out.

    Args:
        acc: float32 sums (warps, row tiles, token tiles, 32 lanes, 4 registers).
        parts_ptr: float32 (token blocks, row blocks, splits, sums of a program).
        counter_ptr: int32 (token blocks·row blocks,), zero before and after.
        token0: the block's first token.
        M: tokens.
        ACC: the sums' layout.

    Returns:
        The total, and whether this program arrived last.
    """
    NW: gl.constexpr = acc.shape[0]
    MT: gl.constexpr = acc.shape[1]
    NT: gl.constexpr = acc.shape[2]
    SIZE: gl.constexpr = NW * MT * NT * 128
    splits = gl.num_programs(2)
    tile = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
    token_tile = axis(NT, 2, ACC)
    fragment = (axis(NW, 0, ACC) * MT + axis(MT, 1, ACC)) * NT + token_tile
    at = fragment * 128 + axis(32, 3, ACC) * 4 + axis(4, 4, ACC)
    used = token0 + token_tile * 8 < M
    ptrs = parts_ptr + tile.to(gl.int64) * splits * SIZE + at
    gl.store(ptrs + gl.program_id(2) * SIZE, acc, mask=used)
    # the program's stores come before its ticket: barrier, then a release at GPU scope
    barrier()
    ticket = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
    last = ticket == splits - 1
    if last:
        acc = gl.load(ptrs, mask=used, other=0.0, cache_modifier=".cg")
        for _ in range(1, splits):
            ptrs += SIZE
            acc += gl.load(ptrs, mask=used, other=0.0, cache_modifier=".cg")
        gl.store(counter_ptr + tile, 0)
    return acc, last


@gluon.jit
def finish(acc, bias_ptr, y_ptr, parts_ptr, counter_ptr, block, token0, M, N,
           ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
           SPLIT: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """Store act(sums + bias); if SPLIT, the program that arrives last does so (`sum_parts`)."""
    if SPLIT:
        acc, last = sum_parts(acc, parts_ptr, counter_ptr, token0, M, ACC)
        if last:
            _store(acc, bias_ptr, y_ptr, block, token0, M, N, ACTIVATION, HAS_BIAS, GATED, ACC)
    else:
        _store(acc, bias_ptr, y_ptr, block, token0, M, N, ACTIVATION, HAS_BIAS, GATED, ACC)
