"""Calls of kernels: run, bound to addresses, compiled as cases, or recorded."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekernels.compilation import Arch, KernelCase
from prunekernels.runtime import interpreting, on, recording

#: Compiled kernels: (kernel's id, device, options) -> (specialisation -> compiled kernel).
_compiled: dict[tuple[Any, ...], dict[tuple[Any, ...], Any]] = {}
# Triton's function that says how the arguments of a kernel specialise it, by the kernel's id. The
# kernel is kept, so that no other one takes its id.
_binders: dict[int, tuple[Any, Callable[..., Any]]] = {}


def _without_cuda(*_: int) -> int:
    raise RuntimeError("this build of torch has no CUDA")


#: Handle of the current stream of a CUDA device, and index of the current device.
current_stream: Callable[[int], int]
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _without_cuda)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _without_cuda)


class Launch:
    """One call of a Triton or Gluon kernel.

    Attributes:
        kernel: The `@triton.jit` or `@gluon.jit` function.
        grid: Programs in each of up to three directions.
        arguments: Values of the parameters that are not constants, in the kernel's order; tensors
            and None come first.
        constants: Values of its `constexpr` parameters, by name.
        num_warps: Warps per program.
        num_stages: Software pipelining depth (plain Triton; None: Triton's default).
        options: Further options of the compiler.
    """

    __slots__ = ("arguments", "constants", "grid", "kernel", "num_stages", "num_warps", "options")

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        *,
        num_warps: int = 4,
        num_stages: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.arguments = arguments
        self.constants = constants
        self.num_warps = num_warps
        self.num_stages = num_stages
        self.options = options

    def run(self) -> None:
        """Launch it on the device of its tensors, or run it in Triton's interpreter.

        Raises:
            RuntimeError: The kernel is not compiled yet, and a CUDA graph is being captured.
        """
        if recording.launches is not None:
            recording.launches.append(self)
            return
        if interpreting():
            self._call()
            return
        device = self.device
        if device.type == "cuda" and device.index == torch.cuda.current_device():
            self._run(device.index)
            return
        with on(self.first):
            self._run(torch.cuda.current_device())

    def bind(self) -> Bound:
        """The compiled kernel with everything but its tensors' addresses (launches nothing).

        Raises:
            RuntimeError: The kernel is not compiled yet, and a CUDA graph is being captured.
        """
        with on(self.first):
            device = torch.cuda.current_device()
            specialisation = self.specialisation()
            compiled = self.compiled(device, specialisation)
            if compiled is None:
                compiled = self._compile(device, specialisation, warmup=True)
        return Bound(self, device, compiled, specialisation)

    def case(
        self,
        name: str,
        *,
        opcodes: Sequence[str] = (),
        elements_per_iteration: int = 0,
        per_iteration: tuple[str, int] | None = None,
        rare: str = "",
        archs: Sequence[Arch] = (80, 89, 90),
    ) -> KernelCase:
        """This call as something to compile without a GPU; see `KernelCase` for the arguments.

        The signature, what is divisible by 16 and the constants (None and 1 among them) are those
        that the launch of these arguments would be compiled for. An interpreted kernel has none.
        """
        signature, constants, divisible = {}, dict(self.constants), []
        if _is_compiled(self.kernel):
            constants = {}
            kinds = self.specialisation()
            for parameter, (kind, detail) in zip(self.kernel.arg_names, kinds, strict=True):
                if kind == "constexpr":
                    constants[parameter] = detail
                    continue
                signature[parameter] = kind
                if isinstance(detail, str) and "D" in detail:
                    divisible.append(parameter)
        return KernelCase(
            name=name,
            kernel=self.kernel,
            signature=signature,
            constants=constants,
            num_warps=self.num_warps,
            num_stages=3 if self.num_stages is None else self.num_stages,
            options=dict(self.options or {}),
            divisible=tuple(divisible),
            opcodes=opcodes,
            elements_per_iteration=elements_per_iteration,
            per_iteration=per_iteration,
            rare=rare,
            archs=archs,
        )

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.first.device

    @property
    def first(self) -> Tensor:
        """Its first tensor, which says where it runs."""
        return next(value for value in self.arguments if isinstance(value, Tensor))

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Warps, stages and further options, as Triton names them."""
        options = {"num_warps": self.num_warps, **(self.options or {})}
        if self.num_stages is not None:
            options["num_stages"] = self.num_stages
        return options

    def _call(self) -> Any:
        """Launch through Triton's own path."""
        return self.kernel[self.grid](*self.arguments, **self.constants, **self.compiler_options)

    def _run(self, device: int) -> None:
        if torch.version.hip is not None or _observed(self.kernel):
            self._call()
            return
        specialisation = self.specialisation()
        compiled = self.compiled(device, specialisation)
        if compiled is None:
            self._compile(device, specialisation, warmup=False)
            return
        Bound(self, device, compiled, specialisation).launch(
            *(
                value.data_ptr() if isinstance(value, Tensor) else value
                for value in self.arguments[: _tensors(self.arguments)]
            )
        )

    def specialisation(self) -> tuple[Any, ...]:
        """(type, detail) of every parameter, as Triton distinguishes compiled kernels by it."""
        return tuple(self.binder(*self.arguments, **self.constants)[1])

    @property
    def binder(self) -> Callable[..., Any]:
        """Triton's function from arguments to (parameters, specialisation, options)."""
        known = _binders.get(id(self.kernel))
        if known is None:
            known = _binders[id(self.kernel)] = (self.kernel, _binder(self.kernel))
        return known[1]

    def key(self, device: int) -> tuple[Any, ...]:
        """What a compiled kernel depends on beside the specialisation."""
        options = tuple((self.options or {}).items())
        return id(self.kernel), device, self.num_warps, self.num_stages, options

    def compiled(self, device: int, specialisation: tuple[Any, ...]) -> Any:
        """The compiled kernel, or None if there is none yet on the device."""
        return _compiled.get(self.key(device), {}).get(specialisation)

    def _compile(self, device: int, specialisation: tuple[Any, ...], *, warmup: bool) -> Any:
        """Compile, load and keep the kernel; without `warmup` this also launches it."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernel {self.kernel.fn.__name__} is first needed inside the capture of a "
                "CUDA graph, where it cannot be compiled: call prunekernels.warm_up (or "
                "prunekit.warm_up_ for a model) or run the same call once before capturing"
            )
        if warmup:
            compiled = self.kernel.run(
                *self.arguments,
                grid=self.grid,
                warmup=True,
                **self.constants,
                **self.compiler_options,
            )
        else:
            compiled = self._call()
        # an asynchronous compilation is waited for
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        compiled._init_handles()
        _compiled.setdefault(self.key(device), {})[specialisation] = compiled
        return compiled


class UnalignedError(ValueError):
    """A bound launch got a tensor that is less aligned than the one that it was bound to."""


class Bound:
    """A compiled kernel, its grid and its arguments but for the addresses of its tensors.

    Attributes:
        start: `launch` on a stream of its device, which is the current one: takes the stream and
            the addresses, which are unchecked.
    """

    __slots__ = ("_checked", "_device", "_kernel", "start")

    def __init__(
        self, launch: Launch, device: int, compiled: Any, specialisation: tuple[Any, ...]
    ) -> None:
        tensors = _tensors(launch.arguments)
        constants = launch.constants
        rest = iter(launch.arguments[tensors:])
        values = tuple(
            constants[name] if name in constants else next(rest)
            for name in launch.kernel.arg_names[tensors:]
        )
        aligned = [i for i in range(tensors) if "D" in str(specialisation[i][1] or "")]
        # a getter of one item gives the item itself
        self._checked = operator.itemgetter(*aligned, aligned[-1]) if aligned else _none
        self._kernel, self._device = launch.kernel, device
        self.start = _starter(compiled, launch.grid, values)

    def launch(self, *addresses: int | None) -> None:
        """Launch on the current stream of its device.

        Args:
            addresses: `data_ptr()` of the tensors that the launch was built from, in its order;
                None where it had None.

        Raises:
            UnalignedError: A tensor that was aligned to 16 bytes no longer is.
        """
        joined = 0
        for address in self._checked(addresses):
            joined |= address
        if joined & 15:
            raise UnalignedError(
                f"{self._kernel.fn.__name__} was bound to tensors aligned to 16 bytes, and one of "
                f"{addresses} is not: bind the launch of these tensors"
            )
        if current_device() == self._device:
            self.start(current_stream(self._device), *addresses)
            return
        with torch.cuda.device(self._device):
            self.start(current_stream(self._device), *addresses)


def _starter(compiled: Any, grid: tuple[int, ...], values: tuple[Any, ...]) -> Callable[..., None]:
    """`Bound.start`: a function that has all it needs at hand, as it runs once for every launch."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = grid

    def start(stream: int, *addresses: int | None) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *addresses, *values)

    return start


def allocator(shape: Sequence[int], like: Tensor) -> Callable[[], Tensor]:
    """What makes a new contiguous tensor of the shape, with the type and device of `like`.

    The device has to be the current one when it is called. What torch's compiled graphs allocate
    with takes half the time of `torch.empty`, as it passes no dispatcher: it is there on CPUs and
    CUDA devices.
    """
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{like.device.type}", None)
    if quick is None:
        # reads its arguments in a third of the time that `empty` takes
        seen = like.new_empty(1).expand(shape)
        return functools.partial(torch.empty_like, seen, memory_format=torch.contiguous_format)
    strides = meta(shape, like.dtype).stride()
    return functools.partial(quick, tuple(shape), strides, like.dtype)


def meta(shape: Sequence[int], dtype: torch.dtype, *, aligned: bool = True) -> Tensor:
    """A contiguous tensor without memory, for a case; not `aligned`, one element past 16 bytes."""
    if aligned:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")
    return torch.empty(math.prod(shape) + 1, dtype=dtype, device="meta")[1:].view(*shape)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches that this thread makes in the block, instead of running them.

    Kernels that have not proven themselves yet count as proven; nothing that is chosen is kept.
    """
    before = recording.launches, recording.untested
    launches: list[Launch] = []
    recording.launches, recording.untested = launches, []
    try:
        yield launches
    finally:
        recording.launches, recording.untested = before


def _none(addresses: Sequence[Any]) -> tuple[int, ...]:
    return ()


def _tensors(arguments: Sequence[Any]) -> int:
    """How many of the arguments, from the first on, are tensors or None."""
    count = 0
    for value in arguments:
        if value is not None and not isinstance(value, Tensor):
            break
        count += 1
    return count


def _is_compiled(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(kernel, JITFunction)


def _binder(kernel: Any) -> Callable[..., Any]:
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import create_function_from_signature

    # the base's rules are those of NVIDIA's back end
    binder: Callable[..., Any] = create_function_from_signature(
        kernel.signature, kernel.params, BaseBackend
    )
    return binder


def _observed(kernel: Any) -> bool:
    """Whether a profiler or a debugger has hooked itself into Triton's launches."""
    from triton import knobs

    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        kernel.pre_run_hooks
        or any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
        or knobs.runtime.add_stages_inspection_hook is not None
    )
