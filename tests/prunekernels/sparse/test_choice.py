"""Which implementation of a packed layer runs, and what happens when a kernel is wrong."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu
from prunekernels import (
    bitmap_expected,
    bitmap_pack,
    runtime,
    sparse24_expected,
    sparse24_pack,
)
from prunekernels.runtime import Choice, Op, Problem

CPU = torch.device("cpu")
#: The op of each format and its kernel in inline assembly.
OPS = {"sparse24_linear": "mma_sp", "bitmap_linear": "mma"}


@pytest.fixture(params=OPS)
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    state = fake_gpu(monkeypatch, runtime.ops()[request.param])
    state.kernel = OPS[request.param]
    # at one token both formats' tables prefer the tensor cores
    state.op = _preferring(state.op, state.kernel)
    return state


def _preferring(op: Op, kernel: str) -> Op:
    """The op with a table that has the tensor cores for few tokens, whatever was measured."""
    import dataclasses

    def order(m: int, n: int, k: int, capability: Any, itemsize: int) -> list[tuple[str, str]]:
        if itemsize > 2 or m > 128:
            return [("eager", "float32" if itemsize > 2 else "many tokens")]
        few = [(kernel, "few tokens"), ("triton", "few tokens")]
        return few if m <= 64 else few[:1]

    return dataclasses.replace(op, order=order)


def test_few_tokens_use_the_tensor_cores_after_one_self_test(hopper: Any) -> None:
    for tokens in (4, 4, 5):
        assert hopper.select(tokens).name == hopper.kernel
    assert hopper.runs == 1
    assert hopper.select(4096).name == "eager"


@pytest.mark.parametrize("problem", ["3 of 5 results differ", RuntimeError("ptxas died\nlog")])
def test_a_failing_self_test_warns_once_and_falls_back(hopper: Any, problem: Any) -> None:
    hopper.problem = problem
    with pytest.warns(RuntimeWarning, match="failed its self-test on cuda:0") as caught:
        choice = hopper.select(4)
    assert choice.name == "triton"
    assert f"not {hopper.kernel}: " in choice.reason and "\n" not in choice.reason
    assert str(problem).splitlines()[0] in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper.select(5).name == "triton"
    assert hopper.runs == 1
    with pytest.raises(ValueError, match=f"impl='{hopper.kernel}' cannot run"):
        hopper.select(4, impl=hopper.kernel)
    # between few and many tokens a failure means expanding
    assert hopper.select(128).name == "eager"


def test_float32_values_never_reach_the_tensor_cores(hopper: Any) -> None:
    assert hopper.select(4, torch.float32) == ("eager", "float32")
    with pytest.raises(ValueError, match=r"bfloat16 and float16 values, not torch\.float32"):
        hopper.select(4, torch.float32, hopper.kernel)
    assert hopper.runs == 0


def test_a_kernel_that_must_prove_itself_inside_a_capture_is_named(hopper: Any) -> None:
    hopper.capturing = True
    with pytest.raises(RuntimeError, match=f"kernel {hopper.kernel} of .*warm_up"):
        hopper.select(4)
    hopper.capturing = False
    assert hopper.select(4).name == hopper.kernel
    hopper.capturing = True
    assert hopper.select(5).name == hopper.kernel


def test_other_architectures_use_the_portable_kernel(hopper: Any) -> None:
    hopper.capability = (7, 5)
    choice = hopper.select(4)
    assert choice.name == "triton" and "compute capability 7.5" in choice.reason


def test_a_choice_is_made_once_for_a_shape(hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "KEPT", 2)
    first = hopper.select(4)
    monkeypatch.setattr(Op, "_select", lambda *_: Choice("eager", "made anew"))
    assert hopper.select(4) is first
    for tokens in (5, 6):
        assert hopper.select(tokens).reason == "made anew"
    # more shapes than are kept: all are forgotten, none is wrong
    assert hopper.select(4).reason == "made anew"


@pytest.mark.parametrize("name", OPS)
def test_on_a_cpu_the_weight_is_expanded_and_the_reason_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = runtime.ops()[name]
    choice = op.select(Problem(CPU, torch.float32, (1, 8, 8)))
    assert choice.name == "eager" and "on the CPU" in choice.reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = op.describe()
    assert row["op"] == name and row["impl"] == "eager" and "not faster" in row["reason"]


@pytest.mark.parametrize(
    ("pack", "expected"), [(sparse24_pack, sparse24_expected), (bitmap_pack, bitmap_expected)]
)
def test_on_a_cpu_no_gain_is_expected(pack: Any, expected: Any) -> None:
    w = pack(torch.zeros(512, 512))
    for tokens in (1, 4096):
        speedup, impl, reason, measured = expected(tokens, w)
        assert not measured
        assert speedup < 1 and impl == "eager" and "on the CPU" in reason


def test_what_is_expected_follows_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    w = bitmap_pack(torch.zeros(64, 64, dtype=torch.bfloat16))
    for impl, faster in (("mma", True), ("triton", False), ("eager", False)):
        choice = Choice(impl, "as on a GPU")
        monkeypatch.setattr(Op, "select", lambda *_, choice=choice: choice)
        speedup, chosen, reason, _ = bitmap_expected(1, w)
        assert (chosen, reason) == choice and (speedup > 1) == faster


def test_only_asking_for_it_runs_wgmma() -> None:
    from prunekernels.sparse.two_four.tuning import sparse24_order

    op = runtime.ops()["sparse24_linear"]
    assert "wgmma_sp" in op.impls
    for tokens in (1, 64, 256, 4096, 65536):
        names = {name for name, _ in sparse24_order(tokens, 8192, 8192, (9, 0))}
        assert "wgmma_sp" not in names
    with pytest.raises(ValueError, match=r"wgmma_sp.*NVIDIA GPU"):
        op.select(Problem(CPU, torch.bfloat16, (1, 16, 64)), "wgmma_sp")
