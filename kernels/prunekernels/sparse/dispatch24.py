"""Which implementation multiplies with a packed 2:4 weight, and why.

`eager` expands the weight and multiplies densely; `triton` is the portable kernel; `mma_sp` uses
NVIDIA's sparse tensor cores through inline assembly and is therefore compared once per process and
device with the expanded weight before it is first used. If that comparison fails, a warning says
so and `auto` keeps to the other implementations for the rest of the process.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunekernels.runtime import Choice, interpreting, triton_installed
from prunekernels.sparse.format24 import sparse24_unpack
from prunekernels.tuning import sparse24_order, sparse24_speedup

IMPLS = ("auto", "eager", "triton", "mma_sp")
_MODULES = {
    "triton": "prunekernels.sparse.portable24",
    "mma_sp": "prunekernels.sparse.mma24",
}

#: Why the self-test failed, by device index; None where it passed.
_tested: dict[int, str | None] = {}


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")


def kernel(name: str) -> ModuleType:
    """The module whose `forward` implements "triton" or "mma_sp" (imports Triton)."""
    return importlib.import_module(_MODULES[name])


def forward(name: str, x: Tensor, *arguments: Any) -> Tensor:
    """Run "triton" or "mma_sp" on the device of x."""
    module = kernel(name)
    if x.device.type != "cuda":
        return module.forward(x, *arguments)
    # Triton launches on the current device
    with torch.cuda.device(x.device):
        return module.forward(x, *arguments)


def expand(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight, by the expanding kernel on a GPU that Triton can use."""
    if packed.device.type != "cuda" or not triton_installed() or interpreting():
        return sparse24_unpack(packed, rows, columns, dtype)
    with torch.cuda.device(packed.device):
        return kernel("triton").expand(packed, rows, columns, dtype)


def select(x: Tensor, rows: int, impl: str = "auto") -> Choice:
    """Choose the implementation for these activations.

    Args:
        x: (M, K) activations.
        rows: N, the weight's rows.
        impl: One of `IMPLS`.

    Returns:
        The name ("eager", "triton" or "mma_sp") and the reason.

    Raises:
        ValueError: If `impl` names one that cannot run here, with the reason.
    """
    check_impl(impl)
    if impl != "auto":
        blocker = _blocker(impl, x)
        if blocker is not None:
            raise ValueError(f"impl={impl!r} cannot run: {blocker}; use impl='auto'")
        return Choice(impl, "asked for")
    if x.device.type != "cuda":
        return Choice("eager", f"tensors are on {x.device.type}: expanded for each call")
    capability = torch.cuda.get_device_capability(x.device)
    reasons: list[str] = []
    for name, why in sparse24_order(x.shape[0], rows, x.shape[1], capability, x.dtype.itemsize):
        blocker = _blocker(name, x)
        if blocker is None:
            return Choice(name, "; ".join([why, *reasons]))
        reasons.append(f"not {name}: {blocker}")
    return Choice("eager", "; ".join(reasons))


class Expected(NamedTuple):
    """What a 2:4 layer is expected to gain over the dense one.

    Attributes:
        speedup: Time of the dense layer over that of the packed one; predicted, not measured.
        impl: The implementation that runs.
        reason: Why, in one line.
    """

    speedup: float
    impl: str
    reason: str


def sparse24_expected(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str
) -> Expected:
    """Whether a packed layer pays on a device (on a GPU, runs the self-test the first time).

    Args:
        tokens: M, the tokens of a call.
        rows: N.
        columns: K.
        dtype: Type of the values.
        device: Where the layer runs.

    Returns:
        The expected speed-up, the implementation and the reason.
    """
    choice = select(torch.empty((tokens, columns), dtype=dtype, device=device), rows)
    speedup = sparse24_speedup(choice.name, tokens, rows, columns, dtype.itemsize)
    return Expected(speedup, choice.name, choice.reason)


def describe() -> list[dict[str, str]]:
    """What `impl="auto"` runs here for one token and for many, and why (runs the self-test)."""
    if not torch.cuda.is_available():
        reason = "no GPU: the weight is expanded for each call, smaller in memory but not faster"
        return [{"op": "sparse24_linear", "impl": "eager", "reason": reason}]
    rows = []
    for tokens in (1, 4096):
        choice = select(torch.empty((tokens, 4096), dtype=torch.bfloat16, device="cuda"), 4096)
        name = f"sparse24_linear, {tokens} token{'s' * (tokens > 1)}"
        rows.append({"op": name, "impl": choice.name, "reason": choice.reason})
    return rows


def _blocker(name: str, x: Tensor) -> str | None:
    """Why an implementation cannot take these activations, or None."""
    if name == "eager":
        return None
    if not triton_installed():
        return "Triton is not installed"
    if name == "triton":
        if x.device.type != "cuda" and not interpreting():
            return f"tensors are on {x.device.type} and TRITON_INTERPRET=1 is not set"
        return None
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"sparse tensor cores multiply bfloat16 and float16 values, not {x.dtype}"
    if x.device.type != "cuda" or torch.version.cuda is None:
        return "sparse tensor cores need an NVIDIA GPU"
    if interpreting():
        return "inline assembly cannot be interpreted: unset TRITON_INTERPRET"
    major, minor = torch.cuda.get_device_capability(x.device)
    if (major, minor) not in kernel("mma_sp").CAPABILITIES:
        return f"no mma.sp kernel for compute capability {major}.{minor}"
    return self_test(x.device)


def self_test(device: torch.device) -> str | None:
    """Compare the inline-assembly kernel with the expanded weight, once per process and device.

    Args:
        device: A CUDA device.

    Returns:
        None if it agrees, else what went wrong; a failure is also warned about, once.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index in _tested:
        return _tested[index]
    if torch.cuda.is_current_stream_capturing():
        return "the self-test cannot run during graph capture: call the layer once before"
    try:
        with torch.cuda.device(index):
            problem = kernel("mma_sp").self_test(device)
    except Exception as error:  # a compiler or driver error must not take the model down
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    _tested[index] = problem
    if problem is not None:
        warnings.warn(
            f"prunekernels: the 2:4 tensor-core kernel failed its self-test on {device} "
            f"({problem}); 2:4 layers use slower implementations on this device. Please report it.",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem
