"""The likeliest tokens of logit rows: leader, ordered top k, and their tail-bucketed KL."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_LOG2E = math.log2(math.e)
_NEG_INF = float("-inf")
_WIDTH = 128
# A tail that is a larger share of all loses less than three digits of a float64 to the difference.
_SHARE = 1e-3


def leader(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum of `(R, V)` rows, its first index, and its lead over the runner-up (inf if V = 1).

    Block maxima first: a plain `max` with indices is ten times slower than `amax`, and the
    runner-up is either the second best block or inside the best one.
    """
    vocab = logits.shape[1]
    width = min(_WIDTH, vocab)
    whole = vocab // width * width
    blocks = torch.unflatten(logits[:, :whole], 1, (-1, width)).amax(-1)
    if whole < vocab:
        blocks = torch.cat([blocks, logits[:, whole:].amax(-1, keepdim=True)], 1)
    best = blocks.argmax(-1, keepdim=True)
    columns = best * width + torch.arange(width, device=logits.device)
    inside = logits.gather(1, columns.clamp_max(vocab - 1))
    inside.masked_fill_(columns >= vocab, _NEG_INF)
    offset = inside.argmax(-1, keepdim=True)
    index = (best * width + offset).squeeze(1)
    maximum = inside.gather(1, offset).squeeze(1).double()
    rest = inside.scatter(1, offset, _NEG_INF).amax(-1)
    others = blocks.scatter(1, best, _NEG_INF).amax(-1)
    return maximum, index, maximum - torch.maximum(rest, others).double()


def top_ids(logits: Tensor, k: int, reads: bool) -> Tensor:
    """Ids `(R, k)` of the largest of `(R, V)`, descending; equal values in the order of ids.

    `topk` leaves the order of equal values open, so elements are ranked by a key that holds the id
    too. Where the host may read a value (`reads`), plain `topk` first decides which ids are in,
    which is enough unless a row has equal values on both sides of the cut.
    """
    vocab = logits.shape[1]
    if not reads:
        return _top_ids_by_key(logits, k)
    values, ids = _topk(logits, min(k + 1, vocab))
    if k < vocab and bool((values[:, k] == values[:, k - 1]).any()):
        return _top_ids_by_key(logits, k)
    ids, order = ids[:, :k].sort(-1)
    ranked = values[:, :k].gather(1, order).sort(stable=True, dim=-1, descending=True)
    return ids.gather(1, ranked.indices)


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)` of `(R, V)` by way of block maxima, which is some times faster on a CPU.

    Whatever is in none of the k blocks with the largest maxima has k values at least as large in
    them: the k largest values are there, and so are all elements above the last of them.
    """
    vocab = logits.shape[1]
    blocks = vocab // _WIDTH
    if blocks < 4 * k:
        found = logits.topk(k, -1)
        return found.values, found.indices
    whole = blocks * _WIDTH
    maxima = torch.unflatten(logits[:, :whole], 1, (blocks, _WIDTH)).amax(-1)
    best = maxima.topk(k, -1, sorted=False).indices
    columns = best[:, :, None] * _WIDTH + torch.arange(_WIDTH, device=logits.device)
    columns = columns.flatten(1)
    if whole < vocab:
        rest = torch.arange(whole, vocab, device=logits.device)
        columns = torch.cat([columns, rest.expand(len(logits), -1)], 1)
    values, at = logits.gather(1, columns).topk(k, -1)
    return values, columns.gather(1, at)


def _top_ids_by_key(logits: Tensor, k: int) -> Tensor:
    """The same by one integer per element: the float's ordered bit pattern, then the id."""
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0 turns −0 into +0
    # Negative floats grow as their bits fall: turn those around, but for the sign.
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().mul_(1 << 32)
    key += torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return logits.shape[1] - 1 - (key.topk(k, -1).values & 0xFFFFFFFF)


def compare(
    pair: tuple[Tensor, Tensor],
    references: Tensor,
    norms: Tensor,
    temperature: float,
    k: int,
    reads: bool,
    exact_masses: bool = False,
    tail_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Top tokens of a block of pairs.

    Args:
        pair: base and other logits, `(R, V)`.
        references: `(2, R)` float64, what is subtracted from each row.
        norms: `(2, R)` float64, ln Σ e^{(logit−reference)/T}.
        temperature: T.
        k: how many.
        reads: whether the host may wait for a value, which a CUDA graph rules out.
        exact_masses: whether `norms` are right to float64's rounding and the host may read: a tail
            that is no small share of all is then what the top tokens leave of it.
        tail_rows: rows whose tail is summed at once, in float64 copies; None: all.

    Returns:
        Blocks of the layout's `TOPK_FLOATS`, `TOPK_ROWS` and `TOPK_IDS`.
    """
    ids = torch.stack([top_ids(logits, k, reads) for logits in pair])
    own, cross, log_own, log_cross, tail = [], [], [], [], []
    for side, logits in enumerate(pair):
        reference, norm = references[side, :, None], norms[side, :, None]
        own.append(logits.gather(1, ids[side]).double())
        cross.append(logits.gather(1, ids[1 - side]).double())
        log_own.append((own[side] - reference) / temperature - norm)
        log_cross.append((cross[side] - reference) / temperature - norm)
        parts: Iterable[slice | Tensor] = _parts(len(logits), tail_rows)
        rest = torch.zeros_like(norms[side])
        if exact_masses:
            rest = 1.0 - (log_cross if side else log_own)[side].exp().sum(-1)
            small = torch.nonzero(~(rest > _SHARE))[:, 0]  # NaN too
            parts = torch.split(small, tail_rows or max(1, len(small)))
        for part in parts:
            sums = _tail(logits[part], ids[0, part], reference[part], temperature)
            rest[part] = sums * torch.exp(-norm[part, 0])
        tail.append(rest)
    log_p = torch.cat([log_own[0], torch.log(tail[0])[:, None]], 1)
    log_q = torch.cat([log_cross[1], torch.log(tail[1])[:, None]], 1)
    probability = [log_own[0].exp(), log_own[1].exp()]
    overlap = (ids[0, :, :, None] == ids[1, :, None, :]).sum((1, 2)).double() / k
    rows = [
        overlap,
        probability[0].sum(-1),
        probability[1].sum(-1),
        *tail,
        _discrete_kl(log_p, log_q),
        _discrete_kl(log_q, log_p),
    ]
    return torch.stack([*own, *probability, *cross]).float(), torch.stack(rows).float(), ids


def _parts(rows: int, step: int | None) -> list[slice]:
    if step is None or rows <= step:
        return [slice(None)]
    return [slice(start, start + step) for start in range(0, rows, step)]


def _tail(logits: Tensor, top: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """Σ e^{(logit−reference)/T} over the tokens that are not in `top` (R, k), float64.

    It is summed, not taken as all less the top, which cancels when it is small. By 2^x, as in
    `PairSums`.
    """
    rest = logits.double().sub_(reference).mul_(_LOG2E / temperature).exp2_()
    return rest.scatter_(1, top, 0.0).sum(-1)


def _discrete_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = torch.where(log_p == _NEG_INF, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp_min(0.0)
