"""What the pruning kernels compile to, without a GPU: no spills, vector loads."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from prunekernels.compilation import compile_case, format_report, machine_code
from prunekernels.pruning import (
    masks_triton,
    masks_words_triton,
    update_thread_triton,
    update_triton,
)
from prunekernels.runtime import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")

#: Compiled in the default suite, for Hopper.
FEW = (
    "nm_mask/2:4/bf16",
    "rowwise_mask/4096/bf16",
    "rowwise_mask/14336/bf16/no norms",
    "rowwise_mask/long/mask",
    "rowwise_mask/words/14336/sizes",
    "sparsegpt_update/2:4",
    "sparsegpt_update/unstructured",
    "sparsegpt_update/thread/2:4",
)
CASES = [
    *masks_triton.compile_cases(),
    *masks_words_triton.compile_cases(),
    *update_triton.compile_cases(),
    *update_thread_triton.compile_cases(),
]


def check(case, arch):
    report = compile_case(case, arch)
    print(format_report(report))
    assert report.missing == []
    assert report.spills == 0
    assert report.fits


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in FEW], ids=lambda case: case.name
)
def test_hopper(case):
    check(case, 90)


def test_rows_of_the_update_by_threads_exchange_nothing():
    case = next(case for case in CASES if case.name == "sparsegpt_update/thread/2:4")
    opcodes = [instruction.opcode.split(".")[0] for instruction in machine_code(case, 90)]
    assert not {"SHFL", "REDUX", "LDS", "STS"} & set(opcodes)
    # unrolled code visits 16 columns between barriers
    assert opcodes.count("BAR") == 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_elsewhere(case, arch):
    check(case, arch)
