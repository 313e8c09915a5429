"""The TMA kernel: its machine code, run by the NumPy machine at random speeds, and mutants of it.

The machine's `wgmma`s and copies take their time (`ptx.warpgroups`, `ptx.tensor_copies`), so a wait
too few, a wrong phase or a slot used too early shows. What it cannot show is in the machine code:
registers that `wgmma`s in flight read and that ptxas might use again (`warpgroup_hazards`).
"""

from __future__ import annotations

import gc
import random
import re
import types
import weakref

import ptx
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from products import assert_as_good_as_eager
from prunekernels.compilation import Instruction, compile_case, compile_ptx, machine_code
from prunekernels.runtime import interpreting
from prunekernels.sparse.two_four.format import sparse24_pack
from prunekernels.sparse.two_four.linear import ACTIVATIONS, OP
from prunekernels.sparse.two_four.tuning import WgmmaConfig, sparse24_order, sparse24_wgmma
from warpgroup_hazards import hazards

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")

MANY = WgmmaConfig(16, 16, 1, 8)
FEW = WgmmaConfig(8, 4, 1, 0)


@pytest.fixture
def tma():
    from prunekernels.sparse.two_four import wgmma_tma

    return wgmma_tma


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    groups = -(-columns // 4)
    rank = torch.rand(rows, groups, 4).argsort(2).argsort(2)
    kept = rank < torch.randint(0, 3, (rows, groups, 1))
    return (torch.randn(rows, groups, 4) * kept).view(rows, -1)[:, :columns].to(dtype)


@pytest.fixture
def launch(monkeypatch, tma):
    """Make `wgmma_tma.launch` run on a machine; returns a function that does so."""
    from prunekernels.sparse import launching

    counter = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launching, "counters", lambda count, device: counter[:count])

    def run(*arguments, seed=None, lazy=True, mutate=None):
        counter.zero_()
        machine = ptx.Machine(90, lazy, seed, mutate)
        # programs, too, run in another order
        machine.shuffle = random.Random(seed)
        with monkeypatch.context() as patch:
            machine.take_over(patch)
            y = tma.launch(*arguments)
        assert len(machine.launches) == 1
        assert not counter.any(), "the counter must be zero again"
        return y

    return run


# Machine code.


CASES = [pytest.param(n, marks=() if n in (2, 5) else pytest.mark.slow) for n in range(7)]


@pytest.mark.parametrize("number", CASES)
def test_machine_code(tma, number):
    case = tma.compile_cases()[number]
    report = compile_case(case, 90)
    assert report.fault == "" and report.registers <= 128
    # the ring and its barriers; the epilogue uses the ring's memory again
    tokens = 8 * case.constants["NT"]
    assert report.shared_bytes == tma.STAGES * tokens * 128 + 2 * tma.STAGES * 8
    code = machine_code(case, 90)
    assert list(hazards(code)) == []
    places = [i for i, at in enumerate(code) if at.opcode.startswith(("HGMMA", "WARPGROUP"))]
    loop = code[places[0] : places[-1]]
    # one arrival and one wait for each group: ptxas has serialised nothing
    waits = [at.opcode for at in loop if at.opcode.startswith("WARPGROUP")]
    assert len(waits) + 1 == 2 * (2 + case.constants["TAILS"])
    assert not [at.opcode for at in loop if at.opcode.startswith(("BAR", "MEMBAR", "FENCE"))]


def test_the_loop_is_short(tma):
    # 8 instructions of 64 × 128 × 32 take 2048 clocks of the tensor cores at half their dense rate
    (case,) = [c for c in tma.compile_cases() if c.name.endswith("f16/256x128/tails")]
    report = compile_case(case, 90)
    assert report.loop_opcodes["HGMMA"] == 8 and report.loop_opcodes["UTMALDG"] == 4
    assert report.loop_instructions <= 260
    # words of a unit: eight of 16 bytes, and metadata in two halves
    assert sum(report.loop_loads.values()) == 10


def test_names_in_the_assembly_are_those_of_the_compiler(tma):
    from prunekernels.sparse.two_four import warpgroup_asm as asm

    case = tma.compile_cases()[2]
    assert tma._wgmma24_tma_fwd_kernel.arg_names[:2] == ["x_desc", "M"]
    text, _ = compile_ptx(case, 90)
    parameters = re.findall(r"\.param (\S+(?: \d+ \.b8)?) \S*_param_(\d+)", text)
    assert parameters[0] == (".align 64 .b8", "0")
    # the descriptor's sizes and strides, then M
    kinds = [kind for kind, _ in parameters[1 : asm.TOKENS_PARAMETER + 1]]
    assert kinds == [".u32", ".u32", ".u64", ".u64", ".u32"]


def test_the_scan_finds_what_is_written_or_read_too_early():
    def code(*lines):
        pairs = [line.partition(" ") for line in lines]
        return [Instruction(16 * i, name, rest) for i, (name, _, rest) in enumerate(pairs)]

    # sums in R24-R39, A in R88-R91, metadata in R120
    start = "HGMMA.SP.64x32x32.F32.BF16 R24, R88, gdesc[UR16], R24, R120, 0x0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    for line in (
        "LDG.E.128 R88, desc[UR4][R2.64]",
        "LDG.E.128 R117, desc[UR4][R2.64]",
        "IMAD.WIDE R119, R3, 0x4, R4",
        "MOV R120, R7",
        "IADD3 R39, P0, R7, R8, RZ",
        "FADD R5, R24, R6",
        "STG.E desc[UR4][R2.64], R30",
    ):
        assert len(list(hazards(code(start, line, wait)))) == 1, line
        assert list(hazards(code(start, wait, line))) == []
    for line in (
        "LDG.E.128 R84, desc[UR4][R2.64]",
        "IMAD.WIDE R118, R3, 0x4, R4",
        "ISETP.NE P0, PT, R88, RZ, PT",
        "R2UR UR4, R120",
    ):
        assert list(hazards(code(start, line, wait))) == [], line


# Values.


QUICK = [
    # dtype, tokens, rows, columns, activation, gated, config
    (torch.bfloat16, 20, 150, 320, "silu", False, FEW),
    (torch.float16, 9, 40, 1088, "none", True, FEW._replace(splits=2)),
]
SLOW = [
    (torch.bfloat16, 1, 16, 64, "gelu", False, FEW),
    (torch.float16, 33, 257, 1024, "gelu_tanh", False, FEW._replace(splits=3)),
    (torch.bfloat16, 64, 33, 2113, "relu", False, WgmmaConfig(8, 8, 4, 0)),
    (torch.bfloat16, 50, 70, 1216, "silu", True, WgmmaConfig(8, 8, 1, 0)),
    (torch.float16, 131, 40, 250, "none", False, MANY),
    (torch.bfloat16, 130, 270, 1024, "none", False, MANY),
    (torch.float16, 128, 200, 1088, "silu", True, MANY),
    (torch.bfloat16, 100, 256, 1600, "silu", False, MANY._replace(splits=4, group=0)),
]
PARAMETERS = [pytest.param(*c) for c in QUICK]
PARAMETERS += [pytest.param(*c, marks=pytest.mark.slow) for c in SLOW]


@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "columns", "activation", "gated", "config"), PARAMETERS
)
def test_values(launch, dtype, tokens, rows, columns, activation, gated, config):
    torch.manual_seed(tokens)
    gate, up = two_of_four(rows, columns, dtype), two_of_four(rows, columns, dtype)
    x = torch.randn(tokens, columns).to(dtype)
    bias = None if gated or activation == "none" else torch.randn(rows).to(dtype)
    act = ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), gate.double(), None if bias is None else bias.double()))
    eager = act(F.linear(x, gate, bias))
    second = None
    if gated:
        second = sparse24_pack(up).packed
        exact, eager = exact * F.linear(x.double(), up.double()), eager * F.linear(x, up)
    packed = sparse24_pack(gate).packed
    arguments = (x, packed, second, rows, bias, activation, config)
    got = launch(*arguments)
    assert_as_good_as_eager(got, eager, exact)
    # copies and products at once, not as late as allowed; then in any order: the same bits
    assert torch.equal(got, launch(*arguments, lazy=False))
    assert torch.equal(got, launch(*arguments, seed=tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "config"),
    [
        (20, 128, 1088, FEW._replace(splits=2)),
        (60, 100, 1088, WgmmaConfig(8, 8, 1, 0)),
        (128, 256, 832, MANY),
    ],
)
def test_any_schedule_gives_the_same_exact_integers(launch, tokens, rows, columns, config):
    weight = torch.randint(-2, 3, (rows, columns // 4, 4))
    weight = (weight * (torch.rand(weight.shape).argsort(2) < 2)).view(rows, -1)
    x = torch.randint(-3, 4, (tokens, columns))
    packed = sparse24_pack(weight.to(torch.bfloat16)).packed
    wanted = (x @ weight.T).to(torch.bfloat16)
    for seed in range(20):
        got = launch(x.to(torch.bfloat16), packed, None, rows, None, "none", config, seed=seed)
        assert torch.equal(got, wanted), seed


def test_strided_activations(launch):
    weight = two_of_four(32, 320, torch.bfloat16)
    packed = sparse24_pack(weight).packed
    wide = torch.randn(5, 336).to(torch.bfloat16)
    arguments = (packed, None, 32, None, "none", FEW)
    want = launch(wide[:, 8:328].contiguous(), *arguments)
    # through the descriptor's stride, and copied because it is not aligned
    assert torch.equal(launch(wide[:, 8:328], *arguments), want)
    assert_as_good_as_eager(
        want, F.linear(wide[:, 8:328], weight), wide[:, 8:328].double() @ weight.double().T
    )
    moved = torch.cat([wide[:, :3], wide[:, 8:328]], 1)
    assert torch.equal(launch(moved[:, 3:], *arguments), want)


def test_a_descriptor_is_kept_by_address_and_keeps_no_memory(tma):
    x = torch.zeros(20, 64, dtype=torch.bfloat16)
    call = (x.data_ptr(), (20, 64), 64, x.dtype, 4)
    descriptor = tma.x_descriptor(*call)
    assert tma.x_descriptor(*call) is descriptor
    assert descriptor.shape == [20, 64] and descriptor.block_shape == [32, 64]
    assert tma.x_descriptor(call[0], (19, 64), *call[2:]) is not descriptor
    assert tma.x_descriptor(*call[:3], torch.float16, 4) is not descriptor
    freed = weakref.ref(x)
    del x
    gc.collect()
    assert freed() is None


def test_tritons_launcher_takes_the_descriptor(monkeypatch, tma):
    """The tensor map that the driver is asked for has the tiles and the swizzle of the kernel."""
    import triton
    from prunekernels import compilation
    from triton.backends.nvidia import driver

    case = tma.compile_cases()[2]
    (meta,) = compilation._compile(case, 90).metadata.tensordesc_meta
    asked = []

    def fill(*arguments):
        asked.append(arguments)
        return "map"

    utils = types.SimpleNamespace(fill_tma_descriptor_tiled=fill, fill_tma_descriptor=fill)
    active = types.SimpleNamespace(active=types.SimpleNamespace(utils=utils))
    monkeypatch.setattr(triton.runtime, "driver", active)
    descriptor = tma.x_descriptor(1 << 20, (300, 4160), 4168, torch.float16, MANY.token_tiles)
    arguments = driver.make_tensordesc_arg(descriptor, meta)
    # itself, sizes and strides: five parameters, as `warpgroup_asm` counts
    assert arguments == ["map", 300, 4160, 4168, 1]
    ((address, swizzle, size, _, box, shape, strides, padding),) = asked
    # swizzle 3 is CU_TENSOR_MAP_SWIZZLE_128B
    assert (address, swizzle, size, list(box)) == (1 << 20, 3, 2, [128, 64])
    assert (list(shape), list(strides), padding) == ([300, 4160], [4168, 1], 0)


# What goes wrong is seen.


def _without(pattern: str):
    def mutate(text: str) -> str:
        changed, count = re.subn(pattern, "", text)
        assert count, pattern
        return changed

    return mutate


def _early_report(text: str) -> str:
    """Slots are reported as used before the wait for what uses them."""
    block = r"(wgmma\.wait_group\.sync\.aligned 0;\n)(.*?)(\n\}\n)"
    changed, count = re.subn(block, r"\2\n\1\3", text, flags=re.S)
    assert count
    return changed


def _wrong_phase(text: str) -> str:
    """Slots are filled a phase too early: the wait sees the phase before."""
    wait = r"(FWAIT:\nmbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+\], )(%r\d+);"
    changed, count = re.subn(wait, r"xor.b32 t, \2, 1;\n\1t;", text)
    assert count
    return changed


def _wrong_phase_of_x(text: str) -> str:
    """The wait for x looks at the phase before."""
    wait = r"(XWAIT[AB]:\n)(mbarrier\.try_wait\S* p, \[[^\]]*\], )(%r\d+);"
    changed, count = re.subn(wait, r"\1xor.b32 phase, \3, 1;\n\2phase;", text)
    assert count
    return changed


def _fewer_arrivals(text: str) -> str:
    """A slot counts as used when all warps but one have used it."""
    changed, count = re.subn(r"(mbarrier\.init\S* \[[^\]]*\], )8;", r"\g<1>7;", text)
    assert count == 8
    return changed


def _fewer_bytes(text: str) -> str:
    """The last 16 bytes of a tile are not waited for."""
    changed, count = re.subn(r"(expect_tx\S* _, \[[^\]]*\], )4096;", r"\g<1>4080;", text)
    assert count
    return changed


MUTANTS = {
    "no wait for the sums": _without(r"wgmma\.wait_group\.sync\.aligned 0;"),
    "no wait for x": _without(r"XWAIT([AB]):\n[^\n]*try_wait[^\n]*\n[^\n]*XWAIT\1;\n"),
    "no wait for the slot": _without(r"FWAIT:\n[^\n]*try_wait[^\n]*\n[^\n]*FWAIT;\n"),
    "slots reported before the wait": _early_report,
    "wrong phase of a slot": _wrong_phase,
    "wrong phase of x": _wrong_phase_of_x,
    "one arrival too few": _fewer_arrivals,
    "no report": _without(r"@p mbarrier\.arrive\.shared::cta\.b64 _, [^\n]*\n"),
    "fewer bytes expected": _fewer_bytes,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(launch, name):
    weight = two_of_four(32, 1280, torch.bfloat16)
    x = torch.randn(8, 1280).to(torch.bfloat16)
    packed = sparse24_pack(weight).packed
    arguments = (x, packed, None, 32, None, "none", FEW)
    want = launch(*arguments)

    def survives(seed):
        try:
            got = launch(*arguments, seed=seed, mutate=MUTANTS[name])
        except (ValueError, AssertionError):
            return False
        return torch.equal(got, want)

    assert not all(survives(seed) for seed in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_its_self_test_passes_and_notices(monkeypatch, tma, broken):
    from prunekernels.sparse import launching

    monkeypatch.setattr(
        launching, "counters", lambda count, device: torch.zeros(count, dtype=torch.int32)
    )
    # few rows, and once: the machine repeats itself
    monkeypatch.setattr(tma, "_SELF_TEST_ROWS", 200)
    monkeypatch.setattr(tma, "_SELF_TEST_REPEATS", 0)
    ptx.Machine(90).take_over(monkeypatch)
    if broken:
        real = ptx.tensor_cores.mma_sp_m16n8k32

        def swapped(a, b, c, e, selector, kind):
            return real(a, b, c, e, 1 - selector, kind)

        monkeypatch.setattr(ptx.tensor_cores, "mma_sp_m16n8k32", swapped)
    problem = tma.self_test(torch.device("cpu"))
    assert (problem is not None and "differ" in problem) if broken else problem is None


def test_its_self_test_notices_what_differs_between_calls(monkeypatch, tma):
    answers = iter(range(1, 9))

    def launch(x, packed, up, rows, *_):
        y = torch.zeros(len(x), rows, dtype=x.dtype)
        y[0, 0] = next(answers)
        return y

    monkeypatch.setattr(tma, "_SELF_TEST_ROWS", 16)
    monkeypatch.setattr(tma, "launch", launch)
    monkeypatch.setattr(tma, "difference", lambda *_: None)
    assert "results differ between calls" in tma.self_test(torch.device("cpu"))


# Choice.


def test_only_asking_for_it_runs_it():
    assert "wgmma_tma" in OP.impls
    for tokens in (1, 64, 256, 4096, 65536):
        names = {name for name, _ in sparse24_order(tokens, 8192, 8192, (9, 0))}
        assert "wgmma_tma" not in names


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(14336, 4096), (4096, 14336), (4096, 4096), (64, 64)]
)
def test_configurations_fill_the_device_and_divide_the_columns(rows, columns, gated):
    for tokens in (1, 17, 32, 33, 64, 65, 256, 1024, 4096):
        config = sparse24_wgmma(tokens, rows, columns, gated, 132)
        assert config.warps in (8, 16) and config.token_tiles in (4, 8, 16)
        # each split has two units at least, and only what does not fill the device is split
        assert config.splits == 1 or columns // 256 >= 2 * config.splits
        height = config.warps * (8 if gated else 16)
        programs = -(-rows // height) * -(-tokens // (8 * config.token_tiles))
        slots = 132 * (16 // config.warps)
        assert config.splits == 1 or programs * config.splits <= slots
