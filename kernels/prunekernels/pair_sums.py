"""Chunked sums over the vocabulary for pairs of logit rows: the engine of the eager metrics.

Rows are taken a few at a time and summed in buffers that stay in cache and are reused, so the
extra memory does not grow with the input. "core" sums in float32; "precise" and "full" run the
same sums in float64, which costs about as much as the series expansions that float32 would need
and leaves nothing to cancel. Mathematics: the module docstring of `closed_form`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunekernels import layout
from prunekernels.closed_form import SUMS, pair_fields

_LOG2E = math.log2(math.e)
_NEG_INF = float("-inf")
_ALMOST_ONE = math.nextafter(1.0, 0.0)
_INDEX = {name: row for row, name in enumerate(SUMS)}


class PairSums:
    """The sums of all rows, filled group by group, and the scratch memory they need."""

    def __init__(
        self,
        rows: int,
        vocab: int,
        device: torch.device,
        labels: Tensor | None,
        subset: Tensor | None,
        temperature: float,
        topk: int,
        level: str,
        weights: str,
        tile: int | None = None,
    ) -> None:
        self.temperature, self.topk, self.level, self.weights = temperature, topk, level, weights
        self.labels = None if labels is None else labels.reshape(-1)
        self.work = torch.float32 if level == "core" else torch.float64
        tile = tile or _tile_elements(rows * vocab, self.work, device)
        self.columns = min(vocab, tile)
        self.block_rows = max(1, tile // vocab)
        # Finding the maxima needs few bytes per row but many small launches: group rows for it.
        self.group_rows = max(self.block_rows, 64)
        self.scratch: dict[str, Tensor] = {}
        self.elements = self.block_rows * self.columns

        def allocate(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.sums = allocate(len(SUMS), rows, dtype=torch.float64)
        self.references = allocate(2, rows, dtype=torch.float64)  # α, β
        self.maxima = allocate(2, rows, dtype=torch.float64)
        self.margins = allocate(2, rows, dtype=torch.float64)
        self.ids = allocate(2, rows, dtype=torch.int64)
        self.label_logits = allocate(2, rows if labels is not None else 0, dtype=torch.float64)
        self.topk_floats = allocate(len(layout.TOPK_FLOATS), rows, topk, dtype=torch.float32)
        self.topk_rows = allocate(len(layout.TOPK_ROWS), rows, dtype=torch.float32)
        self.topk_ids = allocate(len(layout.TOPK_IDS), rows, topk, dtype=torch.int64)
        self.subset = subset
        self.inner: PairSums | None = None
        if subset is not None:
            self.inner = PairSums(
                rows, subset.numel(), device, None, None, temperature, 0, level, weights
            )

    def add(self, start: int, base: Tensor, other: Tensor) -> None:
        """Take rows `start …` from two `(R, V)` logit blocks."""
        stop = start + base.shape[0]
        for side, logits in enumerate((base, other)):
            maximum, index, margin = _top2(logits)
            self.maxima[side, start:stop] = maximum
            self.margins[side, start:stop] = margin
            self.ids[side, start:stop] = index
        at_top = other.gather(1, self.ids[0, start:stop, None]).squeeze(1).double()
        far = self.maxima[1, start:stop] - at_top > 20.0 * self.temperature
        self.references[0, start:stop] = self.maxima[0, start:stop]
        self.references[1, start:stop] = torch.where(far, self.maxima[1, start:stop], at_top)
        if self.labels is not None:
            index = self.labels[start:stop, None]
            self.label_logits[0, start:stop] = base.gather(1, index).squeeze(1).double()
            self.label_logits[1, start:stop] = other.gather(1, index).squeeze(1).double()
        for row in range(0, base.shape[0], self.block_rows):
            block = slice(row, row + self.block_rows)
            self._add_block(start + row, base[block], other[block])
        if self.inner is not None and self.subset is not None:
            self.inner.add(
                start, base.index_select(1, self.subset), other.index_select(1, self.subset)
            )

    def _add_block(self, start: int, base: Tensor, other: Tensor) -> None:
        rows = slice(start, start + base.shape[0])
        total = self._sum(rows, base, other, masked=False)
        masked = not bool(torch.isfinite(total).all())
        if masked:
            # Rare: a −inf makes x infinite or undefined. Do the block again and look at each.
            total = self._sum(rows, base, other, masked=True)
        self.sums[:, rows] = total
        if self.level == "full":
            self._sum_second_pass(rows, base, other, masked)
        if self.topk:
            self._top_tokens(rows, base, other)

    def _tiles(self, rows: slice, base: Tensor, other: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(torch.split(x, self.columns, 1) for x in (base, other)), strict=True))

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if name not in self.scratch:
            self.scratch[name] = torch.empty(self.elements, dtype=self.work, device=like.device)
        return self.scratch[name][: like.numel()].view(like.shape)

    def _centred(
        self, rows: slice, a: Tensor, b: Tensor, holes: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """a', b', x, w, v of one tile (the last one in the buffer named "v")."""
        scale = _LOG2E / self.temperature
        shift = self.references[:, rows].to(self.work).unsqueeze(-1)
        xa = torch.sub(a, shift[0], out=self._buffer("xa", a))
        xb = torch.sub(b, shift[1], out=self._buffer("xb", a))
        w = torch.mul(xa, scale, out=self._buffer("w", a)).exp2_()
        v = torch.mul(xb, scale, out=self._buffer("v", a)).exp2_()
        if holes is not None:
            xa.masked_fill_(holes[0], 0.0)
            xb.masked_fill_(holes[1], 0.0)
        x = torch.sub(xb, xa, out=self._buffer("x", a))
        if holes is not None:
            x.masked_fill_(holes[0] | holes[1], 0.0)
        return xa, xb, x, w, v

    def _load(self, name: str, tile: Tensor) -> Tensor:
        if tile.dtype == self.work:
            return tile
        return self._buffer(name, tile).copy_(tile)

    def _sum(self, rows: slice, base: Tensor, other: Tensor, masked: bool) -> Tensor:
        total = torch.zeros(len(SUMS), base.shape[0], dtype=torch.float64, device=base.device)
        part = torch.zeros(len(SUMS), base.shape[0], dtype=self.work, device=base.device)
        holes = None
        for tile_a, tile_b in self._tiles(rows, base, other):
            a, b = self._load("a", tile_a), self._load("b", tile_b)
            product = self._buffer("product", a)

            def add(name: str, value: Tensor, part: Tensor = part) -> None:
                torch.sum(value, -1, out=part[_INDEX[name]])

            def dot(
                name: str, left: Tensor, right: Tensor, p: Tensor = product, part: Tensor = part
            ) -> None:
                torch.sum(torch.mul(left, right, out=p), -1, out=part[_INDEX[name]])

            count = torch.full((a.shape[0],), a.shape[1], dtype=self.work, device=a.device)
            if masked:
                holes = (a == _NEG_INF, b == _NEG_INF)
                add("only_base", (holes[0] & ~holes[1]).to(self.work))
                add("only_other", (holes[1] & ~holes[0]).to(self.work))
                count -= (holes[0] & holes[1]).sum(-1)
            part[_INDEX["n"]] = count
            xa, xb, x, w, v = self._centred(rows, a, b, holes)
            add("U1", x)
            dot("U2", x, x)
            add("W0", w)
            add("V0", v)
            dot("Wy", w, xa)
            dot("Vy", v, xb)
            dot("V1", v, x)
            dot("R0", w, w)
            dot("S0", v, v)
            dot("C0", w, v)
            weighted = torch.mul(w, x, out=xa)
            add("W1", weighted)
            dot("W2", weighted, x)
            if self.weights == "base":
                dot("R1", weighted, w)
                dot("R2", weighted, weighted)
            else:
                torch.mul(v, x, out=weighted)
                dot("V2", weighted, x)
                dot("S1", weighted, v)
                dot("S2", weighted, weighted)
            rho = torch.sub(v, w, out=xb)
            dot("Pw", w, rho)
            dot("P2", rho, rho)
            if holes is not None:
                a, b = a.clone(), b.clone()
                both = holes[0] | holes[1]
                a.masked_fill_(both, 0.0)
                b.masked_fill_(both, 0.0)
            difference = torch.sub(b, a, out=x)
            dot("Z2", a, a)
            dot("Zd", a, difference)
            dot("D2", difference, difference)
            add("L1", difference.abs_())
            total += part
        return total

    def _sum_second_pass(self, rows: slice, base: Tensor, other: Tensor, masked: bool) -> None:
        """Jensen–Shannon, total variation and Hellinger: they need both normalisers first."""
        w0 = self.sums[_INDEX["W0"], rows, None]
        v0 = self.sums[_INDEX["V0"], rows, None]
        log_ratio = torch.log(v0 / w0)
        out = {name: self.sums[_INDEX[name], rows] for name in ("JS", "TV", "HE")}
        for tile_a, tile_b in self._tiles(rows, base, other):
            a, b = self._load("a", tile_a), self._load("b", tile_b)
            holes = (a == _NEG_INF, b == _NEG_INF) if masked else None
            _, _, x, p, q = self._centred(rows, a, b, holes)
            p.div_(w0)
            q.div_(v0)
            # x̂ = ln(q/p); at ±50 one side holds all but 2e-22 of the mass.
            x.div_(self.temperature).sub_(log_ratio)
            if holes is not None:
                x.masked_fill_(holes[0], 50.0).masked_fill_(holes[1], -50.0)
            s = x.mul_(0.5).tanh_().clamp_(-_ALMOST_ONE, _ALMOST_ONE)
            h = torch.log1p(s, out=self._buffer("xa", a)).mul_(torch.add(s, 1.0))
            s.neg_()
            h.add_(torch.log1p(s).mul_(torch.add(s, 1.0)))
            middle = torch.add(p, q, out=self._buffer("xb", a))
            out["JS"] += h.mul_(middle).sum(-1).mul_(0.25)
            out["TV"] += torch.sub(q, p, out=middle).abs_().sum(-1)
            out["HE"] += q.sqrt_().sub_(p.sqrt_()).square_().sum(-1)

    def _top_tokens(self, rows: slice, base: Tensor, other: Tensor) -> None:
        k, t = self.topk, self.temperature
        ids = torch.stack([_top_ids(base, k), _top_ids(other, k)])
        own, cross, probability, unnormalised = [], [], [], []
        log_norm = torch.log(self.sums[[_INDEX["W0"], _INDEX["V0"]], rows])
        for side, logits in enumerate((base, other)):
            own.append(logits.gather(1, ids[side]).double())
            cross.append(logits.gather(1, ids[1 - side]).double())
            reference = self.references[side, rows, None]
            norm = log_norm[side, :, None]
            probability.append(torch.exp((own[side] - reference) / t - norm))
            # The tail is summed, not taken as 1 − mass, which cancels when it is small.
            rest = torch.exp((logits.double() - reference) / t - norm)
            unnormalised.append(rest.scatter_(1, ids[0], 0.0).sum(-1))
        log_p = (own[0] - self.references[0, rows, None]) / t - log_norm[0, :, None]
        log_q = (cross[1] - self.references[1, rows, None]) / t - log_norm[1, :, None]
        log_p = torch.cat([log_p, torch.log(unnormalised[0])[:, None]], 1)
        log_q = torch.cat([log_q, torch.log(unnormalised[1])[:, None]], 1)
        found = (ids[0][:, :, None] == ids[1][:, None, :]).sum((1, 2))
        self.topk_ids[:, rows] = ids
        self.topk_floats[:, rows] = torch.stack([*own, *probability, *cross]).float()
        self.topk_rows[:, rows] = torch.stack(
            [
                found.double() / k,
                probability[0].sum(-1),
                probability[1].sum(-1),
                *unnormalised,
                _discrete_kl(log_p, log_q),
                _discrete_kl(log_q, log_p),
            ]
        ).float()

    def result(self) -> list[Tensor]:
        """Floats, ids, flags; then the subset's three; then the top tokens' three."""
        sums = dict(zip(SUMS, self.sums, strict=True))
        fields = pair_fields(
            sums,
            *self.references,
            temperature=self.temperature,
            weights=self.weights,
            full=self.level == "full",
        )
        fields["margin_base"], fields["margin_other"] = self.margins
        if self.labels is not None:
            nll_base = fields["lse_base"] - self.label_logits[0] / self.temperature
            nll_other = fields["lse_other"] - self.label_logits[1] / self.temperature
            fields["nll_base"], fields["nll_other"] = nll_base, nll_other
            fields["prob_delta"] = torch.exp(-nll_other) - torch.exp(-nll_base)
        names = layout.pair_floats(self.level, self.labels is not None)
        broken = ~torch.isfinite(self.maxima)  # NaN, +inf, or nothing but −inf
        any_broken = broken.any(0)
        floats = torch.stack([fields[name] for name in names]).float()
        floats.masked_fill_(any_broken, float("nan"))
        ids = self.ids.masked_fill(broken, -1)
        flags = torch.stack(
            [ids[0] != ids[1], (self.margins == 0).any(0), fields["estimate_valid"]]
        )
        flags &= ~any_broken
        packed = [floats, ids, flags]
        if self.inner is not None:
            packed += self.inner.result()
        if self.topk:
            self.topk_floats.masked_fill_(any_broken[:, None], float("nan"))
            self.topk_rows.masked_fill_(any_broken, float("nan"))
            packed += [self.topk_floats, self.topk_rows, self.topk_ids]
        return packed


def _tile_elements(total: int, work: torch.dtype, device: torch.device) -> int:
    """Elements per scratch buffer: about 5 % of the logits' bytes in all, within bounds.

    The upper bound keeps a core tile in the second-level cache; the lower one keeps the cost of
    a launch small against its work.
    """
    bytes_per_element = 7 * 4 if work == torch.float32 else 9 * 8
    share = int(0.05 * 8 * total) // bytes_per_element
    low, high = (1 << 14, 1 << 16) if device.type == "cpu" else (1 << 20, 1 << 24)
    return max(low, min(high, share))


def take_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows of the flattened leading dimensions; a copy of just those where no view exists."""
    lead, width = tensor.shape[:-1], tensor.shape[-1]
    if len(lead) == 1:
        return tensor[start:stop]
    try:
        return tensor.view(-1, width)[start:stop]
    except RuntimeError:
        index = torch.arange(start, stop, device=tensor.device)
        return tensor[torch.unravel_index(index, lead)] if lead else tensor[None]


def _top2(logits: Tensor, width: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, its first index, and its lead over the runner-up (inf if there is none).

    Block maxima first: a plain `max` with indices is ten times slower than `amax`, and the
    runner-up is either the second best block or inside the best one.
    """
    vocab = logits.shape[1]
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


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest, descending; equal values in the order of their ids.

    One integer sort key per element: the float's order-preserving bit pattern, then the id.
    """
    bits = (logits.float() + 0.0).view(torch.int32).long()  # + 0.0 turns −0 into +0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    index = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    key = ordered.mul_(1 << 32).add_(index)
    return logits.shape[1] - 1 - (key.topk(k, -1).values & 0xFFFFFFFF)


def _discrete_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = torch.where(log_p == _NEG_INF, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp_min(0.0)
