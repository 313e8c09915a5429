"""Which implementation multiplies with a packed weight, and why: the same for every format.

`eager` expands the weight and multiplies densely; `triton` is the portable kernel; a third one uses
NVIDIA's tensor cores through inline assembly and is therefore compared once per process and device
with the expanded weight before it is first used. If that comparison fails, a warning says so and
`auto` keeps to the other implementations for the rest of the process.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunekernels.runtime import Choice, interpreting, triton_installed
from prunekernels.sparse.tuning import packed_speedup

#: tokens, rows, columns, capability, itemsize -> (implementation, reason), preferred first.
Order = Callable[[int, int, int, tuple[int, int], int], list[tuple[str, str]]]


class Expected(NamedTuple):
    """What a packed layer is expected to gain over the dense one.

    Attributes:
        speedup: Time of the dense layer over that of the packed one; predicted, not measured.
        impl: The implementation that runs.
        reason: Why, in one line.
    """

    speedup: float
    impl: str
    reason: str


@dataclass(frozen=True)
class Dispatch:
    """The implementations of one format's linear layer.

    Attributes:
        op: The layer's name.
        what: The format, as messages call it.
        modules: Modules whose `forward` implements "triton" and the tensor cores' name.
        tensor_cores: Name of the implementation in inline assembly; its module has `CAPABILITIES`
            and `self_test(device)`.
        order: The table to choose from.
        unproven: Names of others like it that only run when asked for by name.
        tested: Why the self-test failed, by name and device index; None where it passed.
    """

    op: str
    what: str
    modules: dict[str, str]
    tensor_cores: str
    order: Order
    unproven: tuple[str, ...] = ()
    tested: dict[tuple[str, int], str | None] = field(default_factory=dict)

    @property
    def impls(self) -> tuple[str, ...]:
        """What `impl` may be."""
        return ("auto", "eager", *self.modules)

    def check_impl(self, impl: str) -> None:
        """Raise ValueError unless `impl` is one of `impls`."""
        if impl not in self.impls:
            raise ValueError(f"impl must be one of {', '.join(self.impls)}, not {impl!r}")

    def kernel(self, name: str) -> ModuleType:
        """The module of an implementation (imports Triton)."""
        return importlib.import_module(self.modules[name])

    def call(self, name: str, function: str, device: torch.device, *arguments: Any) -> Any:
        """Call a function of an implementation's module on a device."""
        run = getattr(self.kernel(name), function)
        if device.type != "cuda":
            return run(*arguments)
        # Triton launches on the current device
        with torch.cuda.device(device):
            return run(*arguments)

    def select(self, x: Tensor, rows: int, impl: str = "auto") -> Choice:
        """Choose the implementation for these activations.

        Args:
            x: (M, K) activations.
            rows: N, the weight's rows.
            impl: One of `impls`.

        Returns:
            The name and the reason.

        Raises:
            ValueError: If `impl` names one that cannot run here, with the reason.
        """
        self.check_impl(impl)
        if impl != "auto":
            blocker = self._blocker(impl, x)
            if blocker is not None:
                raise ValueError(f"impl={impl!r} cannot run: {blocker}; use impl='auto'")
            return Choice(impl, "asked for")
        if x.device.type != "cuda":
            return Choice("eager", f"tensors are on {x.device.type}: expanded for each call")
        capability = torch.cuda.get_device_capability(x.device)
        reasons: list[str] = []
        for name, why in self.order(x.shape[0], rows, x.shape[1], capability, x.dtype.itemsize):
            blocker = self._blocker(name, x)
            if blocker is None:
                return Choice(name, "; ".join([why, *reasons]))
            reasons.append(f"not {name}: {blocker}")
        return Choice("eager", "; ".join(reasons))

    def expected(self, tokens: int, w: Any) -> Expected:
        """What a layer with the packed weight `w` gains at `tokens` tokens a call, where it is."""
        rows, columns = w.shape
        x = torch.empty((tokens, columns), dtype=w.dtype, device=w.device)
        choice = self.select(x, rows)
        dense = rows * columns * w.dtype.itemsize
        speedup = packed_speedup(choice.name, tokens, dense, w.nbytes, self.what)
        return Expected(speedup, *choice)

    def describe(self) -> list[dict[str, str]]:
        """What `auto` runs here for one token and for many, and why (runs the self-test)."""
        if not torch.cuda.is_available():
            reason = (
                "no GPU: the weight is expanded for each call, smaller in memory but not faster"
            )
            return [{"op": self.op, "impl": "eager", "reason": reason}]
        rows = []
        for tokens in (1, 4096):
            x = torch.empty((tokens, 4096), dtype=torch.bfloat16, device="cuda")
            choice = self.select(x, 4096)
            name = f"{self.op}, {tokens} token{'s' * (tokens > 1)}"
            rows.append({"op": name, "impl": choice.name, "reason": choice.reason})
        return rows

    def _blocker(self, name: str, x: Tensor) -> str | None:
        """Why an implementation cannot take these activations, or None."""
        if name == "eager":
            return None
        if not triton_installed():
            return "Triton is not installed"
        if name not in (self.tensor_cores, *self.unproven):
            if x.device.type != "cuda" and not interpreting():
                return f"tensors are on {x.device.type} and TRITON_INTERPRET=1 is not set"
            return None
        if x.dtype not in (torch.bfloat16, torch.float16):
            return f"the tensor cores multiply bfloat16 and float16 values, not {x.dtype}"
        if x.device.type != "cuda" or torch.version.cuda is None:
            return "these tensor cores need an NVIDIA GPU"
        if interpreting():
            return "inline assembly cannot be interpreted: unset TRITON_INTERPRET"
        major, minor = torch.cuda.get_device_capability(x.device)
        if (major, minor) not in self.kernel(name).CAPABILITIES:
            return f"no {name} kernel for compute capability {major}.{minor}"
        return self.self_test(x.device, name)

    def self_test(self, device: torch.device, name: str | None = None) -> str | None:
        """Compare an inline-assembly kernel with the expanded weight, once per device.

        Args:
            device: A CUDA device.
            name: Its implementation; `tensor_cores` by default.

        Returns:
            None if it agrees, else what went wrong; a failure is also warned about, once.
        """
        index = device.index if device.index is not None else torch.cuda.current_device()
        key = (name or self.tensor_cores, index)
        problem: str | None
        if key in self.tested:
            return self.tested[key]
        if torch.cuda.is_current_stream_capturing():
            problem = "the self-test cannot run during graph capture: call the layer once before"
            warnings.warn(
                f"prunekernels: {self.what} layers are captured with slower implementations: "
                f"{problem}",
                RuntimeWarning,
                stacklevel=2,
            )
            return problem
        try:
            with torch.cuda.device(index):
                problem = self.kernel(key[0]).self_test(device)
        except Exception as error:  # a compiler or driver error must not take the model down
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        self.tested[key] = problem
        if problem is not None:
            warnings.warn(
                f"prunekernels: the {self.what} tensor-core kernel failed its self-test on "
                f"{device} ({problem}); {self.what} layers use slower implementations on this "
                "device. Please report it.",
                RuntimeWarning,
                stacklevel=2,
            )
        return problem
