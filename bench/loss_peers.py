"""A training step's loss of hidden states, with gradients of states and head: ours and peers'.

Each takes the student's states, the teacher's, and a head that both share, and returns the mean
loss and its two gradients. torch keeps all logits of both. Liger's fused product has the
Jensen–Shannon divergence alone, and no cap of logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from prunekernels import head_pair_loss
from torch import Tensor

from bench import bounds
from bench.harness import Absent, Case, Contender, Prepared, Session, Verdict, refusable
from bench.metric_peers import LIGER

KINDS = ("kl", "js")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Largest error of the loss and of a gradient's norm, as shares, by the states' type.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def whole(kind: str, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """The mean loss through all logits, in float32 or float64."""
    wide = torch.promote_types(head.dtype, torch.float32)
    log_q = F.linear(student, head).to(wide).log_softmax(-1)
    log_p = F.linear(teacher, head.detach()).to(wide).log_softmax(-1)
    if kind == "kl":
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    halves = (F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q))
    return 0.5 * sum(halves, torch.zeros((), dtype=wide, device=head.device))


def _liger(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    if not head.is_cuda:
        raise Absent("measured on an NVIDIA GPU only")
    loss = LIGER("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.5)
    found: Tensor = loss(student, head, teacher, head.detach(), None)
    return found


def _ours(kind: str, impl: str, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return head_pair_loss(student, teacher, head, kind=kind, impl=impl)


def peers(kind: str) -> dict[str, Loss]:
    """Ways to take a loss, by provider."""
    found: dict[str, Loss] = {
        "prunekernels": functools.partial(_ours, kind, "auto"),
        "prunekernels triton": refusable(functools.partial(_ours, kind, "triton")),
        "torch": functools.partial(whole, kind),
    }
    return found | ({"Liger fused jsd": _liger} if kind == "js" else {})


def step(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The loss, and its gradients of student and head."""
    student, teacher, head = inputs
    with torch.enable_grad():
        found = loss(student, teacher, head)
    return (found.detach(), *torch.autograd.grad(found, (student, head)))


def contenders(case: Case, session: Session) -> list[Contender]:
    """Every peer on states of such a shape; the mode is the kind of loss."""
    dtype, device = getattr(torch, case.dtype), session.device
    N, D, V = (int(case.sizes[name]) for name in "NDV")
    sets = []
    for _ in range(min(4, session.copies(V * D * dtype.itemsize))):
        teacher = torch.randn(N, D, device=device)
        student = teacher + 0.15 * torch.randn(N, D, device=device)
        head = 2.5 * torch.randn(V, D, device=device) / D**0.5
        sets.append(
            (
                student.to(dtype).requires_grad_(),
                teacher.to(dtype),
                head.to(dtype).requires_grad_(),
            )
        )

    def check(found: tuple[Tensor, ...]) -> Verdict:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in sets[0]]
        exact = step(functools.partial(whole, case.mode), wide)
        errors = [
            float((got.double() - truth).norm() / truth.norm())
            for got, truth in zip(found, exact, strict=True)
        ]
        said = ", ".join(f"{error:.1e}" for error in errors)
        note = f"relative errors of loss, states' and head's gradient: {said}"
        return Verdict(max(errors) <= ALLOWED[dtype], note)

    def prepare(loss: Loss) -> Prepared:
        runs = [functools.partial(step, loss, inputs) for inputs in sets]
        return Prepared(runs, check, bounds.head_pair_loss(N, D, V, dtype.itemsize), graph=False)

    return [
        Contender(name, functools.partial(prepare, loss)) for name, loss in peers(case.mode).items()
    ]
