"""The loss of recovery from hidden states: logits exist for a few rows at a time."""

from __future__ import annotations

import torch
from prunekernels.metrics.head_loss import head_pair_loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prunekit.divergence.recovery.settings import Recovery
from prunekit.divergence.rows import Readout
from prunekit.errors import PrunekitError

_LOGITS = 2**23  # of the cross-entropy, alive at once: 32 MiB in float32


def check_heads(student: Readout, teacher: Readout) -> None:
    """See that two models' heads can be compared by `head_pair_loss`.

    Raises:
        PrunekitError: Their vocabularies differ, or one is more than a matrix, a scale and a cap.
    """
    if student.vocabulary != teacher.vocabulary:
        raise PrunekitError(
            f"the teacher has a vocabulary of {teacher.vocabulary} tokens, the model one of "
            f"{student.vocabulary}: recover with the model that it was pruned from"
        )
    for whose, readout in (("model", student), ("teacher", teacher)):
        if readout.weight is None or readout.bias is not None:
            raise PrunekitError(
                f"the {whose}'s head is no plain matrix without a bias, which the loss needs: "
                "recover with a Trainer and prunekit.KeepMasks instead"
            )
    if (student.softcap, student.scale) != (teacher.softcap, teacher.scale):
        raise PrunekitError(
            f"cap and scale of the logits differ, {teacher.softcap} and {teacher.scale} of the "
            f"teacher, {student.softcap} and {student.scale} of the model: recover with the model "
            "that it was pruned from"
        )


def loss_of(
    states: Tensor,
    wanted: Tensor,
    labels: Tensor,
    student: Readout,
    teacher: Readout,
    settings: Recovery,
) -> Tensor:
    """The sum over tokens of divergence and weighted cross-entropy, in nats.

    Args:
        states: (n, D) final normed states of the model.
        wanted: (n, E) those of the teacher.
        labels: (n,) the text's next tokens.
        student: The model's head.
        teacher: The teacher's.
        settings: Kind, temperature and weight.
    """
    assert student.weight is not None and teacher.weight is not None
    total = head_pair_loss(
        states,
        wanted.to(states.device),
        student.weight,
        teacher_head_weight=None if teacher.weight is student.weight else teacher.weight,
        softcap=student.softcap,
        logit_scale=student.scale,
        temperature=settings.temperature,
        kind=settings.kind,
        reduction="sum",
    )
    if settings.cross_entropy:
        step = max(1, _LOGITS // student.vocabulary)
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            part = checkpoint(_nll, states[rows], labels[rows], student, use_reentrant=False)
            total = total + settings.cross_entropy * part
    return total


def _nll(states: Tensor, labels: Tensor, readout: Readout) -> Tensor:
    """Σ −ln q of the labels."""
    assert readout.weight is not None
    logits = readout.logits(states, readout.vocabulary)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
