"""What the packed linear layers have in common: the way to a kernel, gradients, and the checks.

`eager` expands the weight and multiplies densely; `triton` is the portable kernel; others use
NVIDIA's tensor cores through inline assembly. A call whose shapes, types and devices were seen
before is launched at once, with addresses alone (`launching.prepared_run`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekernels import runtime
from prunekernels.runtime import (
    Op,
    Problem,
    capability,
    interpreting,
    keep,
    on,
    triton_installed,
)
from prunekernels.sparse.tuning import packed_speedup, was_measured

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def slope(activation: str, z: Tensor) -> Tensor:
    """Derivative of an activation at z, through ATen's own backward functions."""
    one = torch.ones_like(z)
    if activation == "silu":
        return torch.ops.aten.silu_backward(one, z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    kind = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(one, z, approximate=kind)


def gradients(
    ctx: Any, grad: Tensor, x: Tensor | None, dense: Tensor, bias: Tensor | None, bias_index: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of act(x·Wᵀ + b) for x and b; x may be None where there is no activation.

    Args:
        ctx: The op's context, with `activation`.
        grad: (..., N).
        x: (..., K).
        dense: (N, K) the expanded weight.
        bias: (N,) or None.
        bias_index: The op's argument that is the bias.
    """
    if ctx.activation != "none":
        assert x is not None
        grad = grad * slope(ctx.activation, F.linear(x, dense, bias))
    dx = grad @ dense if ctx.needs_input_grad[0] else None
    dbias = None
    if ctx.needs_input_grad[bias_index]:
        dbias = grad.reshape(-1, dense.shape[0]).sum(0)
    return dx, dbias


def gated_gradient(grad: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Gradient of SiLU(x·Wgᵀ)·(x·Wuᵀ) for x (..., K), with the expanded weights (N, K)."""
    z = F.linear(x, gate)
    dx = (grad * F.linear(x, up) * slope("silu", z)) @ gate
    return dx + (grad * F.silu(z)) @ up


def expands_by_kernel(packed: Tensor) -> bool:
    """Whether a kernel expands a weight: on a GPU that Triton can use, outside its interpreter."""
    return packed.device.type == "cuda" and triton_installed() and not interpreting()


_Weight = TypeVar("_Weight")
#: x, gate, up -> SiLU(x·Wgᵀ)·(x·Wuᵀ), for two weights of one format.
GateUp = Callable[[Tensor, Any, Any], Tensor]


class Expected(NamedTuple):
    """What a packed layer is expected to gain over the dense one.

    Attributes:
        speedup: Time of the dense layer over that of the packed one.
        impl: The implementation that runs.
        reason: Why, in one line.
        measured: Whether the speed-up was measured on this kind of GPU; else it is predicted.
    """

    speedup: float
    impl: str
    reason: str
    measured: bool = False


class PackedWeight(Protocol):
    """What the weight classes of all formats have: a format is one class that fits this.

    Attributes:
        format: Name of the format in reports and checkpoints.
        row_multiple: What the rows of all but the last weight given to `cat` are a multiple of.
        gate_up: SiLU(x·Wgᵀ)·(x·Wuᵀ) in one kernel; None: gate and up are stacked.
        exact: Whether `pack` keeps every value. What rounds is only used where it is asked for.
    """

    format: ClassVar[str]
    row_multiple: ClassVar[int]
    gate_up: ClassVar[GateUp | None]
    exact: ClassVar[bool]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""

    @classmethod
    def pack(cls, weight: Tensor) -> Self:
        """Pack a dense (N, K) weight, or raise ValueError if it does not fit the format."""

    def to_dense(self) -> Tensor:
        """A new dense (N, K) tensor."""

    def kept_values(self) -> list[Tensor]:
        """Tensors that hold every value which is not zero (sharing memory)."""

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """On another device, or with other values (rounded)."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, with a `header` that says version, shape and type."""

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The weight from its `state_dict()`; ValueError if that is not valid."""

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        """The weight from the tensors of a `state_dict()` that is known to be valid, unchecked."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x·Wᵀ + bias, differentiable in x and bias."""

    def expected(self, tokens: int) -> Expected:
        """What a layer with this weight gains over the dense one at `tokens` tokens a call."""

    @classmethod
    def cat(cls, weights: Sequence[Self]) -> Self:
        """The weights stacked along their rows, in new tensors."""

    def split(self, rows: Sequence[int]) -> list[Self]:
        """Undo `cat`: weights that may share memory with this one, but not with each other."""


def unchecked(kind: type[_Weight], **fields: Any) -> _Weight:
    """An object of a frozen dataclass whose fields are known to be valid, made in a microsecond."""
    if torch.compiler.is_dynamo_compiling():
        return kind(**fields)
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    return made


def problem_of(x: Tensor, rows: int) -> Problem:
    """What the implementation for x (M, K) and N = rows is chosen by."""
    return Problem(x.device, x.dtype, (x.shape[0], rows, x.shape[1]))


def expected_of(op: Op, tokens: int, w: PackedWeight) -> Expected:
    """What a layer with the packed weight `w` gains at `tokens` tokens a call, where it is."""
    rows, columns = w.shape
    choice = op.select(Problem(w.device, w.dtype, (tokens, rows, columns)))
    dense = rows * columns * w.dtype.itemsize
    sizes = tokens, dense, w.nbytes, w.format
    if w.device.type == "cuda":
        gpu = torch.cuda.get_device_name(w.device)
        speedup = packed_speedup(choice.name, *sizes, capability(w.device), gpu)
        measured = was_measured(choice.name, tokens, dense, gpu)
        return Expected(speedup, *choice, measured=measured)
    return Expected(packed_speedup(choice.name, *sizes), *choice)


class Calls:
    """Calls of one op by the shapes, types and devices of what they multiply.

    Attributes:
        op: The op that chooses the implementation.
    """

    def __init__(self, op: Op) -> None:
        self.op = op

    def again(self, key: Any, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> Any:
        """The result, if this call was prepared under the key; None if it must be made anew."""
        run = self.op.prepared.get(key)
        if run is None or not x.is_contiguous():
            return None
        return run(x, weight, bias)

    def run(
        self, x: Tensor, rows: int, impl: str, arguments: Sequence[Any], key: Any = None
    ) -> Any:
        """y (M, N) by a kernel, or None where the weight is to be expanded.

        Args:
            x: (M, K).
            rows: N.
            impl: As the layer's.
            arguments: Further arguments of the kernel's function.
            key: Where to prepare the call for the next time; (shape of x, …). None: nowhere.
        """
        choice = self.op.select(problem_of(x, rows), impl)
        if choice.name == "eager" or x.shape[0] == 0:
            return None
        kernel = self.op.kernels[choice.name]
        with on(x):
            prepare = getattr(kernel.load(), "prepared", None)
            prepares = key is not None and runtime.recording.untested is None
            if prepares and prepare is not None and x.is_contiguous():
                call = prepare(x, *arguments)
                if call is not None:
                    from prunekernels.sparse.launching import prepared_run

                    keep(self.op.prepared, key, prepared_run(call, (*key[0][:-1], rows)))
            return kernel.run(x, *arguments)


def call_key(x: Tensor, w: Any, device: torch.device, bias: Tensor | None, *rest: Any) -> Any:
    """What a prepared call depends on, and what the checks look at; the shape of x comes first."""
    if x is None:
        check_tensor("x", x)
    if bias is None:
        return x.shape, x.dtype, x.device, w.shape, w.dtype, device, None, rest
    bias_key = bias.shape, bias.dtype, bias.device
    return x.shape, x.dtype, x.device, w.shape, w.dtype, device, bias_key, rest


def check_tensor(name: str, given: object) -> None:
    """Raise ValueError unless `given`, the argument `name`, is a tensor."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(given).__name__}")


def check_packed(w: Any, kinds: Collection[str], pack: str, name: str = "w") -> None:
    """Raise ValueError unless w, the argument `name`, is packed as one of `kinds` (by `pack`)."""
    held = getattr(w, "format", None)
    if held not in kinds:
        given = held if isinstance(held, str) else type(w).__name__
        raise ValueError(
            f"{name} must be a weight packed as {' or '.join(kinds)}, not {given}: pack it with "
            f"{pack}"
        )


def check_input(x: Tensor, w: Any, kind: str, pack: str, name: str = "w") -> None:
    """Raise ValueError unless w is packed in the format `kind` (by `pack`) and x fits it."""
    check_packed(w, (kind,), pack, name)
    check_tensor("x", x)
    packed: Any = w
    if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not end in the {packed.shape[1]} columns of {name}, "
            f"whose shape is {tuple(packed.shape)}"
        )
    if x.dtype != packed.dtype:
        raise ValueError(
            f"x is {x.dtype} and {name} {packed.dtype}: convert one, for example "
            f"x.to({packed.dtype})"
        )
    if x.device != packed.device:
        raise ValueError(
            f"x is on {x.device} and {name} on {packed.device}: move it with .to({str(x.device)!r})"
        )


def check_gated(op: str, x: Tensor, gate: Any, up: Any, kind: str, pack: str) -> None:
    """Raise ValueError unless gate and up are packed in the format `kind`, alike, and x fits."""
    check_input(x, gate, kind, pack, "gate")
    check_input(x, up, kind, pack, "up")
    if gate.shape != up.shape:
        raise ValueError(
            f"{op}: gate and up must have the same shape, not {tuple(gate.shape)} and "
            f"{tuple(up.shape)}"
        )


def check_epilogue(
    op: str, x: Tensor, shape: tuple[int, int], bias: Tensor | None, activation: str | None
) -> str:
    """Raise ValueError unless bias and activation fit a weight of this shape; returns its name."""
    if bias is not None:
        check_tensor(f"{op}: bias", bias)
        if tuple(bias.shape) != (shape[0],):
            raise ValueError(
                f"{op}: bias must have shape ({shape[0]},) for a weight of shape {tuple(shape)}, "
                f"not {tuple(bias.shape)}"
            )
        if bias.dtype != x.dtype or bias.device != x.device:
            raise ValueError(
                f"{op}: bias is {bias.dtype} on {bias.device} and x {x.dtype} on {x.device}; move "
                "it with bias.to(x)"
            )
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}")
    return name
