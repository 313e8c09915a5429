"""head_pair_loss: values and gradients of divergences whose logits are never whole."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from losses import FORMS, KINDS, states, whole
from prunekernels import head_pair_loss, head_pair_stats
from prunekernels.metrics import head_loss
from torch import Tensor


@pytest.fixture
def two_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_CPU_BYTES", head_loss._LIVE * 8 * 11 * 2)


@pytest.mark.usefixtures("two_rows_at_a_time")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, form: str, reduction: str) -> None:
    student, teacher, head = states(dtype=torch.float64)
    options = {"kind": kind, "reduction": reduction, **FORMS[form]}
    # a head of the teacher's own: the default is the student's as it is now, without a gradient
    fixed = head.detach().clone()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return head_pair_loss(hidden, teacher, weight, teacher_head_weight=fixed, **options)

    assert torch.autograd.gradcheck(loss, (student, head))


@pytest.mark.usefixtures("two_rows_at_a_time")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_whole_logits(kind: str, form: str) -> None:
    student, teacher, head = states(dtype=torch.float64)
    wide, wide_head = torch.randn(5, 7).double(), torch.randn(11, 7).double()
    for teacher_states, teacher_head in ((teacher, None), (wide, wide_head)):
        known = head if teacher_head is None else teacher_head
        expected = whole(student, teacher_states, head, known, kind, **FORMS[form])
        weights = torch.arange(1.0, 6.0).double()
        wanted = torch.autograd.grad((weights * expected).sum(), (student, head))
        options = {"teacher_head_weight": teacher_head, "kind": kind, **FORMS[form]}
        found = head_pair_loss(student, teacher_states, head, reduction="none", **options)
        torch.testing.assert_close(found, expected)
        got = torch.autograd.grad((weights * found).sum(), (student, head))
        torch.testing.assert_close(got, wanted)
        mean = 3 * head_pair_loss(student, teacher_states, head, **options)
        torch.testing.assert_close(mean, 3 * expected.mean())
        expected = whole(student, teacher_states, head, known, kind, **FORMS[form])
        torch.testing.assert_close(
            torch.autograd.grad(mean, (student, head)),
            torch.autograd.grad(3 * expected.mean(), (student, head)),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_types_agree_with_the_statistics(dtype: torch.dtype) -> None:
    student, teacher, head = states(7, 32, 3000, dtype=dtype)
    kinds = {"kl": "kl_base_other", "reverse_kl": "kl_other_base", "js": "js"}
    stats = head_pair_stats(teacher, student.detach(), head.detach(), level="full")
    for kind, field in kinds.items():
        found = head_pair_loss(student, teacher, head, kind=kind, reduction="none")
        torch.testing.assert_close(found, getattr(stats, field), rtol=2e-5, atol=2e-6)
    loss = head_pair_loss(student[None], teacher[None], head)
    loss.backward()
    assert student.grad is not None and student.grad.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    expected = whole(exact[0], teacher.double(), exact[1], exact[1], "kl").mean()
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, wanted in ((student.grad, exact[0].grad), (head.grad, exact[1].grad)):
        assert got is not None and wanted is not None
        assert float((got.double() - wanted).norm() / wanted.norm()) < tolerance


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient() -> None:
    student, _, head = states()
    for kind in KINDS:
        loss = head_pair_loss(student, student.detach(), head, kind=kind)
        assert abs(loss.item()) < 1e-6
        (grad,) = torch.autograd.grad(loss, student)
        assert float(grad.abs().max()) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_does_not_grow_with_rows(reduction: str) -> None:
    peaks = []
    for rows in (600, 1200):
        student, teacher, head = states(rows, 8, 40_000)
        with Allocations() as memory:
            head_pair_loss(student, teacher, head, reduction=reduction).sum().backward()
        peaks.append(memory.peak)
    logits = 2 * 1200 * 40_000 * 4
    assert peaks[1] < peaks[0] + 600 * 200
    assert peaks[1] < 0.5 * logits


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    """Gradients that were handed out change where they are added up, or clipped in place."""
    student, teacher, head = states()
    loss = head_pair_loss(student, teacher, head)
    wanted = [x.clone() for x in torch.autograd.grad(loss, (student, head), retain_graph=True)]
    for times in (1.0, 2.0, 3.0):
        loss.backward(retain_graph=True)
        for tensor, once in zip((student, head), wanted, strict=True):
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, times * once)
    for found in torch.autograd.grad(loss, (student, head), retain_graph=True):
        found.zero_()
    assert all(map(torch.equal, torch.autograd.grad(loss, (student, head)), wanted))


def test_a_scaled_loss_of_float16_keeps_small_gradients() -> None:
    """Those of a mean over many states are below float16's smallest number until scaled."""
    torch.manual_seed(0)
    teacher = torch.randn(2048, 8)
    student = (teacher + 0.01 * torch.randn(2048, 8)).half().requires_grad_()
    head = (torch.randn(200, 8) / 4).half().requires_grad_()
    loss = head_pair_loss(student, teacher.half(), head)
    found = torch.autograd.grad(65536 * loss, (student, head))
    assert [x.dtype for x in found] == [torch.float16] * 2
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    whole_loss = whole(exact[0], teacher.half().double(), exact[1], exact[1], "kl").mean()
    for got, wanted in zip(found, torch.autograd.grad(65536 * whole_loss, exact), strict=True):
        assert float((got.double() - wanted).norm() / wanted.norm()) < 1e-3


def test_what_needs_no_gradient_gets_none() -> None:
    student, teacher, head = states()
    (grad,) = torch.autograd.grad(head_pair_loss(student, teacher, head.detach()), student)
    assert grad.shape == student.shape
    assert not head_pair_loss(student.detach(), teacher, head.detach()).requires_grad
    empty = head_pair_loss(student[:0], teacher[:0], head, reduction="none")
    assert empty.shape == (0,)


def test_wrong_arguments_name_both_values() -> None:
    student, teacher, head = states()
    for message, arguments, options in (
        ("11 and 12 tokens", (student, teacher, head), {"teacher_head_weight": torch.ones(12, 4)}),
        (r"\(5,\) and \(4,\)", (student, teacher[:4], head), {}),
        (r"\(V, 3\), got \(11, 4\)", (student, teacher[:, :3], head), {}),
        ("kl, reverse_kl, js, got 'mse'", (student, teacher, head), {"kind": "mse"}),
        ("mean, sum, none, got 'max'", (student, teacher, head), {"reduction": "max"}),
        ("temperature .* got 0", (student, teacher, head), {"temperature": 0}),
        ("logit_scale .* got 0", (student, teacher, head), {"logit_scale": 0.0}),
        ("int64", (student.long(), teacher, head), {}),
        ("student_hidden must be a float tensor, got list", ([1.0], teacher, head), {}),
        ("head_weight must be a float tensor, got NoneType", (student, teacher, None), {}),
        (r"at least one token and one column, got \(0, 4\)", (student, teacher, head[:0]), {}),
        (r"\(11, 0\)", (student[:, :0], teacher[:, :0], head[:, :0]), {}),
    ):
        with pytest.raises(ValueError, match=message):
            head_pair_loss(*arguments, **options)  # type: ignore[arg-type]
