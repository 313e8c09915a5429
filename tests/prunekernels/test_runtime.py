"""Which implementation runs, and why; what a registered Triton kernel changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from prunekernels import pair_stats, runtime, vector_stats
from prunekernels.metrics import eager
from torch import Tensor

CPU = (torch.zeros(2, 3),)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, runtime.TritonKernel]:
    kernels: dict[str, runtime.TritonKernel] = {}
    monkeypatch.setattr(runtime, "_TRITON", kernels)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return kernels


def test_without_a_kernel_eager_runs_and_says_why(registry: object) -> None:
    assert runtime.select("pair_stats", CPU, "auto") == ("eager", "this op has no Triton kernel")
    assert runtime.select("pair_stats", CPU, "eager") == ("eager", "asked for")
    with pytest.raises(ValueError, match="pair_stats: impl='triton' cannot run: this op has no"):
        runtime.select("pair_stats", CPU, "triton")
    with pytest.raises(ValueError, match="impl must be one of auto, eager, triton, got 'fast'"):
        runtime.select("pair_stats", CPU, "fast")


def test_a_kernel_runs_on_a_gpu_and_in_the_interpreter_only(
    registry: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.register_triton("vector_stats", run=lambda *args: args)
    monkeypatch.setattr(runtime, "triton_installed", lambda: True)
    choice = runtime.select("vector_stats", CPU, "auto")
    assert choice.name == "eager" and "TRITON_INTERPRET=1" in choice.reason
    with pytest.raises(ValueError, match="tensors are on cpu"):
        runtime.select("vector_stats", CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runtime.select("vector_stats", CPU, "triton").name == "triton"
    assert runtime.select("vector_stats", CPU, "auto").name == "eager"
    monkeypatch.setattr(runtime, "triton_installed", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        runtime.select("vector_stats", CPU, "triton")


def test_a_kernel_may_refuse_tensors(registry: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(tensors: Sequence[Tensor]) -> str | None:
        return None if tensors[0].shape[-1] > 3 else "rows are too short"

    runtime.register_triton("vector_stats", run=lambda *args: args, unsupported=unsupported)
    monkeypatch.setattr(runtime, "triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="rows are too short"):
        runtime.select("vector_stats", CPU, "triton")
    assert runtime.select("vector_stats", (torch.zeros(2, 4),), "triton").name == "triton"


def test_the_public_op_runs_the_registered_kernel(
    registry: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def kernel(base: Tensor, other: Tensor) -> Tensor:
        seen.append(base.shape)
        return eager.vector_stats(base, other) + 1.0

    runtime.register_triton("vector_stats", run=kernel)
    monkeypatch.setattr(runtime, "triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    base = torch.randn(2, 8)
    assert vector_stats(base, base, impl="triton").cosine.tolist() == [2.0, 2.0]
    assert vector_stats(base, base).cosine.tolist() == [1.0, 1.0]
    assert seen == [(2, 8)]
    with pytest.raises(ValueError, match="pair_stats: impl='triton' cannot run"):
        pair_stats(base, base, impl="triton")


def test_unknown_ops_are_not_registered(registry: object) -> None:
    with pytest.raises(ValueError, match="unknown op 'softmax'"):
        runtime.register_triton("softmax", run=lambda: None)


def test_describe_lists_every_op_with_a_reason() -> None:
    rows = runtime.describe()
    assert [row["op"] for row in rows] == sorted(runtime.OPS)
    for row in rows:
        assert row["impl"] in ("eager", "triton") and row["reason"], row
