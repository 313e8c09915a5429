"""What the metric kernels compile to, without a GPU: spills, load widths, issue slots per pair."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from prunekernels.compilation import compile_case, format_report
from prunekernels.metrics import (
    head_triton,
    merge_triton,
    pair_triton,
    second_pass_triton,
    vector_triton,
)
from prunekernels.runtime import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")

#: Issue slots per pair of logits: METRICS ("Kernels") has 34.6 for 17 sums and 54.7 for precise;
#: a bfloat16 pair may take 31 of an H200's before issue, and not memory, is what limits, a float32
#: pair 62. On sm_89, where bytes limit long before, a bfloat16 pair takes 31.6.
SLOTS = {"core/bf16": 32.0, "core/fp32": 33.5, "core/fp16": 33.0}
SLOTS |= {"precise/bf16": 54.7, "precise/fp32": 56.5}
# Of a choice of fields: METRICS has 18.7 for 5 sums (these are 4) and 27.6 for 11 (these are 10).
SLOTS |= {"kl/bf16": 15.6, "kl/fp32": 16.5, "prob/bf16": 23.7, "precise_kl/bf16": 40.0}

PAIR = {(case.name, arch): case for case in pair_triton.compile_cases() for arch in case.archs}
OTHERS = [
    case
    for module in (head_triton, merge_triton, second_pass_triton, vector_triton)
    for case in module.compile_cases()
]


def _check_pair(name, arch):
    report = compile_case(PAIR[name, arch], arch)
    print(format_report(report), dict(report.loop_loads))
    assert report.missing == []
    assert report.spills == 0
    if arch == "gfx942":
        return  # the budgets are those of NVIDIA's instructions and registers
    assert set(report.loop_loads) <= {"LDG.E.64", "LDG.E.128"}
    assert sum(report.loop_loads.values()) == 16
    # Weighting by the other row adds two sums: Σvx² with its product, and Σv².
    _, sums, dtype, weights = name.split("/")
    budget = SLOTS[f"{sums}/{dtype}"] + (3.0 if weights == "other" else 0.0)
    assert report.instructions_per_element < budget
    # four programs of 128 threads on a multiprocessor's 65536 registers; three for the largest
    large = name == "pair_stats/precise/fp32/other" or (sums.startswith("precise") and arch == 80)
    assert report.registers <= (168 if large else 128)


@pytest.mark.parametrize("sums", ["core", "precise", *pair_triton.LOOPS])
def test_pair_loop(sums):
    _check_pair(f"pair_stats/{sums}/bf16/base", 90)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), sorted(PAIR, key=str))
def test_pair_loop_everywhere(name, arch):
    _check_pair(name, arch)


@pytest.mark.parametrize(
    "case", [case for case in OTHERS if 90 in case.archs], ids=lambda case: case.name
)
def test_other_kernels(case):
    _check_other(case, 90)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"{case.name}/{case.archs[0]}")
def test_other_kernels_everywhere(case):
    for arch in case.archs:
        _check_other(case, arch)


def _check_other(case, arch):
    report = compile_case(case, arch)
    print(format_report(report))
    assert report.missing == []
    assert report.fits
    assert report.spills == 0
