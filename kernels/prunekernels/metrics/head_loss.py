"""A differentiable divergence of the logits that two hidden states lead to, a few rows at a time.

With t and z the logits of teacher and student, p = softmax(t/T), q = softmax(z/T), m = (p+q)/2,
the losses L and their gradients with respect to z are
    kl          Σ p·ln(p/q)                         (q−p)/T
    reverse_kl  Σ q·ln(q/p)                         q·(ln(q/p) − L)/T
    js          ½Σ p·ln(p/m) + ½Σ q·ln(q/m)         ½q·(ln(q/m) − Σ q·ln(q/m))/T
and z = cap(u), u = scale·h·Wᵀ, cap(u) = c·tanh(u/c), has dz/du = 1 − (z/c)². Gradients of the
states and of the head are products with dL/du, taken while the logits of those rows exist; the
logits of all rows never do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prunekernels import checks

KINDS = ("kl", "reverse_kl", "js")
REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (R, V) tensors of a chunk that are alive at the same time
_LIVE = 6


@torch.compiler.disable
def head_pair_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    *,
    teacher_head_weight: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    temperature: float = 1.0,
    kind: str = "kl",
    reduction: str = "mean",
) -> Tensor:
    """The divergence of a student's next-token distribution from its teacher's, per hidden state.

    Equivalent to `F.kl_div(log_softmax(z/T), log_softmax(t/T), log_target=True,
    reduction="none").sum(-1)` (kind "kl") of the logits z and t of both, without materialising
    them: of each chunk of rows the loss and the gradients are taken before the next one. There is
    no factor T², which some recipes of distillation multiply with.

    Gradients flow to `student_hidden` and `head_weight`, where they are required; the teacher has
    none. Softmax and sums are float32 (float64 for float64 states), gradients are returned in the
    type of their tensor. Not twice differentiable.

    Args:
        student_hidden: `(…, D)` states, after the final norm.
        teacher_hidden: `(…, E)` states of the teacher at the same tokens, also after the norm; E is
            D unless the teacher has a head of its own.
        head_weight: `(V, D)` output embedding of the student.
        teacher_head_weight: `(V, E)` output embedding of the teacher; None: the student's, as it
            is now.
        softcap: cap of both logits (Gemma 2), a number above 0, or None.
        logit_scale: factor of both logits (Cohere), or None; applied before the cap.
        temperature: T, a finite number above 0.
        kind: "kl" (KL(teacher‖student)), "reverse_kl" (KL(student‖teacher)) or "js".
        reduction: "mean" over all leading dimensions, "sum", or "none" for a loss per state.

    Returns:
        A scalar, or `(…)` for "none", in nats.

    Raises:
        ValueError: for tensors whose shapes, types or devices do not fit, a teacher of another
            vocabulary, or unknown options. The message names both values.
    """
    op = "head_pair_loss"
    named = {
        "student_hidden": student_hidden,
        "teacher_hidden": teacher_hidden,
        "head_weight": head_weight,
        "teacher_head_weight": teacher_head_weight,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"{op}: {name} must be a float tensor, got {tensor.dtype}")
    checks.same_device(op, student_hidden, **{k: v for k, v in named.items() if k[0] != "s"})
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"{op}: student and teacher need states of the same tokens, got the leading shapes "
            f"{tuple(student_hidden.shape[:-1])} and {tuple(teacher_hidden.shape[:-1])}"
        )
    teacher_head = head_weight.detach() if teacher_head_weight is None else teacher_head_weight
    for name, states, head in (
        ("student_hidden", student_hidden, head_weight),
        ("teacher_hidden", teacher_hidden, teacher_head),
    ):
        if head.dim() != 2 or states.dim() == 0 or head.shape[1] != states.shape[-1]:
            raise ValueError(
                f"{op}: {name} of shape {tuple(states.shape)} needs a head (V, "
                f"{states.shape[-1] if states.dim() else 'D'}), got {tuple(head.shape)}"
            )
    if head_weight.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"{op}: student and teacher must share a vocabulary, got heads of "
            f"{head_weight.shape[0]} and {teacher_head.shape[0]} tokens"
        )
    for name, value, known in (("kind", kind, KINDS), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
    checks.positive(op, "temperature", temperature)
    if softcap is not None:
        checks.positive(op, "softcap", softcap)
    if logit_scale is not None and not 0.0 < abs(logit_scale) < math.inf:
        raise ValueError(f"{op}: logit_scale must be finite and not 0, got {logit_scale}")
    form = _Form(kind, float(temperature), softcap, 1.0 if logit_scale is None else logit_scale)
    lead, rows = student_hidden.shape[:-1], student_hidden.shape[:-1].numel()
    loss: Tensor = _HeadPairLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden.reshape(rows, student_hidden.shape[-1]),
        head_weight,
        teacher_hidden.detach().reshape(rows, teacher_hidden.shape[-1]),
        teacher_head.detach(),
        form,
        reduction,
    )
    return loss.reshape(lead) if reduction == "none" else loss


@dataclass(frozen=True)
class _Form:
    """How logits come of products, and the divergence that is taken of them."""

    kind: str
    temperature: float
    softcap: float | None
    scale: float


class _HeadPairLoss(torch.autograd.Function):
    """Losses of rows. "mean" and "sum" take the gradients in the same sweep as the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        form: _Form,
        reduction: str,
    ) -> Tensor:
        ctx.form, ctx.together = form, reduction != "none"
        wanted = tuple(ctx.needs_input_grad[:2])
        if not ctx.together:
            ctx.save_for_backward(student, head, teacher, teacher_head)
            return _sweep(student, head, teacher, teacher_head, form, None, (False, False))[0]
        rows = student.shape[0]
        share = 1.0 / rows if reduction == "mean" and rows else 1.0
        weights = torch.full((rows,), share, dtype=_work(student), device=student.device)
        losses, *gradients = _sweep(student, head, teacher, teacher_head, form, weights, wanted)
        ctx.save_for_backward(*gradients)
        return losses.mean() if reduction == "mean" else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None]
        if ctx.together:
            found = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
        else:
            wanted = tuple(ctx.needs_input_grad[:2])
            student, head, teacher, teacher_head = ctx.saved_tensors
            _, *found = _sweep(student, head, teacher, teacher_head, ctx.form, grad, wanted)
        return (*found, None, None, None, None)


def _sweep(
    student: Tensor,
    head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    form: _Form,
    weights: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses `(N,)`, and the gradients of their sum, weighted by row, that are wanted.

    Args:
        student: `(N, D)` states.
        head: `(V, D)`.
        teacher: `(N, E)` states.
        teacher_head: `(V, E)`.
        form: the loss.
        weights: `(N,)`; None if no gradient is wanted.
        wanted: whether those of `student` and of `head` are.
    """
    rows, (vocab, width) = student.shape[0], head.shape
    work, device = _work(student), student.device
    losses = torch.empty(rows, dtype=work, device=device)
    of_states = torch.empty_like(student) if wanted[0] else None
    of_head = torch.zeros(vocab, width, dtype=work, device=device) if wanted[1] else None
    budget = (128 << 20) if device.type == "cpu" else (512 << 20)
    step = max(1, min(rows, budget // (_LIVE * work.itemsize * vocab)))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        states = student[part].to(work)
        z = _logits(states, head, form)
        slope = None  # dz/du
        if any(wanted) and form.softcap is not None:
            slope = (z / form.softcap).square_().neg_().add_(1.0)
        log_q = z.div_(form.temperature).log_softmax(-1)
        t = _logits(teacher[part].to(work), teacher_head, form)
        log_p = t.div_(form.temperature).log_softmax(-1)
        del z, t
        losses[part], slopes = _divergence(log_p, log_q, form.kind, any(wanted))
        del log_p, log_q
        if slopes is None or weights is None:
            continue
        slopes.mul_(weights[part, None].to(work) * (form.scale / form.temperature))
        if slope is not None:
            slopes.mul_(slope)
        if of_states is not None:
            found = torch.zeros(states.shape, dtype=work, device=device)
            for tokens, block in _slices(head, work):
                found.addmm_(slopes[:, tokens], block)
            of_states[part] = found
        if of_head is not None:
            of_head.addmm_(slopes.t(), states)
    return losses, of_states, None if of_head is None else of_head.to(head.dtype)


def _divergence(
    log_p: Tensor, log_q: Tensor, kind: str, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of rows, and T times their gradient with respect to the student's logits."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "kl":
        loss = (p * (log_p - log_q)).sum(-1)
        return loss, q.sub_(p) if gradient else None
    if kind == "reverse_kl":
        ratio = log_q - log_p
        loss = (q * ratio).sum(-1)
        return loss, ratio.sub_(loss[:, None]).mul_(q) if gradient else None
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2.0))
    of_teacher = (p * (log_p - log_m)).sum(-1)
    ratio = log_q - log_m
    of_student = (q * ratio).sum(-1)
    loss = 0.5 * (of_teacher + of_student)
    return loss, ratio.sub_(of_student[:, None]).mul_(q).mul_(0.5) if gradient else None


def _logits(states: Tensor, head: Tensor, form: _Form) -> Tensor:
    """cap(scale·states·Wᵀ) in the states' type."""
    out = states.new_empty(states.shape[0], head.shape[0])
    for tokens, block in _slices(head, states.dtype):
        torch.mm(states, block.t(), out=out[:, tokens])
    if form.scale != 1.0:
        out *= form.scale
    if form.softcap is not None:
        out.div_(form.softcap).tanh_().mul_(form.softcap)
    return out


def _slices(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in another type, a few tokens at a time: a copy of all of it would be gigabytes."""
    step = head.shape[0]
    if head.dtype != dtype:
        step = max(1, (16 << 20) // (dtype.itemsize * head.shape[1]))
    for start in range(0, head.shape[0], step):
        tokens = slice(start, start + step)
        yield tokens, head[tokens].to(dtype)


def _work(tensor: Tensor) -> torch.dtype:
    """The type that softmax and sums are taken in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
