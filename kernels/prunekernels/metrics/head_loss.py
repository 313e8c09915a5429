"""A differentiable divergence of the logits that two hidden states lead to, a few rows at a time.

With t and z the logits of teacher and student, p = softmax(t/T), q = softmax(z/T), m = (p+q)/2,
the losses L and their gradients with respect to z are
    kl          Σ p·ln(p/q)                         (q−p)/T
    reverse_kl  Σ q·ln(q/p)                         q·(ln(q/p) − L)/T
    js          ½Σ p·ln(p/m) + ½Σ q·ln(q/m)         ½q·(ln(q/m) − Σ q·ln(q/m))/T
and z = cap(u), u = scale·h·Wᵀ, cap(u) = c·tanh(u/c), has dz/du = 1 − (z/c)². Gradients of the
states and of the head are products with dL/du, taken while the logits of those rows exist; the
logits of all rows never do. Of the products u of some rows torch makes losses and dL/du, or, by
name, a kernel (`head_loss_triton`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prunekernels import checks
from prunekernels.metrics.head_form import HeadForm
from prunekernels.metrics.tuning import head_loss_order
from prunekernels.runtime import Kernel, Op, Problem, register

KINDS = ("kl", "reverse_kl", "js")
REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (R, V) tensors of a chunk that are alive at the same time: in torch, with the kernel
_LIVE, _LIVE_BY_KERNEL = 8, 3
# what they may take together: a chunk's products cost the more the fewer rows it has
_CPU_BYTES, _GPU_BYTES = 160 << 20, 512 << 20
# their rows begin at multiples of so many elements, so that a kernel's loads are wide
_ALIGNED = 16

OP = Op(
    "head_pair_loss",
    {"triton": Kernel("prunekernels.metrics.head_loss_triton", "divergence")},
    order=head_loss_order,
    what="losses of hidden states",
    eager="torch's operators on the logits of some rows at a time",
)
register(OP)


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
    impl: str = "auto",
) -> Tensor:
    """The divergence of a student's next-token distribution from its teacher's, per hidden state.

    Equivalent to `F.kl_div(log_softmax(z/T), log_softmax(t/T), log_target=True,
    reduction="none").sum(-1)` (kind "kl") of the logits z and t of both, without materialising
    them: of each chunk of rows the loss and the gradients are taken before the next one. There is
    no factor T², which some recipes of distillation multiply with.

    Gradients flow to `student_hidden` and `head_weight`, where they are required; the teacher has
    none. Softmax and sums are float32 (float64 for float64 states), gradients are returned in the
    type of their tensor. The kernel rounds dL/du to bfloat16 where states and head are, before it
    is multiplied with them. Not twice differentiable.

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
        impl: "auto", "eager" or "triton", a kernel that is not proven on hardware yet. "auto" takes
            "eager".

    Returns:
        A scalar, or `(…)` for "none", in nats.

    Raises:
        ValueError: for tensors whose shapes, types or devices do not fit, a teacher of another
            vocabulary, unknown options, or an `impl` that cannot run here. The message names both
            values.
    """
    op = "head_pair_loss"
    named = {
        "student_hidden": student_hidden,
        "teacher_hidden": teacher_hidden,
        "head_weight": head_weight,
        "teacher_head_weight": teacher_head_weight,
    }
    for name, tensor in named.items():
        if tensor is None and name == "teacher_head_weight":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            kind_of = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{op}: {name} must be a float tensor, got {kind_of}")
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
        if head.numel() == 0:
            raise ValueError(
                f"{op}: a head needs at least one token and one column, got {tuple(head.shape)}"
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
    if logit_scale is not None:
        checks.scale(op, "logit_scale", logit_scale)
    form = HeadForm(kind, float(temperature), softcap, 1.0 if logit_scale is None else logit_scale)
    lead, rows = student_hidden.shape[:-1], student_hidden.shape[:-1].numel()
    problem = Problem(student_hidden.device, student_hidden.dtype, (rows, *head_weight.shape))
    impl = OP.select(problem, impl).name
    if impl == "triton" and student_hidden.dtype == torch.float64:
        raise ValueError(f"{op}: impl='triton' sums in float32, not in float64: use impl='eager'")
    loss: Tensor = _HeadPairLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden.reshape(rows, student_hidden.shape[-1]),
        head_weight,
        teacher_hidden.detach().reshape(rows, teacher_hidden.shape[-1]),
        teacher_head.detach(),
        form,
        reduction,
        impl,
    )
    return loss.reshape(lead) if reduction == "none" else loss


class _HeadPairLoss(torch.autograd.Function):
    """Losses of rows. "mean" and "sum" take the gradients in the same sweep as the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        form: HeadForm,
        reduction: str,
        impl: str,
    ) -> Tensor:
        ctx.form, ctx.impl, ctx.together = form, impl, reduction != "none"
        ctx.types = student.dtype, head.dtype
        if not ctx.together:
            ctx.save_for_backward(student, head, teacher, teacher_head)
            return _sweep(student, head, teacher, teacher_head, form, None, (None, None), impl)[0]
        rows = student.shape[0]
        share = 1.0 / rows if reduction == "mean" and rows else 1.0
        weights = torch.full((rows,), share, dtype=_work(student), device=student.device)
        given = student, head, teacher, teacher_head
        # float16 would lose, before a scaled loss multiplies them, what the scale is there to keep
        held = [torch.float32 if x == torch.float16 else x for x in ctx.types]
        losses, *gradients = _sweep(*given, form, weights, _wanted(ctx, held), impl)
        ctx.save_for_backward(*gradients)
        return losses.mean() if reduction == "mean" else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: Sequence[Tensor | None]
        if ctx.together:
            found = _scaled(ctx.saved_tensors, ctx.types, grad)
        else:
            given: tuple[Tensor, Tensor, Tensor, Tensor] = ctx.saved_tensors
            _, *found = _sweep(*given, ctx.form, grad, _wanted(ctx, ctx.types), ctx.impl)
        return (*found, None, None, None, None, None)


def _wanted(ctx: Any, types: Sequence[torch.dtype]) -> list[torch.dtype | None]:
    """The types that gradients of states and head shall have; None for one that is not wanted."""
    needed = ctx.needs_input_grad[:2]
    return [dtype if need else None for dtype, need in zip(types, needed, strict=True)]


def _scaled(
    gradients: Sequence[Tensor | None], types: Sequence[torch.dtype], grad: Tensor
) -> list[Tensor | None]:
    """The gradients times that of the loss, in the types of their tensors.

    Of a CPU's loss that is not scaled they are the saved tensors themselves, which spares a copy of
    a whole head; a graph that is kept keeps them, as a caller may add to what it was given.
    """
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if not kept and grad.device.type == "cpu" and grad.item() == 1.0:
        grad = None  # type: ignore[assignment]
    found: list[Tensor | None] = []
    for x, dtype in zip(gradients, types, strict=True):
        if x is not None and grad is not None:
            x = x * grad
        found.append(None if x is None else x.to(dtype))
    return found


def _sweep(
    student: Tensor,
    head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    form: HeadForm,
    weights: Tensor | None,
    wanted: Sequence[torch.dtype | None],
    impl: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses `(N,)`, and the gradients of their sum, weighted by row, that are wanted.

    Args:
        student: `(N, D)` states.
        head: `(V, D)`.
        teacher: `(N, E)` states.
        teacher_head: `(V, E)`.
        form: the loss.
        weights: `(N,)`; None if no gradient is wanted.
        wanted: the types of those of `student` and of `head`; None: that one is not.
        impl: what takes the divergences.
    """
    rows, (vocab, width) = student.shape[0], head.shape
    asked = wanted[0] is not None or wanted[1] is not None
    work, device = _work(student), student.device
    divergence: Callable[..., tuple[Tensor, Tensor | None]] = _divergence
    live, dtype = _LIVE, work
    if impl != "eager":
        divergence, live = OP.kernels[impl].run, _LIVE_BY_KERNEL
        if student.dtype == head.dtype == torch.bfloat16:
            dtype = torch.bfloat16
    losses = torch.empty(rows, dtype=work, device=device)
    of_states = torch.empty_like(student, dtype=wanted[0]) if wanted[0] else None
    of_head = torch.empty(vocab, width, dtype=work, device=device) if wanted[1] else None
    budget = _CPU_BYTES if device.type == "cpu" else _GPU_BYTES
    most = max(1, budget // (live * work.itemsize * vocab))
    step = -(-rows // -(-rows // most)) if rows else 1
    if of_head is not None and not rows:
        of_head.zero_()
    for start in range(0, rows, step):
        part = slice(start, start + step)
        z = _products(student[part], head, work)
        t = _products(teacher[part], teacher_head, work)
        # what autograd gives may be one number expanded
        some = weights[part].to(work).contiguous() if weights is not None and asked else None
        losses[part], slopes = divergence(z, t, form, some, dtype)
        del z, t
        if slopes is None:
            continue
        if of_states is not None:
            found = torch.empty(slopes.shape[0], width, dtype=work, device=device)
            for tokens in _slices(head):
                block = head[tokens].to(dtype)
                _add_product(found, slopes[:, tokens], block, first=tokens.start == 0)
            of_states[part] = found
        if of_head is not None:
            states = student[part].to(dtype)
            for tokens in _slices(head):
                _add_product(of_head[tokens], slopes[:, tokens].t(), states, first=start == 0)
    return losses, of_states, None if of_head is None else of_head.to(wanted[1])


def _products(states: Tensor, head: Tensor, work: torch.dtype) -> Tensor:
    """`(R, V)` products of some states with the head, summed in `work`, rows `_ALIGNED`."""
    rows, vocab = states.shape[0], head.shape[0]
    wide = -(-vocab // _ALIGNED) * _ALIGNED
    out = torch.empty(rows, wide, dtype=work, device=states.device)[:, :vocab]
    if states.is_cuda and states.dtype == head.dtype != work:
        torch.mm(states, head.t(), out=out, out_dtype=work)
        return out
    states = states.to(work)
    for tokens in _slices(head):
        torch.mm(states, head[tokens].to(work).t(), out=out[:, tokens])
    return out


def _divergence(
    z: Tensor, t: Tensor, form: HeadForm, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Losses of rows of products z and t, and weights · dL/du; z and t are used up."""
    slope = None  # dz/du
    z = _logits(z, form)
    if weights is not None and form.softcap is not None:
        slope = (z / form.softcap).square_().neg_().add_(1.0)
    log_q = z.div_(form.temperature).log_softmax(-1)
    log_p = _logits(t, form).div_(form.temperature).log_softmax(-1)
    losses, slopes = _of_log_probabilities(log_p, log_q, form.kind, weights is not None)
    if slopes is None or weights is None:
        return losses, None
    slopes.mul_(weights[:, None] * (form.scale / form.temperature))
    if slope is not None:
        slopes.mul_(slope)
    return losses, slopes.to(dtype)


def _logits(products: Tensor, form: HeadForm) -> Tensor:
    """cap(scale·u) in the place of products u."""
    if form.scale != 1.0:
        products *= form.scale
    if form.softcap is not None:
        products.div_(form.softcap).tanh_().mul_(form.softcap)
    return products


def _of_log_probabilities(
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


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """`total += left @ right`, or `=` if it is the first, summed in total's type."""
    if left.dtype == total.dtype or not left.is_cuda:
        beta = 0.0 if first else 1.0  # of 0 what total holds is not looked at
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)
    elif first:
        torch.mm(left, right, out=total, out_dtype=total.dtype)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


def _slices(head: Tensor) -> Iterator[slice]:
    """A few tokens at a time: a copy of the whole head in another type would be gigabytes."""
    step = max(1, (16 << 20) // head.shape[1])
    for start in range(0, head.shape[0], step):
        yield slice(start, start + step)


def _work(tensor: Tensor) -> torch.dtype:
    """The type that softmax and sums are taken in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
