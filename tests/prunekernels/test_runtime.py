"""Which implementation runs, and why; what a registered Triton kernel changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prunekernels import pair_stats, runtime, vector_stats
from prunekernels.metrics import eager
from prunekernels.metrics.result_rows import VECTOR_FLOATS
from prunekernels.runtime import Kernel, Op, Problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

CPU = Problem(torch.device("cpu"), torch.float32)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Op]:
    """The ops that there are: pair_stats without a kernel, and vector_stats with a fake one."""
    fakes = {name: Op(name, {}) for name in runtime.ops()}
    fakes["vector_stats"] = Op("vector_stats", {"triton": Kernel("nowhere", "vector_stats")})
    monkeypatch.setattr(runtime, "_OPS", fakes)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return fakes


def test_without_a_kernel_eager_runs_and_says_why(registry: dict[str, Op]) -> None:
    op = registry["pair_stats"]
    assert op.select(CPU) == ("eager", "this op has no Triton kernel")
    assert op.select(CPU, "eager") == ("eager", "asked for")
    with pytest.raises(ValueError, match="pair_stats: impl must be one of auto, eager, got"):
        op.select(CPU, "triton")


def test_a_kernel_runs_on_a_gpu_and_in_the_interpreter_only(
    registry: dict[str, Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = registry["vector_stats"]
    monkeypatch.setattr(runtime, "triton_installed", lambda: True)
    choice = op.select(CPU)
    assert choice.name == "eager"
    assert choice.reason.startswith("the kernels need a GPU, and this runs on the CPU")
    with pytest.raises(ValueError, match=r"cannot run: Triton kernels need .* on the CPU \(TRITON"):
        op.select(CPU, "triton")
    with pytest.raises(ValueError, match="impl must be one of auto, eager, triton, got 'fast'"):
        op.select(CPU, "fast")
    assert op.select(Problem(torch.device("cuda", 0), torch.float32)) == (
        "triton",
        "this runs on a GPU",
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.select(CPU, "triton").name == "triton"
    assert op.select(CPU).name == "eager"
    monkeypatch.setattr(runtime, "triton_installed", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        op.select(CPU, "triton")


def test_the_public_op_runs_the_registered_kernel(
    registry: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def kernel(base: Tensor, other: Tensor) -> Tensor:
        seen.append(base.shape)
        return eager.vector_stats(base, other, VECTOR_FLOATS) + 1.0

    monkeypatch.setattr(Kernel, "run", lambda self, *given: kernel(*given))
    monkeypatch.setattr(runtime, "triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    base = torch.randn(2, 8)
    assert vector_stats(base, base, impl="triton").cosine.tolist() == [2.0, 2.0]
    assert vector_stats(base, base).cosine.tolist() == [1.0, 1.0]
    assert seen == [(2, 8)]
    with pytest.raises(ValueError, match="pair_stats: impl must be one of auto, eager, got"):
        pair_stats(base, base, impl="triton")


def test_an_op_is_registered_once(registry: object) -> None:
    with pytest.raises(ValueError, match="an op 'vector_stats' is registered already"):
        runtime.register(Op("vector_stats", {}))


def test_describe_lists_every_op_with_a_reason() -> None:
    rows = runtime.describe()
    assert {row["op"].split(",")[0] for row in rows} == set(runtime.ops())
    for row in rows:
        assert row["impl"] in ("auto", *runtime.ops()[row["op"].split(",")[0]].impls), row
        assert row["reason"], row


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, FakeTensorMode, torch.autograd.forward_ad.dual_level],
    ids=["no_grad", "fake", "forward_ad"],
)
def test_an_op_goes_without_its_wrapper_only_where_nothing_watches(around: Any) -> None:
    x = torch.ones(2)
    with around():
        assert runtime.plain(x, None) == (around is torch.no_grad)
    assert runtime.plain(x)


def test_traced_transformed_and_differentiated_ops_keep_their_wrapper() -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(runtime.plain(x))
        return x + 1

    x = torch.ones(2, 2)
    torch.func.vmap(watched)(x)
    make_fx(watched)(x)
    torch.jit.trace(watched, (x,), check_trace=False)
    assert not any(seen) and len(seen) == 3
    assert not runtime.plain(x.clone().requires_grad_())
    with torch.no_grad():
        assert runtime.plain(x.clone().requires_grad_())
    assert (
        torch.compile(lambda x: x + (2 if runtime.plain(x) else 1), backend="eager")(x)[0, 0] == 2
    )
