"""Validation shared by the public ops: one-line ValueErrors that name both values.

What depends on shapes, dtypes and devices is checked before the op (and can be traced); what
depends on the values inside a tensor is checked within it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def floats(op: str, **tensors: Tensor | None) -> None:
    """Each is a float32, bfloat16 or float16 tensor without a gradient to lose."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}; "
                f"convert it with {name}.float()"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, but the op has no backward; "
                f"pass {name}.detach() or call it under torch.no_grad()"
            )


def given(op: str, **tensors: Tensor | None) -> None:
    """None of the tensors that an op cannot do without is missing."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise ValueError(f"{op}: {name} must be a tensor, got NoneType")


def alike(op: str, **pair: Tensor) -> None:
    """Two tensors have the same shape, dtype and device, and a non-empty last dimension."""
    (name_a, a), (name_b, b) = pair.items()
    for what in ("shape", "dtype", "device"):
        left, right = getattr(a, what), getattr(b, what)
        if left != right:
            if what == "shape":
                left, right = tuple(left), tuple(right)
            raise ValueError(
                f"{op}: {name_a} and {name_b} must have the same {what}, got {left} and {right}"
            )
    if a.dim() == 0 or a.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name_a} and {name_b} need a non-empty last dimension, "
            f"got shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )


def same_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Every further tensor lies on the first one's device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and the rest on {first.device}; "
                f"move it with {name}.to({str(first.device)!r})"
            )


def integers(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """An int64 or int32 tensor on the given device."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{op}: {name} must be an int64 or int32 tensor, got {kind}")
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} and the logits on {device}; "
            f"move it with {name}.to({str(device)!r})"
        )


def positive(op: str, name: str, value: float) -> None:
    """A finite number above zero."""
    # False for NaN, too; traceable, unlike math.isfinite
    if not (_number(value) and 0.0 < value < math.inf):
        raise ValueError(f"{op}: {name} must be a finite number above 0, got {value!r}")


def scale(op: str, name: str, value: float) -> None:
    """A finite number other than zero."""
    if not (_number(value) and 0.0 < abs(value) < math.inf):
        raise ValueError(f"{op}: {name} must be finite and not 0, got {value!r}")


def _number(value: object) -> bool:
    # no tensor: what it holds may change after calls of the same options were prepared
    return isinstance(value, int | float | Real)


def names(op: str, fields: Sequence[str] | None) -> tuple[str, ...] | None:
    """At least one name of a field, as a tuple, or None for all of them."""
    if fields is None:
        return None
    several = hasattr(fields, "__iter__") and not isinstance(fields, str)
    found = tuple(fields) if several else ()
    if not found:
        raise ValueError(
            f"{op}: fields must be a sequence of names, got {fields!r}; leave it out for all"
        )
    return found


def token_ids(op: str, vocab: int, labels: Tensor | None, subset: Tensor | None) -> None:
    """Ids lie in the vocabulary and the subset's differ: reads values, so it runs inside the op.

    Skipped where no value can be read: on meta tensors, and while a CUDA graph is captured.
    """
    for name, ids in (("labels", labels), ("subset", subset)):
        if ids is None or ids.numel() == 0 or _unreadable(ids):
            continue
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{op}: {name} holds token id {wrong}, outside the vocabulary 0..{vocab - 1}"
            )
    if subset is not None and not _unreadable(subset):
        unique, counts = torch.unique(subset, return_counts=True)
        if unique.numel() != subset.numel():
            twice = int(unique[counts > 1][0])
            raise ValueError(
                f"{op}: subset has {subset.numel()} ids of which {unique.numel()} differ; "
                f"token id {twice} appears twice: list each once"
            )


def finite(op: str, scores: Tensor, norms: Tensor | None = None) -> None:
    """No NaN and no infinity among scores, or weights and norms: reads values, so inside the op.

    Skipped while a CUDA graph is captured, where a value cannot be read.
    """
    for name, tensor in (("scores", scores), ("norms", norms)):
        if tensor is None or tensor.numel() == 0 or _capturing(tensor):
            continue
        # Extremes carry a NaN along, and are found many times faster than `isfinite().all()`.
        if bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
            continue
        bad = tensor.isfinite().logical_not_()
        where = tuple(bad.nonzero()[0].tolist())
        value = "NaN" if bool(tensor[where].isnan()) else "infinite"
        raise ValueError(
            f"{op}: {name} are {value} at index {where}; fix the weights or statistics first"
        )


def no_flag(op: str, flag: Tensor, scores: Tensor, norms: Tensor | None) -> None:
    """Raise as `finite` does if a kernel set its flag, which spares reading the scores again."""
    if not _capturing(flag) and bool(flag):
        finite(op, scores, norms)
        raise ValueError(f"{op}: |weight|·norm overflows float32; scale the norms down")


def _unreadable(tensor: Tensor) -> bool:
    return tensor.is_meta or _capturing(tensor)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
