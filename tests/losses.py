"""Losses of hidden states through all logits, as textbooks write them, and states for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("kl", "reverse_kl", "js")
FORMS = {
    "plain": {},
    "capped": {"softcap": 1.5, "logit_scale": -0.7, "temperature": 0.6},
}


def states(rows: int = 5, width: int = 4, vocab: int = 11, **kind: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    return (
        torch.randn(rows, width, **kind).requires_grad_(),
        torch.randn(rows, width, **kind),
        torch.randn(vocab, width, **kind).requires_grad_(),
    )


def whole(
    student: Tensor,
    teacher: Tensor,
    head: Tensor,
    teacher_head: Tensor,
    kind: str,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """The textbook's loss per row, by autograd through all logits."""

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = logit_scale * hidden @ weight.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.log_softmax(logits / temperature, -1)

    log_q, log_p = log_softmax(student, head), log_softmax(teacher, teacher_head.detach())
    if kind == "reverse_kl":
        log_p, log_q = log_q, log_p
    if kind != "js":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.log((log_p.exp() + log_q.exp()) / 2)
    halves = [(x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q)]
    return 0.5 * (halves[0] + halves[1])
