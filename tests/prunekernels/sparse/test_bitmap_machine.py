"""The compiled tensor-core bitmap kernel, run by a NumPy machine: launcher, machine code, sums.

The launch is real up to the driver. What this cannot show is timing, and hardware that differs from
the PTX ISA.
"""

from __future__ import annotations

import dataclasses

import ptx
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from products import assert_as_good_as_eager, ragged
from prunekernels.runtime import interpreting
from prunekernels.sparse.bitmap.format import BitmapSparse, bitmap_pack
from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig
from prunekernels.sparse.layer import ACTIVATIONS

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")

Config = BitmapMmaConfig


@pytest.fixture
def machine(monkeypatch):
    """A function that runs `mma.launch` on a machine."""
    from prunekernels.sparse import launching
    from prunekernels.sparse.bitmap import mma

    counter = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launching, "counters", lambda count, device: counter[:count])

    def launch(x, packed, bias, activation, config, up=None, *, arch=90, lazy=True, seed=None):
        target = ptx.Machine(arch, lazy, seed)
        target.take_over(monkeypatch)
        parts = packed.records, packed.starts, packed.chunks, packed.shape[0]
        second = None if up is None else (up.records, up.starts)
        y = mma.launch(x, *parts, bias, activation, config, second)
        assert len(target.launches) == 1
        assert not counter.any(), "the counter must be zero again"
        return y

    return launch


CASES = [
    # dtype, tokens, rows, columns, configuration, activation, bias
    (torch.bfloat16, 3, 40, 832, Config(4, 1, 2, 2), "silu", True),
    (torch.float16, 1, 33, 61, Config(4, 1, 2, 1), "none", False),
    (torch.bfloat16, 13, 20, 640, Config(1, 2, 3, 2), "none", True),
    (torch.bfloat16, 2, 32, 1024, Config(4, 1, 3, 1, bulk=True, dependent=True), "none", True),
]
MORE = [
    (torch.bfloat16, 1, 64, 1024, Config(4, 1, 2, 1, 72), "none", False),
    (torch.float16, 8, 1, 1, Config(4, 1, 3, 1), "relu", True),
    (torch.float16, 16, 100, 300, Config(2, 2, 2, 1), "gelu", True),
    (torch.bfloat16, 40, 20, 704, Config(1, 4, 3, 3), "gelu_tanh", True),
    (torch.bfloat16, 9, 33, 2048, Config(4, 1, 2, 8), "none", False),
    (torch.bfloat16, 64, 40, 320, Config(1, 4, 2, 1, 128), "none", True),
    (torch.bfloat16, 33, 20, 1100, Config(2, 2, 3, 2, bulk=True), "silu", False),
    (torch.float16, 5, 48, 2176, Config(4, 1, 2, 1, bulk=True), "none", False),
    (torch.bfloat16, 4, 200, 200, Config(1, 1, 3, 1), "none", False),
    (torch.bfloat16, 4, 17, 1500, Config(2, 1, 3, 3, dependent=True), "none", False),
]
PARAMETERS = [pytest.param(*c) for c in CASES]
PARAMETERS += [pytest.param(*c, marks=pytest.mark.slow) for c in MORE]


def _problem(dtype, tokens, rows, columns, activation, has_bias):
    weight, x = ragged(rows, columns, dtype), torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    act = ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    return weight, x, bias, act(F.linear(x, weight, bias)), exact


@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "columns", "config", "activation", "has_bias"), PARAMETERS
)
def test_linear(machine, dtype, tokens, rows, columns, config, activation, has_bias):
    weight, x, bias, eager, exact = _problem(dtype, tokens, rows, columns, activation, has_bias)
    packed = bitmap_pack(weight)
    got = machine(x, packed, bias, activation, config)
    assert_as_good_as_eager(got, eager, exact)
    # other order of programs, copies at once instead of as late as allowed: the same bits
    assert torch.equal(got, machine(x, packed, bias, activation, config, lazy=False))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))]
)
@pytest.mark.parametrize("bulk", [False, True])
def test_warps_in_any_order_give_the_same_bits(machine, bulk, seed):
    config = Config(4, 1, 2 + seed % 2, 1, bulk=bulk)
    weight, x, bias, eager, exact = _problem(torch.bfloat16, 3, 16, 1408, "silu", True)
    packed = bitmap_pack(weight)
    got = machine(x, packed, bias, "silu", config, seed=seed, lazy=bool(seed % 4))
    assert_as_good_as_eager(got, eager, exact)
    assert torch.equal(got, machine(x, packed, bias, "silu", config))


@pytest.mark.parametrize(
    ("tokens", "columns", "config"),
    [
        (2, 640, Config(4, 1, 2, 2)),
        pytest.param(12, 300, Config(2, 2, 3, 1), marks=pytest.mark.slow),
        pytest.param(20, 512, Config(2, 4, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_gate_and_up(machine, tokens, columns, config):
    rows = 41
    gate, up = (ragged(rows, columns, torch.bfloat16) for _ in range(2))
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    packed = [bitmap_pack(gate), bitmap_pack(up)]
    chunks = max(w.chunks for w in packed)
    packed = [dataclasses.replace(w, chunks=chunks) for w in packed]
    got = machine(x, packed[0], None, "silu", config, packed[1])
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert_as_good_as_eager(got, F.silu(F.linear(x, gate)) * F.linear(x, up), exact)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["full", pytest.param("empty", marks=pytest.mark.slow), "one row", "one block"]
)
def test_extreme_weights(machine, kind, arch):
    weight = torch.zeros(32, 640)
    if kind == "full":
        # the largest counts that the packed sums must hold
        weight = torch.randn(32, 640)
    elif kind == "one row":
        weight[21] = torch.randn(640)
    elif kind == "one block":
        weight[:, 192:256] = torch.randn(32, 64)
    weight, x = weight.to(torch.bfloat16), torch.randn(2, 640).to(torch.bfloat16)
    got = machine(x, bitmap_pack(weight), None, "none", Config(4, 1, 2, 1), arch=arch)
    assert_as_good_as_eager(got, F.linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("slots", [2, 3])
def test_a_record_that_does_not_fit_makes_its_results_nan(machine, slots, bulk):
    # line 1 is full somewhere: in a program's first records, in the middle, and in its last
    for stage in (0, 1, 3, 5):
        weight = torch.zeros(32, 768, dtype=torch.bfloat16)
        weight[16:, 128 * stage : 128 * stage + 128] = 1.0
        packed = bitmap_pack(weight)
        assert packed.chunks == 9
        # what a constructor cannot see without reading the device's tensors
        small = dataclasses.replace(packed, chunks=8)
        assert isinstance(small, BitmapSparse)
        x = torch.ones(2, 768, dtype=torch.bfloat16)
        y = machine(x, small, None, "none", Config(2, 1, slots, 1, bulk=bulk))
        assert (y[:, :16] == 0).all() and y[:, 16:].isnan().all()


@pytest.mark.parametrize(
    ("right", "wrong", "bulk", "message"),
    [
        ("cp.async.wait_group 0;", "cp.async.wait_group 1;", False, "copy in flight"),
        ("bar.warp.sync -1;", "", False, r"without bar\.warp\.sync"),
        ("@!p bra $L_record;", "", True, "copy in flight|without a barrier"),
        ("bar.sync \t0;", "", False, "without a barrier"),
    ],
)
def test_what_the_kernel_waits_for_is_needed(machine, monkeypatch, right, wrong, bulk, message):
    compile_right = ptx.machine.compile_ptx

    def compile_wrong(case, arch):
        text, shared = compile_right(case, arch)
        assert right in text
        return text.replace(right, wrong), shared

    monkeypatch.setattr(ptx.machine, "compile_ptx", compile_wrong)
    packed, x = bitmap_pack(ragged(16, 1024, torch.bfloat16)), torch.randn(1, 1024).bfloat16()
    config = Config(4, 1, 2, 1, bulk=bulk)
    with pytest.raises(ValueError, match=message):
        # a bulk copy may have landed by luck
        for seed in range(8 if bulk else 1):
            machine(x, packed, None, "none", config, seed=seed)


def test_strided_activations(machine):
    packed, wide = (
        bitmap_pack(ragged(16, 256, torch.bfloat16)),
        torch.randn(5, 264).to(torch.bfloat16),
    )
    config = Config(4, 1, 2, 1)
    want = machine(wide[:, 3:259].contiguous(), packed, None, "none", config)
    assert torch.equal(machine(wide[:, 3:259], packed, None, "none", config), want)


@pytest.mark.slow
def test_the_self_test_passes_and_notices(machine, monkeypatch):
    from prunekernels.sparse.bitmap import mma

    monkeypatch.setattr(mma, "processors", lambda device: 8)
    monkeypatch.setattr(mma, "capability", lambda device: (9, 0))
    ptx.Machine(90).take_over(monkeypatch)
    assert mma.self_test(torch.device("cpu")) is None
    right = ptx.tensor_cores.mma_m16n8k128_b1

    def wrong(a, b, c):
        return right(a[:, :, ::-1], b, c)

    monkeypatch.setattr(ptx.tensor_cores, "mma_m16n8k128_b1", wrong)
    assert "results differ" in mma.self_test(torch.device("cpu"))
