"""Divergences of rows of logits and their gradients with respect to them, by Triton.

The formulas are those of `head_loss`. One program takes one row: a first pass gathers the
normalisers of both softmaxes, a second the loss, and the gradient of "kl" with it; the others'
gradients contain a sum over the row, so that they take a third. Each lane sums its own columns;
lanes meet at the end of a pass alone. Sums are float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekernels.compilation import KernelCase
from prunekernels.launch import Launch, meta
from prunekernels.metrics.head_form import HeadForm
from prunekernels.metrics.sums.elementwise_triton import tanh
from prunekernels.runtime import on

LN2 = tl.constexpr(0.6931471805599453)
#: Below every logit: where a maximum begins.
LOWEST = tl.constexpr(-1e38)
BLOCK, WARPS = 2048, 8


@triton.jit
def _logits(row_ptr, columns, V, stride, logit_scale, softcap, inverse_t, SCALE: tl.constexpr,
            CAP: tl.constexpr):  # fmt: skip
    """Some logits over T of a row, −inf past its end, and d cap(u)/du.

    What lies between a row's end and the next row's begin is read: so loads are wide at any V.
    """
    u = tl.load(row_ptr + columns, mask=columns < stride, other=0.0)
    if SCALE:
        u *= logit_scale
    slope = 1.0
    if CAP:
        bent = tanh(u / softcap)
        u = softcap * bent
        slope = 1.0 - bent * bent
    return tl.where(columns < V, u * inverse_t, float("-inf")), slope


@triton.jit
def _gathered(largest, total, x):
    """Each lane's largest x so far, and its sum of e^(x − largest)."""
    grown = tl.maximum(largest, x)
    return grown, total * tl.exp(largest - grown) + tl.exp(x - grown)


@triton.jit
def _normaliser(largest, total):
    """The largest x of all lanes, and ln Σ e^(x − largest): their sum would lose digits."""
    top = tl.max(largest, 0)
    return top, tl.log(tl.sum(total * tl.exp(largest - top), 0))


@triton.jit
def _divergence_kernel(
    z_ptr,  # (R, V) float32 products of the student
    t_ptr,  # the same of the teacher
    weights_ptr,  # (R,) float32, read with GRADIENT
    losses_ptr,  # (R,) float32
    slopes_ptr,  # (R, V), written with GRADIENT: weight · dL/du; z itself, or another tensor
    V,
    stride,  # of rows, in elements
    logit_scale,
    softcap,
    inverse_t,  # 1/T
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    t_ptr += row * stride
    slopes_ptr += row * stride
    lanes = tl.arange(0, BLOCK)
    nothing = tl.zeros((BLOCK,), tl.float32)
    largest_z, largest_t = nothing + LOWEST, nothing + LOWEST
    total_z, total_t = nothing, nothing
    for column in range(0, V, BLOCK):
        columns = column + lanes
        z, _ = _logits(z_ptr, columns, V, stride, logit_scale, softcap, inverse_t, SCALE, CAP)
        t, _ = _logits(t_ptr, columns, V, stride, logit_scale, softcap, inverse_t, SCALE, CAP)
        largest_z, total_z = _gathered(largest_z, total_z, z)
        largest_t, total_t = _gathered(largest_t, total_t, t)
    top_z, log_z = _normaliser(largest_z, total_z)
    top_t, log_t = _normaliser(largest_t, total_t)

    share = 0.0
    if GRADIENT:
        share = tl.load(weights_ptr + row) * (logit_scale * inverse_t)
    of_teacher, of_student = nothing, nothing
    for column in range(0, V, BLOCK):
        columns = column + lanes
        z, bend = _logits(z_ptr, columns, V, stride, logit_scale, softcap, inverse_t, SCALE, CAP)
        t, _ = _logits(t_ptr, columns, V, stride, logit_scale, softcap, inverse_t, SCALE, CAP)
        log_q, log_p = z - top_z - log_z, t - top_t - log_t
        q, p = tl.exp(log_q), tl.exp(log_p)
        if KIND == "kl":
            of_teacher += tl.where(columns < V, p * (log_p - log_q), 0.0)
            if GRADIENT:
                slopes = (q - p) * (share * bend)
                tl.store(slopes_ptr + columns, slopes, mask=columns < stride)
        elif KIND == "reverse_kl":
            of_student += tl.where(columns < V, q * (log_q - log_p), 0.0)
        else:
            log_m = _log_mean(log_p, log_q)
            of_teacher += tl.where(columns < V, p * (log_p - log_m), 0.0)
            of_student += tl.where(columns < V, q * (log_q - log_m), 0.0)
    found = tl.sum(of_student, 0)
    loss = tl.sum(of_teacher, 0) + found
    if KIND == "js":
        loss *= 0.5
        share *= 0.5
    tl.store(losses_ptr + row, loss)

    if GRADIENT and KIND != "kl":
        for column in range(0, V, BLOCK):
            columns = column + lanes
            z, bend = _logits(
                z_ptr, columns, V, stride, logit_scale, softcap, inverse_t, SCALE, CAP
            )
            t, _ = _logits(t_ptr, columns, V, stride, logit_scale, softcap, inverse_t, SCALE, CAP)
            log_q, log_p = z - top_z - log_z, t - top_t - log_t
            against = log_p
            if KIND == "js":
                against = _log_mean(log_p, log_q)
            slopes = tl.exp(log_q) * (log_q - against - found) * (share * bend)
            tl.store(slopes_ptr + columns, slopes, mask=columns < stride)


@triton.jit
def _log_mean(log_p, log_q):
    """ln((p + q)/2), also where both are too small for a float32."""
    apart = tl.exp(-tl.abs(log_p - log_q))
    return tl.maximum(log_p, log_q) + (tl.log(1.0 + apart) - LN2)


def divergence(
    z: Tensor, t: Tensor, form: HeadForm, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Losses of rows of products z and t, and weights · dL/du in `dtype`, as `head_loss` has them.

    Args:
        z: `(R, V)` float32 products of the student's states, whose memory may be written to.
        t: `(R, V)` of the teacher's, with the strides of z. What lies behind each row, up to the
            next one's place, is read and written to; loads are wide where rows begin at multiples
            of 16 elements.
        form: The loss.
        weights: `(R,)` float32, contiguous; None if no gradient is wanted.
        dtype: Of the gradient.
    """
    losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    slopes = z
    if dtype != z.dtype:
        wide = torch.empty(z.shape[0], z.stride(0), dtype=dtype, device=z.device)
        slopes = wide[:, : z.shape[1]]
    if z.numel():
        with on(z):
            launch(z, t, weights, losses, slopes, form).run()
    return losses, None if weights is None else slopes


def launch(
    z: Tensor, t: Tensor, weights: Tensor | None, losses: Tensor, slopes: Tensor, form: HeadForm
) -> Launch:
    """The kernel's call, of real tensors or ones on the meta device."""
    return Launch(
        _divergence_kernel,
        (z.shape[0],),
        (
            z,
            t,
            losses if weights is None else weights,
            losses,
            slopes,
            z.shape[1],
            z.stride(0),
            form.scale,
            1.0 if form.softcap is None else float(form.softcap),
            1.0 / form.temperature,
        ),
        {
            "KIND": form.kind,
            "GRADIENT": weights is not None,
            "SCALE": form.scale != 1.0,
            "CAP": form.softcap is not None,
            "BLOCK": BLOCK,
        },
        num_warps=WARPS,
    )


def compile_cases() -> list[KernelCase]:
    """Every loss with its gradient, and one without."""
    # a vocabulary of odd size, rows of which begin at multiples of 16
    z, out = meta((256, 50272), torch.float32)[:, :50257], meta((256,), torch.float32)
    rounded = meta((256, 50272), torch.bfloat16)[:, :50257]
    cases = []
    for kind in ("kl", "reverse_kl", "js"):
        for softcap in (None, 30.0):
            form = HeadForm(kind, 1.0, softcap, 1.0)
            name = f"head_pair_loss/{kind}" + "/cap" * (softcap is not None)
            call = launch(z, z, out, out, rounded, form)
            cases.append(call.case(name, opcodes=("MUFU.EX2", "LDG.E.128")))
    alone = launch(z, z, None, out, z, HeadForm("kl", 1.0, None, 1.0))
    cases.append(alone.case("head_pair_loss/kl/value", opcodes=("MUFU.EX2", "LDG.E.128")))
    return cases
