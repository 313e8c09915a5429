"""The compile-only harness reads registers, spills, opcodes and loops out of real machine code."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("triton")
import triton
import triton.language as tl
from prunekernels.compilation import (
    KernelCase,
    compile_case,
    discover,
    format_report,
    innermost_loops,
    parse_arch,
    parse_sass,
    planned,
)
from triton.runtime.jit import JITFunction


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + rows[:, None] * K + k + rows[None, :])
        b = tl.load(b_ptr + rows[None, :] * K + k + rows[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], acc)


pytestmark = pytest.mark.skipif(
    not isinstance(_dot_kernel, JITFunction), reason="kernels are being interpreted"
)


def _case(**changes):
    values = dict(
        name="dot",
        kernel=_dot_kernel,
        signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "K": "i32"},
        constants={"BLOCK": 32},
        divisible=("a_ptr", "b_ptr", "out_ptr", "K"),
        opcodes=("HMMA.16816.F32.BF16",),
        elements_per_iteration=32 * 32,
    )
    return KernelCase(**{**values, **changes})


@pytest.mark.parametrize("arch", [80, 90])
def test_reads_registers_opcodes_and_the_loop(arch):
    report = compile_case(_case(), arch)
    assert report.missing == []
    assert report.opcodes["HMMA.16816.F32.BF16"] > 0
    assert 16 < report.registers <= 255
    assert report.spills == 0
    assert report.fits
    assert report.loop_opcodes["HMMA"] > 0
    assert report.loop_instructions < report.instructions
    assert report.instructions_per_element == report.loop_instructions * 32 / 1024
    assert "HMMA.16816" in format_report(report)
    assert report.dtype == "bf16"
    (opcode,) = report.tensor_core
    assert opcode.startswith("HMMA.16816.F32.BF16")


def test_a_missing_opcode_is_reported():
    assert compile_case(_case(opcodes=("HMMA.SP",)), 80).missing == ["HMMA.SP"]


def test_every_kernel_of_the_package_registers_what_it_compiles_to():
    """A kernel is a jitted function called …_kernel; helpers are compiled into them."""
    registered = {case.kernel for case in discover()}
    forgotten = [
        f"{name}.{attribute}"
        for name, module in sys.modules.items()
        if name.startswith("prunekernels.")
        for attribute, value in vars(module).items()
        if isinstance(value, JITFunction) and attribute.endswith("_kernel")
        if value not in registered
    ]
    assert forgotten == []
    names = [case.name for case in discover()]
    assert {"pair_stats/core/bf16/base", "vector_stats/fp32"} < set(names)


def test_architectures_are_chosen_by_name():
    cases = [_case(), _case(name="other", archs=(80, "gfx942"))]
    assert [arch for _, arch in planned(cases)] == [80, 89, 90, 80, "gfx942"]
    chosen = planned(cases, [parse_arch("sm_90"), parse_arch("gfx942")])
    assert [(case.name, arch) for case, arch in chosen] == [("dot", 90), ("other", "gfx942")]
    with pytest.raises(ValueError, match="architecture 70; choose from 80, 89, 90, gfx942"):
        planned(cases, [70])


def test_amd_target_compiles():
    report = compile_case(_case(opcodes=("v_mfma", "HMMA")), "gfx942")
    assert report.opcodes["v_mfma"] > 0
    assert list(report.opcodes) == ["v_mfma"]
    assert report.registers > 0 and report.spills == 0


def test_arguments_that_do_not_match_the_kernel_are_named():
    with pytest.raises(ValueError, match="BLOCK"):
        compile_case(_case(constants={}), 80)


def test_loops_are_found_from_backward_branches():
    text = "\n".join(
        f"        /*{16 * i:04x}*/  {line} ;    /* 0x0 */"
        for i, line in enumerate(
            [
                "MOV R1, c[0x0][0x28]",
                "IADD3 R2, R2, 0x1, RZ",  # 0x10: outer
                "FADD R3, R3, R4",  # 0x20: inner
                "@!P0 LDG.E R4, [R2.64]",
                "@P1 BRA 0x20   &req={2}   ?trans5",
                "@P0 BRA 0x10",
                "EXIT",
                "BRA 0x70",
            ]
        )
    )
    code = parse_sass(text)
    assert [i.opcode for i in code][:4] == ["MOV", "IADD3", "FADD", "LDG.E"]
    (loop,) = innermost_loops(code)
    assert [i.opcode for i in loop] == ["FADD", "LDG.E", "BRA"]
