"""Which implementation of an op runs for given tensors, and why.

Each op is described once, by an `Op` that its module registers: its kernels by name, the order in
which they are preferred, and how a kernel in inline assembly is tested. An op always has its eager
implementation. There is no silent fallback: `impl="triton"` raises where it cannot run, a kernel
that fails its self-test is warned about, and `describe()` says what `"auto"` would do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Choices and prepared calls that are kept by shape; beyond that many all are made anew.
KEPT = 4096


class Choice(NamedTuple):
    """The implementation that runs, and the reason in one line."""

    name: str
    reason: str


class Problem(NamedTuple):
    """What an implementation is chosen by.

    Attributes:
        device: Where the tensors are.
        dtype: Type of the op's floating-point tensors.
        shape: (M, N, K) of a product; () where the choice does not depend on sizes.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...] = ()


#: M, N, K, compute capability, bytes of a value -> (implementation, reason), preferred first.
Order = Callable[[int, int, int, tuple[int, int], int], Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class Kernel:
    """An implementation of an op beside the eager one.

    Attributes:
        module: The module that has it, imported when it is first used.
        function: Its function there.
        tensor_cores: Whether it is inline assembly for NVIDIA's tensor cores. The module then has
            `CAPABILITIES` and `self_test(device)`, which says what is wrong or returns None; the
            test runs once per process and device, before the kernel is first used.
        types: What a kernel for tensor cores takes.
        needs: Why it has no more than the module's `CAPABILITIES`, in a few words.
    """

    module: str
    function: str
    tensor_cores: bool = False
    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    needs: str = ""

    def load(self) -> ModuleType:
        """The module (imports Triton)."""
        return importlib.import_module(self.module)

    def run(self, *arguments: Any) -> Any:
        """Call the function; tensors among the arguments are on the current device."""
        return getattr(self.load(), self.function)(*arguments)


@dataclass(frozen=True)
class Op:
    """What there is to know about an op's implementations.

    Attributes:
        name: The op's name.
        kernels: Its implementations beside "eager", by name.
        order: The table to choose from on a GPU; None: the first kernel.
        what: What messages call it, such as "2:4 layers".
        eager: What the eager implementation does, for reasons.
        tested: Why a self-test failed, by kernel and device index; None where it passed.
        prepared: Calls that are ready to be launched again, under keys of the op's module.
    """

    name: str
    kernels: Mapping[str, Kernel]
    order: Order | None = None
    what: str = ""
    eager: str = ""
    tested: dict[tuple[str, int], str | None] = field(default_factory=dict, compare=False)
    prepared: dict[Any, Any] = field(default_factory=dict, compare=False)
    _choices: dict[tuple[Problem, str], Choice] = field(default_factory=dict, compare=False)

    @property
    def impls(self) -> tuple[str, ...]:
        """What `impl` may be."""
        return ("auto", "eager", *self.kernels)

    def check_impl(self, impl: str) -> None:
        """Raise ValueError unless `impl` is one of `impls`."""
        if impl not in self.impls:
            raise ValueError(
                f"{self.name}: impl must be one of {', '.join(self.impls)}, got {impl!r}"
            )

    def select(self, problem: Problem, impl: str = "auto") -> Choice:
        """Choose the implementation; what was chosen for a problem is kept.

        "auto" takes kernels on a GPU only: the interpreter is for tests, which ask by name.

        Args:
            problem: What is to be computed, and where.
            impl: One of `impls`.

        Raises:
            ValueError: If `impl` is unknown, or names one that cannot run here, with the reason.
            RuntimeError: If a kernel would have to prove itself while a CUDA graph is captured.
        """
        kept = self._choices.get((problem, impl))
        if kept is None:
            kept = self._select(problem, impl)
            if problem.device.type == "cuda" and recording.untested is None:
                keep(self._choices, (problem, impl), kept)
        return kept

    def _select(self, problem: Problem, impl: str) -> Choice:
        self.check_impl(impl)
        if impl == "eager":
            return Choice("eager", "asked for")
        if impl != "auto":
            blocker = self._blocker(impl, problem)
            if blocker is not None:
                raise ValueError(
                    f"{self.name}: impl={impl!r} cannot run: {blocker}; use impl='auto'"
                )
            return Choice(impl, "asked for")
        if problem.device.type != "cuda":
            first = next(iter(self.kernels), "triton")
            if first not in self.kernels or not triton_installed():
                reason = self._blocker(first, problem) or ""
            elif interpreting():
                reason = "the interpreter is slower; ask for impl='triton' to use it"
            else:
                reason = f"the kernels need a GPU, and this runs on {_place(problem.device)}"
            return Choice("eager", f"{reason}: {self.eager}" if self.eager else reason)
        reasons: list[str] = []
        for name, why in self._preferred(problem):
            blocker = self._blocker(name, problem)
            if blocker is None:
                return Choice(name, "; ".join([why, *reasons]))
            reasons.append(f"not {name}: {blocker}")
        return Choice("eager", "; ".join(reasons))

    def _preferred(self, problem: Problem) -> Sequence[tuple[str, str]]:
        if self.order is None:
            return [(name, "this runs on a GPU") for name in (*self.kernels, "triton")[:1]]
        capability = torch.cuda.get_device_capability(problem.device)
        tokens, rows, columns = problem.shape
        return self.order(tokens, rows, columns, capability, problem.dtype.itemsize)

    def _blocker(self, name: str, problem: Problem) -> str | None:
        """Why an implementation cannot run, or None."""
        if name == "eager":
            return None
        if name not in self.kernels:
            return f"this op has no {name.capitalize()} kernel"
        if not triton_installed():
            return "Triton is not installed"
        kernel, device = self.kernels[name], problem.device
        if not kernel.tensor_cores:
            if device.type != "cuda" and not interpreting():
                return (
                    f"Triton kernels need a GPU, and these tensors are on {_place(device)} "
                    "(TRITON_INTERPRET=1 interprets them, slowly)"
                )
            return None
        if problem.dtype not in kernel.types:
            return f"the tensor cores multiply bfloat16 and float16 values, not {problem.dtype}"
        if device.type != "cuda" or torch.version.cuda is None:
            return "these tensor cores need an NVIDIA GPU"
        if interpreting():
            return "inline assembly cannot be interpreted: unset TRITON_INTERPRET"
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) not in kernel.load().CAPABILITIES:
            why = f" ({kernel.needs})" * bool(kernel.needs)
            return f"no {name} kernel for compute capability {major}.{minor}{why}"
        return self.self_test(device, name)

    def self_test(self, device: torch.device, name: str) -> str | None:
        """Run a kernel's comparison with the eager implementation, once per device.

        Args:
            device: A CUDA device.
            name: One of the kernels in inline assembly.

        Returns:
            None if it agrees, else what went wrong; a failure is also warned about, once.

        Raises:
            RuntimeError: It has not run yet, and a CUDA graph is being captured.
        """
        index = device.index if device.index is not None else torch.cuda.current_device()
        if (name, index) in self.tested:
            return self.tested[name, index]
        if recording.untested is not None:
            recording.untested.append((self.kernels[name], torch.device("cuda", index)))
            return None
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernel {name} of {self.name} is first needed inside the capture of a CUDA "
                "graph, where its self-test cannot run: call prunekernels.warm_up (or "
                "prunekit.warm_up_ for a model) or run the same call once before capturing"
            )
        problem: str | None
        try:
            with torch.cuda.device(index):
                problem = self.kernels[name].load().self_test(device)
        except Exception as error:  # a compiler or driver error must not take the model down
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        self.tested[name, index] = problem
        if problem is not None:
            warnings.warn(
                f"prunekernels: the kernel {name} of {self.name} failed its self-test on {device} "
                f"({problem}); {self.what or self.name} use slower implementations on this device. "
                "Please report it.",
                RuntimeWarning,
                stacklevel=2,
            )
        return problem

    def forget(self) -> None:
        """Make choices and prepared calls anew, as after a change of the tables."""
        self._choices.clear()
        self.prepared.clear()

    def describe(self) -> list[dict[str, str]]:
        """What "auto" runs on this machine, and why (runs self-tests on a GPU)."""
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if self.order is None or device.type == "cpu":
            choice = self.select(Problem(device, torch.bfloat16, (1, 4096, 4096)))
            return [{"op": self.name, "impl": choice.name, "reason": choice.reason}]
        rows = []
        for tokens in (1, 4096):
            choice = self.select(Problem(device, torch.bfloat16, (tokens, 4096, 4096)))
            name = f"{self.name}, {tokens} token{'s' * (tokens > 1)}"
            rows.append({"op": name, "impl": choice.name, "reason": choice.reason})
        return rows


_OPS: dict[str, Op] = {}


class _Recording(threading.local):
    """What a thread collects while it records launches instead of running them; None otherwise.

    Attributes:
        launches: The launches.
        untested: Kernels that still have to prove themselves, and where. They count as proven.
    """

    launches: list[Any] | None = None
    untested: list[tuple[Kernel, torch.device]] | None = None


recording = _Recording()


def register(*ops: Op) -> None:
    """Make ops known: each module registers its own.

    Raises:
        ValueError: An op of that name is known already.
    """
    for op in ops:
        if op.name in _OPS:
            raise ValueError(f"an op {op.name!r} is registered already; give this one its own name")
        _OPS[op.name] = op


def known(name: str) -> Op:
    """The op of that name."""
    return _OPS[name]


def ops() -> dict[str, Op]:
    """Every op of the package by its name, in alphabetical order."""
    return dict(sorted(_OPS.items()))


def run(op: str, eager: Callable[..., Any], tensors: Sequence[Tensor], impl: str) -> Any:
    """The callable that `impl` picks for an op whose choice does not depend on sizes.

    Args:
        op: The op's name.
        eager: Its eager implementation.
        tensors: Its tensors; the first one's device decides.
        impl: As in `Op.select`.
    """
    known, first = _OPS[op], tensors[0]
    choice = known.select(Problem(first.device, first.dtype), impl)
    return eager if choice.name == "eager" else known.kernels[choice.name].run


def check_impl(impl: str, *more: str) -> None:
    """Raise ValueError unless `impl` is one that every op without a table has, or one of `more`."""
    known = ("auto", "eager", "triton", *more)
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")


def describe() -> list[dict[str, str]]:
    """What `impl="auto"` runs on this machine, per op, and why (behind `prunekit doctor`)."""
    return [row for op in ops().values() for row in op.describe()]


@functools.cache
def triton_installed() -> bool:
    """Whether the Triton package can be found (it is not imported)."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def _place(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else device.type


def interpreting() -> bool:
    """Whether Triton kernels run in its NumPy interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one while kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def plain(*tensors: Tensor | None) -> bool:
    """Whether an op may compute these tensors at once, without its custom-op wrapper.

    The wrapper serves tracing (`torch.compile`, `export`, `make_fx`), fake tensors, functorch and
    autograd; it costs several times what a launch costs. None of them is at work if the tensors are
    plain, need no gradient, and no mode of torch is active.
    """
    if (
        _compiling()
        or _tracing() is not None
        or _dispatch_modes()
        or _function_modes()
        or forward_ad._current_level >= 0
        or _transforms() is not None
    ):
        return False
    gradients = _gradients()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or (gradients and tensor.requires_grad):
            return False
    return True


# found once: this is asked at every call
_PLAIN = {Tensor, torch.nn.Parameter}
_compiling = torch.compiler.is_dynamo_compiling  # exporting otherwise has a mode
_tracing, _gradients = torch._C._get_tracing_state, torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep what was found for a shape; forget all when `KEPT` are held (lengths may never end)."""
    if len(kept) >= KEPT:
        kept.clear()
    kept[key] = value
