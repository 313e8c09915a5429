"""A warp's ring of records in shared memory: copies that arrive without a barrier of the program.

A slot keeps a record where it stood in a line of 128 bytes, so that a line fills one row of banks,
and after it, where copies are made by the copy engine, the mbarrier that counts them. Inline
assembly names shared memory by Triton's symbol for it, so the rings must start there.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: Bytes of a chunk, and of a line.
CHUNK, LINE = 512, 128


@gluon.constexpr_function
def slot_bytes(chunks):
    """Bytes of a slot for records of up to so many chunks: they may start late in a line."""
    return LINE + CHUNK * chunks


@gluon.constexpr_function
def _copy_text(chunks):
    """Copy chunks from $1 ($2: the fifth) to shared $3 while units $4 are left for them."""
    lines = ["{", ".reg .pred p;"]
    for chunk in range(chunks):
        # offsets of more than 2 KB from $1 would not fit the instruction
        source = f"${1 + min(chunk // 4, 1)} + {CHUNK * (chunk - 4 * min(chunk // 4, 1))}"
        lines += [
            f"setp.gt.s32 p, $4, {32 * chunk};",
            f"@p cp.async.cg.shared.global [$3 + {CHUNK * chunk}], [{source}], 16;",
        ]
    return "\n".join([*lines, "cp.async.commit_group;", "mov.b32 $0, 0;", "}"])


@gluon.constexpr_function
def _bulk_text(place):
    """Lane $1 = 0 starts a bulk copy of $2 bytes from $3 to shared $4; the mbarrier `place` bytes
    behind $5 counts them."""
    return "\n".join([
        "{", ".reg .pred p, q;",
        "setp.eq.s32 p, $1, 0;",
        "setp.gt.s32 q, $2, 0;",
        "and.pred q, q, p;",
        f"@p mbarrier.arrive.expect_tx.shared.b64 _, [$5 + {place}], $2;",
        "@q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$4], [$3], $2, [$5 + {place}];",
        "mov.b32 $0, 0;", "}",
    ])  # fmt: skip


@gluon.constexpr_function
def _barriers_text(slots, size):
    """An mbarrier at the end of each of the `slots` from $2 on, made by lane $1 = 0."""
    lines = ["{", ".reg .pred p;", "setp.eq.s32 p, $1, 0;"]
    places = [(i + 1) * size - 16 for i in range(slots)]
    lines += [f"@p mbarrier.init.shared.b64 [$2 + {place}], 1;" for place in places]
    return "\n".join([
        *lines, "fence.proxy.async.shared::cta;", "bar.warp.sync -1;", "mov.b32 $0, 0;", "}"
    ])  # fmt: skip


@gluon.constexpr_function
def _arrive_text(pending):
    """Wait for the copies of the warp but the last `pending`; words at $4."""
    return "\n".join([f"cp.async.wait_group {pending};", "bar.warp.sync -1;", *_words()])


@gluon.constexpr_function
def _arrive_bulk_text(place):
    """Wait for the mbarrier `place` bytes behind $5 to end its phase $6; words at $4."""
    return "\n".join([
        "{", ".reg .pred p;",
        "$$L_record:",
        f"mbarrier.try_wait.parity.shared.b64 p, [$5 + {place}], $6;",
        "@!p bra $$L_record;",
        "bar.warp.sync -1;",
        *_words(), "}",
    ])  # fmt: skip


@gluon.constexpr_function
def _words():
    """$0 … $3: the two words at $4, twice: products want them twice, and would make copies."""
    return [f"ld.volatile.shared.v2.b32 {{${i}, ${i + 1}}}, [$4];" for i in (0, 2)]


@gluon.jit
def say(TEXT: gl.constexpr, lane):
    """An instruction without operands."""
    gl.inline_asm_elementwise(
        TEXT + " mov.b32 $0, 0;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def make_barriers(lane, ring, SLOTS: gl.constexpr, CHUNKS: gl.constexpr):
    """Before bulk copies: an mbarrier for each slot of the rings at `ring`."""
    gl.inline_asm_elementwise(
        _barriers_text(SLOTS, slot_bytes(CHUNKS)),
        "=r,r,r",
        [lane, ring],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def copy(records_ptr, begin, end, slot, lane, CHUNKS: gl.constexpr, BULK: gl.constexpr):
    """Start the copy of units begin … end − 1, or of those that fit, to shared address `slot`."""
    if BULK:
        size = gl.minimum(end - begin, 32 * CHUNKS) * 16
        source = records_ptr + begin.to(gl.int64) * 4
        gl.inline_asm_elementwise(
            _bulk_text(slot_bytes(CHUNKS) - 16),
            "=r,r,r,l,r,r",
            [lane, size, source, slot + (begin & 7) * 16, slot],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        source = records_ptr + (begin + lane).to(gl.int64) * 4
        if CHUNKS > 4:
            # not a sum that the assembler knows: it would add anew for each chunk
            fifth = gl.inline_asm_elementwise(
                "or.b32 $0, $1, 128;", "=r,r", [lane], dtype=gl.int32, is_pure=True, pack=1
            )
            fifth = records_ptr + (begin + fifth).to(gl.int64) * 4
        else:
            fifth = source
        gl.inline_asm_elementwise(
            _copy_text(CHUNKS),
            "=r,l,l,r,r",
            [source, fifth, slot + ((begin & 7) + lane) * 16, end - begin - lane],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def arrived(record, slot, lane, phase, PENDING: gl.constexpr, CHUNKS: gl.constexpr,
            BULK: gl.constexpr):  # fmt: skip
    """Wait for the oldest copy, of which PENDING are younger; the lane's words, twice."""
    if BULK:
        return gl.inline_asm_elementwise(
            _arrive_bulk_text(slot_bytes(CHUNKS) - 16),
            "=&r,=&r,=&r,=&r,r,r,r",
            [record + lane * 8, slot, phase],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        return gl.inline_asm_elementwise(
            _arrive_text(PENDING),
            "=&r,=&r,=&r,=&r,r",
            [record + lane * 8],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=False,
            pack=1,
        )
