"""Which implementation of an op runs for given tensors, and why.

An op always has its eager implementation. A module that defines a Triton kernel registers it
here under the op's name; nothing else in the package needs to know that it exists. There is no
silent fallback: `impl="triton"` raises where it cannot run, and `describe()` says what `"auto"`
would do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPS = (
    "head_pair_stats",
    "nm_mask",
    "pair_state",
    "pair_stats",
    "rowwise_mask",
    "sparsegpt_update",
    "vector_stats",
)
IMPLS = ("auto", "eager", "triton")


class Choice(NamedTuple):
    """The implementation that runs, and the reason in one line."""

    name: str
    reason: str


@dataclass(frozen=True)
class TritonKernel:
    """A registered Triton implementation.

    Attributes:
        run: takes the same arguments as the eager implementation and returns the same tensors.
        unsupported: says for given tensors why the kernel cannot take them, or None.
    """

    run: Callable[..., Any]
    unsupported: Callable[[Sequence[Tensor]], str | None]


_TRITON: dict[str, TritonKernel] = {}


def register_triton(
    op: str,
    run: Callable[..., Any],
    unsupported: Callable[[Sequence[Tensor]], str | None] = lambda tensors: None,
) -> None:
    """Make a Triton implementation known under an op's name."""
    if op not in OPS:
        raise ValueError(
            f"unknown op {op!r}; add it to prunekernels.runtime.OPS ({', '.join(OPS)})"
        )
    _TRITON[op] = TritonKernel(run, unsupported)


def triton_installed() -> bool:
    """Whether the Triton package can be found (it is not imported)."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def interpreting() -> bool:
    """Whether Triton kernels run in its NumPy interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_blocker(op: str, tensors: Sequence[Tensor], device: torch.device) -> str | None:
    if op not in _TRITON:
        return "this op has no Triton kernel"
    if not triton_installed():
        return "Triton is not installed"
    if device.type != "cuda" and not interpreting():
        return f"tensors are on {device.type} and TRITON_INTERPRET=1 is not set"
    return _TRITON[op].unsupported(tensors)


def select(op: str, tensors: Sequence[Tensor], impl: str = "auto") -> Choice:
    """Choose the implementation of an op for these tensors.

    Args:
        op: an op's name, one of `OPS`.
        tensors: the op's tensor arguments; the first one's device decides.
        impl: "auto", "triton" or "eager".

    Returns:
        The name ("triton" or "eager") and the reason. "auto" takes Triton on a GPU only: the
        interpreter is for tests, which ask for it by name.

    Raises:
        ValueError: for an unknown `impl`, or "triton" where it cannot run, with the reason.
    """
    check_impl(impl)
    if impl == "eager":
        return Choice("eager", "asked for")
    device = tensors[0].device if tensors else torch.device("cpu")
    blocker = _triton_blocker(op, tensors, device)
    if impl == "triton":
        if blocker is not None:
            raise ValueError(f"{op}: impl='triton' cannot run: {blocker}; use impl='auto'")
        return Choice("triton", "asked for")
    if blocker is not None:
        return Choice("eager", blocker)
    if device.type != "cuda":
        return Choice("eager", "the interpreter is slower; ask for impl='triton' to use it")
    return Choice("triton", "tensors are on cuda")


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one while kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")


def run(op: str, eager: Callable[..., Any], tensors: Sequence[Tensor], impl: str) -> Any:
    """The callable that `select` picks: the registered Triton one, or `eager`."""
    return _TRITON[op].run if select(op, tensors, impl).name == "triton" else eager


def describe() -> list[dict[str, str]]:
    """What `impl="auto"` runs on this machine, per op, and why (behind `prunekit doctor`)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in OPS:
        sample = torch.empty(0, device=device)
        blocker = _triton_blocker(op, [], device)
        choice = Choice("eager", blocker) if blocker else select(op, [sample], "auto")
        rows.append({"op": op, "impl": choice.name, "reason": choice.reason})
    return rows
