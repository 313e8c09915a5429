"""The PTX machine itself: right programs run in any order, and wrong ones raise."""

from __future__ import annotations

import random

import numpy as np
import pytest

pytest.importorskip("triton")
import ptx

STORE = "cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2; st.global.b32 [ %rd3 + 0 ], { %r3 };"


def run(body: str, lazy: bool = True, seed: int | None = None) -> np.ndarray:
    """What 128 threads leave in 128 words; %r1 is the thread, %r2 four times that, %r3 stored."""
    text = f""".entry k( .param .u64 k_param_0 ) {{
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        shl.b32 %r2, %r1, 2;
        {body}
        ret;
    }}"""
    memory = ptx.GlobalMemory([np.arange(1000, 1128, dtype=np.uint32)])
    program = ptx.Program(
        ptx.PtxKernel.parse(text),
        memory,
        memory.addresses,
        (0, 0, 0),
        (1, 1, 1),
        1024,
        lazy=lazy,
        order=None if seed is None else random.Random(seed),
    )
    program.run()
    return memory.result(0)


THREADS = np.arange(128, dtype=np.uint32)
IN_ANY_ORDER = pytest.mark.parametrize("seed", [None, *range(5)])


def test_memory_and_instructions_are_checked():
    assert np.array_equal(run("add.s32 %r3, %r1, -1;" + STORE), THREADS - 1)
    onto_itself = "mov.b32 %r3, 7; mad.lo.s32 %r3, %r1, 3, %r3;"
    assert np.array_equal(run(onto_itself + STORE), 3 * THREADS + 7)
    with pytest.raises(ValueError, match="outside every array"):
        run("mov.b32 %r3, 7; add.s32 %r2, %r2, 4;" + STORE)
    with pytest.raises(ValueError, match="unknown instruction"):
        run("brev.b32 %r3, %r1;")
    with pytest.raises(ValueError, match="outside the allocation"):
        run("add.s32 %r2, %r2, 1000; st.shared.b32 [ %r2 + 0 ], %r1;")


@IN_ANY_ORDER
def test_threads_part_and_meet(seed):
    part = "setp.lt.s32 %p1, %r1, 50; mov.b32 %r3, 5; @%p1 bra $L_a; mov.b32 %r3, 6; $L_a: "
    assert np.array_equal(run(part + STORE, seed=seed), np.where(THREADS < 50, 5, 6))
    with pytest.raises(ValueError, match="only some threads arrive"):
        run(
            "setp.lt.s32 %p1, %r1, 64; @%p1 bra $L_a; bar.sync 0; $L_a: mov.b32 %r3, 5;" + STORE,
            seed=seed,
        )
    with pytest.raises(ValueError, match="only some threads arrive"):
        run("setp.lt.s32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", seed=seed)


@IN_ANY_ORDER
@pytest.mark.parametrize(
    ("far", "sync", "message"),
    [(256, "bar.sync 0;", "without a barrier"), (16, "bar.warp.sync -1;", "without bar.warp.sync")],
)
def test_races_between_warps_and_lanes_raise(seed, far, sync, message):
    swap = f"xor.b32 %r4, %r2, {far}; st.shared.b32 [ %r2 + 0 ], %r1; SYNC "
    swap += "ld.shared.b32 %r3, [ %r4 ]; "
    assert np.array_equal(run(swap.replace("SYNC", sync) + STORE, seed=seed), THREADS ^ far // 4)
    with pytest.raises(ValueError, match=message):
        run(swap.replace("SYNC", "") + STORE, seed=seed)
    # what others still read must not be overwritten either
    with pytest.raises(ValueError, match=message):
        run(swap.replace("SYNC", sync) + "st.shared.b32 [ %r2 + 0 ], 7;", seed=seed)
    run(swap.replace("SYNC", sync) + sync + "st.shared.b32 [ %r2 + 0 ], 7;", seed=seed)


@IN_ANY_ORDER
@pytest.mark.parametrize("lazy", [True, False])
def test_asynchronous_copies_of_a_warp(seed, lazy):
    copy = "and.b32 %r5, %r2, 124; shl.b32 %r6, %r5, 2; sub.s32 %r4, %r2, %r5;"
    copy += "add.s32 %r4, %r4, %r6; cvt.u64.u32 %rd4, %r6; add.s64 %rd5, %rd1, %rd4;"
    copy += "setp.lt.u32 %p1, %r5, 32;"
    copy += "@%p1 cp.async.cg.shared.global [ %r4 + 0 ], [ %rd5 + 0 ], 16; cp.async.commit_group;"
    # each warp reads what its first eight lanes copied
    read = "ld.shared.b32 %r3, [ %r2 ];"
    want = 1000 + THREADS % 32
    arrive = "cp.async.wait_group 0; bar.warp.sync -1;"
    # nobody may store the array before all have copied it
    assert np.array_equal(run(copy + arrive + read + "bar.sync 0;" + STORE, lazy, seed), want)
    with pytest.raises(ValueError, match=r"without bar\.warp\.sync"):
        run(copy + "cp.async.wait_group 0;" + read, lazy, seed)
    if lazy:
        with pytest.raises(ValueError, match="while a copy in flight"):
            run(copy + "cp.async.wait_group 1; bar.warp.sync -1;" + read, lazy, seed)


BULK = """
    setp.eq.s32 %p1, %r1, 32;
    @%p1 mbarrier.init.shared.b64 [ 768 ], 1;
    MADE
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [ 768 ], SIZE;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [ 0 ], [ %rd1 ], 512, [ 768 ];
    WAIT
    ld.shared.b32 %r3, [ %r2 ];
"""
WAIT = "$L_wait: mbarrier.try_wait.parity.shared.b64 %p2, [ 768 ], 0; @!%p2 bra $L_wait;"


def bulk(made: str = "bar.sync 0;", size: int = 512, wait: str = WAIT) -> str:
    return BULK.replace("MADE", made).replace("SIZE", str(size)).replace("WAIT", wait)


@IN_ANY_ORDER
@pytest.mark.parametrize("lazy", [True, False])
def test_bulk_copies_and_mbarriers(seed, lazy):
    assert np.array_equal(run(bulk() + STORE, lazy, seed), 1000 + THREADS)
    with pytest.raises(ValueError, match=r"not made|after it was made"):
        run(bulk(made=""), lazy, seed)
    with pytest.raises(ValueError, match=r"in flight|without a barrier"):
        run(bulk(wait=""), lazy, seed)
    with pytest.raises(ValueError, match="never ends"):
        run(bulk(size=528), lazy, seed)
    with pytest.raises(ValueError, match="as if it were data"):
        run(bulk() + "add.s32 %r2, %r2, 512; st.shared.b32 [ %r2 ], 0;", lazy, seed)


def test_random_orders_differ():
    # warps take tickets: in step each instruction is one thread's
    ticket = """
        and.b32 %r4, %r1, 31;
        setp.eq.s32 %p1, %r4, 0;
        mov.b32 %r3, 0;
        LOOP
        @%p1 atom.global.gpu.acq_rel.add.u32 %r5, [ %rd1 + 508 ], 1;
        @%p1 st.global.b32 [ %rd3 + 0 ], %r5;
    """
    place = "cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2;"
    orders = {tuple(run(place + ticket.replace("LOOP", ""), seed=s)[::32]) for s in range(20)}
    assert len(orders) > 5
    assert all(sorted(order) == list(range(1127, 1131)) for order in orders)
