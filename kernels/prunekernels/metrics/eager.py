"""The ops as chunked torch: what runs on a CPU and wherever Triton cannot.

Every function takes arguments that the public op has already checked, and returns tensors packed
as `result_rows` says. No Python loop runs once per row where rows are short, and none allocates in
proportion to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prunekernels.metrics import needed_sums
from prunekernels.metrics.closed_form import angle_fields
from prunekernels.metrics.options import OutputHead, PairOptions
from prunekernels.metrics.result_rows import VECTOR_FLOATS
from prunekernels.metrics.sums import light
from prunekernels.metrics.sums.eager import GROUP_ROWS, PairSums
from prunekernels.metrics.sums.light import LightSums
from prunekernels.rows import flattens, take_rows


def pair_stats(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
) -> list[Tensor]:
    """Packed statistics of `(…, V)` logits."""
    vocab = base.shape[-1]
    if light.suffices(options, vocab, base.device, subset is not None):
        sums = LightSums(base.numel() // vocab, vocab, base.dtype, labels, options)
        _take(sums, base, other)
        return sums.result()
    return _pair_sums(base, other, labels, subset, options).result()


def pair_state(
    base: Tensor, other: Tensor, labels: Tensor | None, offset: int, options: PairOptions
) -> Tensor:
    """Mergeable state `(N, F)` of `(…, V)` logits whose first column has id `offset`."""
    if labels is None:
        return _pair_sums(base, other, None, None, options).state(offset)
    here = labels.reshape(-1) - offset
    held = (here >= 0) & (here < base.shape[-1])
    known = here.clamp(0, base.shape[-1] - 1)
    sums = _pair_sums(base, other, known, None, options)
    sums.label_logits.masked_fill_(~held, 0.0)
    return sums.state(offset)


def _pair_sums(
    base: Tensor,
    other: Tensor,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
) -> PairSums:
    vocab = base.shape[-1]
    rows = base.numel() // vocab
    sums = PairSums(rows, vocab, base.device, base.dtype, labels, subset, options)
    _take(sums, base, other)
    return sums


def _take(sums: PairSums | LightSums, base: Tensor, other: Tensor) -> None:
    """Give all rows of `(…, V)` logits to sums."""
    rows = base.numel() // base.shape[-1]
    step = sums.group_rows if flattens(base) and flattens(other) else sums.block_rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        sums.add(start, take_rows(base, start, stop), take_rows(other, start, stop))


def head_pair_stats(
    base_hidden: Tensor,
    other_hidden: Tensor,
    head: OutputHead,
    labels: Tensor | None,
    subset: Tensor | None,
    options: PairOptions,
) -> list[Tensor]:
    """Packed statistics of the logits of `(…, D)` hidden states, computed a few rows at a time."""
    vocab, width = head.weight.shape
    rows = base_hidden.numel() // width
    device = base_hidden.device
    sums: PairSums | LightSums
    if light.suffices(options, vocab, device, subset is not None):
        sums = LightSums(rows, vocab, torch.float32, labels, options)
    else:
        sums = PairSums(rows, vocab, device, torch.float32, labels, subset, options)
    for start, a, b in logit_blocks((base_hidden, other_hidden), head):
        sums.add(start, a, b)
    return sums.result()


def logit_blocks(
    hidden: tuple[Tensor, Tensor],
    head: OutputHead,
    equalise: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row and float32 logits `(R, V)` of base and other, in buffers that are reused.

    Where both have one head, one product of the states of both reads it, and equal hidden states
    give equal logits to the last bit: on a CPU, where the products take most of the time, a state
    of `other` that also occurs among `base` is multiplied just once (dropping a sublayer leaves
    the state that the sublayer before it made); elsewhere, where that search would cost a host
    sync, see `joint_logits`. With two heads both
    rows of a pair come from products of the same shape, at the same place in buffers of the same
    alignment.

    Args:
        hidden: `(…, D)` states of base and of other.
        head: what makes logits of them.
        equalise: takes a mask of rows and two blocks; copies these rows of the first block to the
            second. None: by torch, which reads and writes every row.
    """
    heads = head.weights
    vocab, width = heads[0].shape
    device = heads[0].device
    rows = hidden[0].numel() // width
    joint, on_cpu = heads[0] is heads[1], device.type == "cpu"
    step = chunk_rows(rows, vocab, (128 << 20) if on_cpu else (640 << 20))
    # Two allocations, not two halves of one: a matmul may round by its output's alignment.
    logits = [
        torch.empty((1 + joint) * _aligned(step), vocab, dtype=torch.float32, device=device)
        for _ in range(2 - joint)
    ]

    def project(states: Tensor, side: int) -> Tensor:
        out = logits[side][: states.shape[0]]
        _project(states, heads[side], out)
        if head.bias is not None:
            out += head.bias
        if head.logit_scale is not None:
            out *= head.logit_scale
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out

    for start in range(0, rows, step):
        stop = min(start + step, rows)
        base, other = (
            rms_normalised(take_rows(states, start, stop), head.norm_weight, head.norm_eps)
            for states in hidden
        )
        if joint and not on_cpu:
            a, b = joint_logits(base, other, lambda states: project(states, 0), equalise)
            yield start, a, b
            continue
        if not joint:
            yield start, project(base, 0), project(other, 1)
            continue
        found = _positions(other, base)
        missing = found < 0
        a, fresh = project(torch.cat([base, other[missing]]), 0).tensor_split([stop - start])
        if fresh.shape[0] == stop - start:
            yield start, a, fresh
            continue
        found[missing] = torch.arange(fresh.shape[0])
        for row in range(0, stop - start, GROUP_ROWS):
            group = slice(row, row + GROUP_ROWS)
            b = a.index_select(0, found[group].masked_fill(missing[group], 0))
            b[missing[group]] = fresh[found[group][missing[group]]]
            yield start + row, a[group], b


def chunk_rows(rows: int, vocab: int, budget: int) -> int:
    """Pairs of rows whose float32 logits are alive at the same time.

    All of them if they fit the budget in bytes, else a multiple of 64, so that the product has
    whole tiles of 128. The budget must not shrink to what a second-level cache holds: each chunk
    reads the head again, which fewer than about 200 rows cannot hide.
    """
    fit = max(1, budget // (8 * vocab))
    if rows <= fit:
        return max(1, rows)
    return fit // 64 * 64 if fit >= 64 else fit


def _aligned(rows: int) -> int:
    """Rows after which a float32 row of any length starts at a multiple of 16 bytes."""
    return -(-rows // 4) * 4


def joint_logits(
    base: Tensor,
    other: Tensor,
    project: Callable[[Tensor], Tensor],
    equalise: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of both blocks `(R, D)` of states by one product, which reads the head once.

    A product may sum two rows in another order (its tiles may be split differently over depth), so
    equal states need not give equal bits by themselves: rows of `other` whose state is that of
    `base` are copied.

    Args:
        base: states of base.
        other: states of other.
        project: makes logits of states.
        equalise: as in `logit_blocks`.
    """
    rows, first = base.shape[0], _aligned(base.shape[0])
    states = base.new_zeros(first + rows, base.shape[1])
    states[:rows], states[first:] = base, other
    logits = project(states)
    a, b = logits[:rows], logits[first:]
    same = (base == other).all(-1)
    if equalise is None:
        torch.where(same[:, None], a, b, out=b)
    else:
        equalise(same, a, b)
    return a, b


def _positions(states: Tensor, among: Tensor) -> Tensor:
    """Per row of `states` the index of a row with the same bits `among` the others, or −1."""
    integer = {2: torch.int16, 4: torch.int32}[states.itemsize]
    odd = 2 * torch.arange(states.shape[1]) + 1
    factors = odd * 0x1E3779B97F4A7C15  # wraps around, which is what mixes the bits
    keys, own = ((rows.view(integer).long() * factors).sum(-1) for rows in (among, states))
    order = keys.argsort()
    nearest = torch.searchsorted(keys[order], own).clamp_(max=len(keys) - 1)
    found = order[nearest]
    equal = (among[found].view(integer) == states.view(integer)).all(-1)
    return found.masked_fill(~equal, -1)


def rms_normalised(hidden: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """A fresh copy of the rows, RMS-normalised in float32, back in the states' own dtype."""
    if weight is None:
        return hidden.clone(memory_format=torch.contiguous_format)
    states = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    states *= torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)
    states *= weight.float()
    return states.to(hidden.dtype)


def _project(states: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = states @ weight.T` with float32 products' sums, whatever the operands' dtype."""
    if states.is_cuda and states.dtype == weight.dtype:
        extra = {} if states.dtype == torch.float32 else {"out_dtype": torch.float32}
        torch.mm(states, weight.t(), out=out, **extra)
        return
    # A slice of the head at a time: a float32 copy of all of it would be gigabytes.
    states = states.float()
    step = max(1, (16 << 20) // (4 * max(states.shape)))
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        _product(states, weight[part].float(), out[:, part])


def _product(states: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = states @ weight.T` of float32 matrices.

    On a CPU through oneDNN where torch has it: torch's own `mm` calls MKL, which leaves the wider
    vectors of an AMD processor alone. Measured there on 340 × 576 by 576 × 49152, two cores: 127
    GFLOP/s by `mm`, 183 by oneDNN.
    """
    if states.device.type == "cpu" and _ONEDNN is not None:
        out.copy_(_ONEDNN(states, weight, None, "none", [], ""))
    else:
        torch.mm(states, weight.t(), out=out)


_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # absent without oneDNN


def vector_stats(base: Tensor, other: Tensor, fields: Sequence[str]) -> Tensor:
    """Packed `(8, N)` statistics of `(…, D)` vectors, summed in float64; rows asked for alone."""
    rows, device = base.numel() // base.shape[-1], base.device
    apart = not needed_sums.WITHOUT_DIFFERENCE.issuperset(fields)
    products = _inner_products(base, other, 2 + apart)
    (z2, zz), b2 = products[0, :2], products[1, 1]
    if apart:
        found = angle_fields(z2, products[0, 2], products[2, 2], zz, b2)
        found["one_minus_cosine_estimate"] = 0.5 * found["orthogonal_ratio"].square()
    else:
        # Equal vectors need not be found: in float64 their cosine is 1 to 15 digits.
        found = angle_fields(z2, None, z2 + b2, zz, b2)
    packed = torch.zeros(len(VECTOR_FLOATS), rows, device=device)
    for row, name in zip(packed, VECTOR_FLOATS, strict=True):
        if name in fields:
            row.copy_(found[name])
    return packed


def _inner_products(base: Tensor, other: Tensor, count: int) -> Tensor:
    """Products of base a, other b and, of a `count` of 3, b−a with each other: `(k, k, N)` float64.

    Some rows after others in buffers that stay in cache; one batched product is all sums of theirs.
    """
    width, device = base.shape[-1], base.device
    rows = base.numel() // width
    step = max(1, ((1 << 17) if device.type == "cpu" else (1 << 22)) // width)
    shape = (count, min(step, max(rows, 1)), width)
    buffers = torch.empty(shape, dtype=torch.float64, device=device)
    products = torch.empty(rows, count, count, dtype=torch.float64, device=device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        held = buffers[:, : stop - start]
        held[0].copy_(take_rows(base, start, stop))
        held[1].copy_(take_rows(other, start, stop))
        if count == 3:
            torch.sub(held[1], held[0], out=held[2])
        torch.bmm(held.transpose(0, 1), held.permute(1, 2, 0), out=products[start:stop])
    return products.permute(1, 2, 0)
