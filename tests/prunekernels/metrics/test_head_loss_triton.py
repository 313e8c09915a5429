"""head_pair_loss by its kernel: in the interpreter, and what it compiles to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import FORMS, KINDS, states, whole
from torch import Tensor

pytest.importorskip("triton")
from interpreter import run_interpreted
from prunekernels import head_pair_loss
from prunekernels.compilation import compile_case
from prunekernels.metrics import head_loss
from prunekernels.runtime import interpreting

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")
every = pytest.mark.parametrize("kind", KINDS)


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


def loss(*arguments: Tensor, **options: Any) -> Tensor:
    return head_pair_loss(*arguments, impl="triton", **options)


def far(found: Tensor, exact: Tensor) -> float:
    """The error's share of the truth, as norms."""
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def assert_as_good_as_eager(
    given: tuple[Tensor, ...], exact: Tensor, truths: tuple[Tensor, ...], **options: Any
) -> None:
    """Losses per row and their weighted sum's gradients err at most twice as much as torch's.

    Args:
        given: Student, teacher, head; the gradients of the first and the last are compared.
        exact: Losses in float64.
        truths: Gradients in float64, of the losses times 1, 2, …
        options: Of the loss.
    """
    weights = torch.arange(1.0, len(exact) + 1)
    errors = {}
    for impl in ("eager", "triton"):
        found = head_pair_loss(*given, impl=impl, reduction="none", **options)
        assert found.dtype == torch.float32
        gradients = torch.autograd.grad((weights * found).sum(), (given[0], given[2]))
        pairs = zip((found, *gradients), (exact, *truths), strict=True)
        errors[impl] = [far(one, truth) for one, truth in pairs]
    for eager, kernel in zip(errors["eager"], errors["triton"], strict=True):
        assert eager < 1e-4 and kernel <= 2 * eager + 2e-7, errors


@interpreted
@pytest.mark.parametrize("form", FORMS)
@every
def test_values_and_gradients_are_those_of_whole_logits(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two rows at a time; the last tile has one column, and rows are padded
    vocab = 2 * 2048 + 1
    monkeypatch.setattr(head_loss, "_CPU_BYTES", head_loss._LIVE_BY_KERNEL * 4 * vocab * 2)
    student, teacher, head = states(5, 16, vocab)
    wide, wide_head = torch.randn(5, 7), torch.randn(vocab, 7)
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    weights = torch.arange(1.0, 6.0).double()
    for teacher_states, teacher_head in ((teacher, None), (wide, wide_head)):
        known = exact[1] if teacher_head is None else teacher_head.double()
        wanted = whole(exact[0], teacher_states.double(), exact[1], known, kind, **FORMS[form])
        truths = torch.autograd.grad((weights * wanted).sum(), exact, retain_graph=True)
        options = {"teacher_head_weight": teacher_head, "kind": kind, **FORMS[form]}
        assert_as_good_as_eager((student, teacher_states, head), wanted, truths, **options)
        mean = 3 * loss(student, teacher_states, head, **options)
        assert abs(mean.item() / float(3 * wanted.mean()) - 1) < 2e-6
        for one, truth in zip(
            torch.autograd.grad(mean, (student, head)),
            torch.autograd.grad(3 * wanted.mean(), exact),
            strict=True,
        ):
            assert far(one, truth) < 5e-5


@interpreted
@every
def test_logits_hundreds_apart(kind: str) -> None:
    """e^x overflows and underflows a float32 without its reference."""
    torch.manual_seed(1)
    student = torch.eye(4).requires_grad_()
    teacher = torch.eye(4)[[1, 0, 2, 3]] * 1.01
    spread = torch.tensor([300.0, 30.0, 3.0, 0.3])
    head = (torch.randn(3000, 4) * spread).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    wanted = whole(exact[0], teacher.double(), exact[1], exact[1], kind)
    weights = torch.arange(1.0, 5.0).double()
    truths = torch.autograd.grad((weights * wanted).sum(), exact)
    assert float(wanted.max()) > (0.6 if kind == "js" else 300)
    assert_as_good_as_eager((student, teacher, head), wanted, truths, kind=kind)


@interpreted
@every
def test_rounded_states_and_rows_without_difference(kind: str) -> None:
    student, teacher, head = states(3, 32, 1000, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    wanted = whole(exact[0], teacher.double(), exact[1], exact[1], kind).mean()
    found = loss(student, teacher, head, kind=kind)
    assert far(found, wanted) < 1e-5
    for one, truth in zip(
        torch.autograd.grad(found, (student, head)),
        torch.autograd.grad(wanted, exact),
        strict=True,
    ):
        assert one.dtype == torch.bfloat16 and far(one, truth) < 1e-2
    same = loss(student, student.detach(), head, kind=kind)
    assert float(same) == 0.0
    (grad,) = torch.autograd.grad(same, student)
    assert not grad.any()


@interpreted
def test_what_is_broken_stays_broken_and_where_it_is() -> None:
    student, teacher, head = states(3, 8, 100)
    broken = student.detach().clone()
    broken[1, 0] = torch.nan
    broken.requires_grad_()
    for kind in KINDS:
        found = loss(broken, teacher, head, kind=kind, reduction="none")
        assert found.isnan().tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(found.sum(), broken)
        assert grad.isnan().any(-1).tolist() == [False, True, False]
    assert loss(student[:0], teacher[:0], head, reduction="none").shape == (0,)
    with pytest.raises(ValueError, match="not in float64: use impl='eager'"):
        loss(*(x.detach().double() for x in (student, teacher, head)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@every
def test_on_a_gpu(kind: str) -> None:
    for dtype, allowed in ((torch.float32, 5e-5), (torch.bfloat16, 2e-2)):
        given = [x.detach().cuda() for x in states(300, 256, 50257, dtype=dtype)]
        student, teacher, head = given[0].requires_grad_(), given[1], given[2].requires_grad_()
        exact = [x.detach().double().requires_grad_() for x in (student, head)]
        for form in FORMS.values():
            wanted = whole(exact[0], teacher.double(), exact[1], exact[1], kind, **form).mean()
            truths = torch.autograd.grad(wanted, exact)
            for impl in ("eager", "triton"):
                found = head_pair_loss(student, teacher, head, kind=kind, impl=impl, **form)
                got = torch.autograd.grad(found, (student, head))
                errors = [far(*pair) for pair in zip((found, *got), (wanted, *truths), strict=True)]
                assert max(errors) < allowed, (impl, dtype, form, errors)


@compiled
def test_the_kernel_asked_for_without_a_gpu_says_so() -> None:
    with pytest.raises(ValueError, match="Triton kernels need a GPU"):
        loss(*states())
    with pytest.raises(ValueError, match="impl must be one of auto, eager, triton, got 'mse'"):
        head_pair_loss(*states(), impl="mse")


@compiled
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_the_kernel_compiles_to_wide_loads_without_spills(arch: int) -> None:
    from prunekernels.metrics import head_loss_triton

    for case in head_loss_triton.compile_cases():
        report = compile_case(case, arch)
        assert not report.missing and report.loop_spills == 0, case.name
        # once in a program, between its passes
        assert report.spills <= (2 if case.name == "head_pair_loss/js/cap" else 0), case.name
