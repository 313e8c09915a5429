"""Chunked sums over the vocabulary for pairs of logit rows: the engine of the eager metrics.

Rows are taken a few at a time and summed in buffers that stay in cache and are reused, so the
extra memory does not grow with the vocabulary, and by some hundred bytes per row. "core" sums in
float32; "precise" and "full" run the same sums in float64, which leaves nothing to cancel.
b'−a' would have the roundings of both, which are large against a small x: hence x = (b−a)−(β−α).
Mathematics: the module docstring of `closed_form`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunekernels.metrics import result_rows, top_tokens
from prunekernels.metrics.closed_form import PHI_SUMS, SUMS, pack, pair_fields
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.partial import SUM_FIELDS

_LOG2E = math.log2(math.e)
_NEG_INF = float("-inf")
_ALMOST_ONE = math.nextafter(1.0, 0.0)
_INDEX = {name: row for row, name in enumerate(SUMS)}
_TINY = torch.finfo(torch.float64).tiny
GROUP_ROWS = 64
# Sums of weights, of them times x, and times x².
_MOMENTS = tuple(
    [_INDEX[name] for name in names]
    for names in (
        ("W0", "V0", "R0", "S0", "n"),
        ("W1", "V1", "R1", "S1", "U1"),
        ("W2", "V2", "R2", "S2", "U2"),
    )
)
# Smaller weights (the top token's is 1) vanish in float32 sums over any vocabulary, but their
# squares would be subnormal numbers, on which a CPU is many times slower.
_NEGLIGIBLE = 2.0**-62
_UNDERFLOW = -44.0  # its exponential is negligible, and exp itself is slow where it underflows


class PairSums:
    """The sums of all rows, filled group by group, and the scratch memory they need.

    Args:
        rows: N, rows in all.
        vocab: V.
        device: of the logits.
        dtype: of the logits; decides how many buffers a tile needs.
        labels: N ids or None.
        subset: ids or None.
        options: what is asked for, and with it which sums are taken.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        device: torch.device,
        dtype: torch.dtype,
        labels: Tensor | None,
        subset: Tensor | None,
        options: PairOptions,
    ) -> None:
        self.options, self.temperature, self.topk = options, options.temperature, options.topk
        self.labels = None if labels is None else labels.reshape(-1)
        self.work = torch.float64 if options.precise else torch.float32
        self.needed = options.sums(float32=False)
        self.full = bool(options.second_pass)
        tile = _tile_elements(rows * vocab, self.work, dtype, device)
        self.columns = min(vocab, tile)
        self.block_rows = min(max(1, tile // vocab), max(rows, 1))
        # Finding the maxima takes few bytes per row but many small launches: more rows at once.
        self.group_rows = max(self.block_rows, GROUP_ROWS)
        self.masked = False
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[tuple[str, torch.Size], Tensor] = {}

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.sums = zeros(len(SUMS), rows)
        self.references = zeros(2, rows)  # α, β
        # Only second moments lose digits by the roundings of b'−a', which costs an operation less.
        self.centred = not self.needed.isdisjoint(("W2", "V2", "R1", "S1", "U1"))
        self.gaps = zeros(3, rows, dtype=self.work)  # of K: see `_split_gaps`
        self.apart = False
        self.maxima = zeros(2, rows)
        self.margins = zeros(2, rows)
        self.ids = zeros(2, rows, dtype=torch.int64)
        self.label_logits = zeros(2, rows if labels is not None else 0)
        self.topk_floats = zeros(len(result_rows.TOPK_FLOATS), rows, self.topk, dtype=torch.float32)
        self.topk_rows = zeros(len(result_rows.TOPK_ROWS), rows, dtype=torch.float32)
        self.topk_ids = zeros(len(result_rows.TOPK_IDS), rows, self.topk, dtype=torch.int64)
        self.subset = subset
        self.inner: PairSums | None = None
        if subset is not None:
            size, inner = subset.numel(), options.of_subset
            self.inner = PairSums(rows, size, device, dtype, None, None, inner)

    def add(self, start: int, base: Tensor, other: Tensor) -> None:
        """Take rows `start …` from two `(R, V)` logit blocks."""
        rows = slice(start, start + base.shape[0])
        for side, logits in enumerate((base, other)):
            maximum, index, margin = top_tokens.leader(logits)
            self.maxima[side, rows] = maximum
            self.margins[side, rows] = margin
            self.ids[side, rows] = index
        at_top = other.gather(1, self.ids[0, rows, None]).squeeze(1).double()
        far = self.maxima[1, rows] - at_top > 20.0 * self.temperature
        beta = torch.where(far, self.maxima[1, rows], at_top)
        # Of a row that holds nothing but −inf any number will do; −inf itself would make NaN.
        self.references[0, rows] = self.maxima[0, rows].nan_to_num(math.nan, neginf=0.0)
        self.references[1, rows] = beta.nan_to_num(math.nan, neginf=0.0)
        if self.labels is not None:
            index = self.labels[rows, None]
            self.label_logits[0, rows] = base.gather(1, index).squeeze(1).double()
            self.label_logits[1, rows] = other.gather(1, index).squeeze(1).double()
        if self.centred:
            self._split_gaps(rows)
        for row in range(0, base.shape[0], self.block_rows):
            block = slice(row, row + self.block_rows)
            self._add_block(start + row, base[block], other[block])
        if self.centred:
            self._centre(rows)
        if self.inner is not None and self.subset is not None:
            self.inner.add(
                start, base.index_select(1, self.subset), other.index_select(1, self.subset)
            )

    def _split_gaps(self, rows: slice) -> None:
        """K = β−α, rounded: x = ((b−Kb)−(a−Ka))−K0, where two of Ka, Kb and K0 are 0.

        b−a is exact in float64, and in float32 where logits differ by less than a factor of 2.
        Where K is so large that those near the references do not, it comes off the larger of them
        first, which is then exact.
        """
        alpha, beta = self.references[:, rows]
        whole = (beta - alpha).to(self.work)
        apart = whole.abs() > 0.49 * torch.maximum(alpha.abs(), beta.abs())
        apart &= self.work == torch.float32
        of_b = beta.abs() > alpha.abs()
        self.gaps[0, rows] = torch.where(apart & ~of_b, -whole, 0.0)
        self.gaps[1, rows] = torch.where(apart & of_b, whole, 0.0)
        self.gaps[2, rows] = torch.where(apart, 0.0, whole)
        self.apart = bool(apart.any())

    def _centre(self, rows: slice) -> None:
        """Let sums be those of x relative to β−α, not to K."""
        of_a, of_b, rest = self.gaps[:, rows].double()
        shift = self.references[1, rows] - self.references[0, rows] - (of_b - of_a + rest)
        zeroth, first, second = (self.sums[index][:, rows] for index in _MOMENTS)
        self.sums[_MOMENTS[2], rows] = second - shift * (2.0 * first - shift * zeroth)
        self.sums[_MOMENTS[1], rows] = first - shift * zeroth

    def _add_block(self, start: int, base: Tensor, other: Tensor) -> None:
        rows = slice(start, start + base.shape[0])
        total = self._first_pass(rows, base, other)
        if not self.masked and not bool(torch.isfinite(total).all()):
            # A −inf makes x infinite or undefined. Do the block again and look at each element;
            # a masked vocabulary is likely masked in every row, so keep looking from here on.
            self.masked = True
            total = self._first_pass(rows, base, other)
        self.sums[:, rows] = total
        if self.full:
            self._second_pass(rows, base, other)
        if self.topk:
            self._top_tokens(rows, base, other)

    def _buffer(self, name: str, shape: torch.Size) -> Tensor:
        view = self.views.get((name, shape))
        if view is None:
            if name not in self.buffers:
                self.buffers[name] = torch.empty(
                    self.block_rows * self.columns, dtype=self.work, device=self.sums.device
                )
            view = self.buffers[name][: shape.numel()].view(shape)
            self.views[name, shape] = view
        return view

    def _load(self, name: str, tile: Tensor) -> Tensor:
        return tile if tile.dtype == self.work else self._buffer(name, tile.shape).copy_(tile)

    def _powers(self, rows: slice, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a', b', w, v of one tile, in buffers of these names."""
        shift = self.references[:, rows].to(self.work).unsqueeze(-1)
        xa = torch.sub(a, shift[0], out=self._buffer("xa", a.shape))
        xb = torch.sub(b, shift[1], out=self._buffer("xb", a.shape))
        return xa, xb, self._power(xa, "w"), self._power(xb, "v")

    def _power(self, x: Tensor, name: str) -> Tensor:
        """e^{x/T}: in float32 without the rounding of x·log2(e), in float64 the faster 2^x."""
        out = self._buffer(name, x.shape)
        if self.work == torch.float64:
            return torch.mul(x, _LOG2E / self.temperature, out=out).exp2_()
        torch.mul(x, 1.0 / self.temperature, out=out).clamp_min_(_UNDERFLOW).exp_()
        return torch.nn.functional.threshold(out, _NEGLIGIBLE, 0.0, inplace=True)

    def _first_pass(self, rows: slice, base: Tensor, other: Tensor) -> Tensor:
        total = torch.zeros(len(SUMS), base.shape[0], dtype=torch.float64, device=base.device)
        part = total.to(self.work, copy=True)
        slots = dict(zip(SUMS, part, strict=True))
        product: Tensor

        def needs(*names: str) -> bool:
            return not self.needed.isdisjoint(names)

        def add(name: str, value: Tensor) -> None:
            if name in self.needed:
                torch.sum(value, -1, out=slots[name])

        def dot(name: str, left: Tensor, right: Tensor) -> None:
            if name in self.needed:
                torch.sum(torch.mul(left, right, out=product), -1, out=slots[name])

        of_a, of_b, gap = self.gaps[:, rows, None]
        for tile_a, tile_b in zip(
            torch.split(base, self.columns, 1), torch.split(other, self.columns, 1), strict=True
        ):
            a, b = self._load("a", tile_a), self._load("b", tile_b)
            product = self._buffer("product", a.shape)
            xa, xb, w, v = self._powers(rows, a, b)
            slots["n"].fill_(a.shape[1])
            holes = None
            if self.masked:
                a, b, holes = self._without_holes(a, b, xa, xb, slots)
            x = self._buffer("x", a.shape)
            if self.centred or needs("Z2", "D2", "L1"):
                torch.sub(b, a, out=x)
            if needs("Z2", "D2", "L1"):
                dot("Z2", a, a)
                dot("ZZ", a, b)
                dot("B2", b, b)
                dot("Zd", a, x)
                dot("D2", x, x)
                add("L1", torch.abs(x, out=product))
            if self.apart:
                torch.sub(b, of_b, out=x).sub_(torch.sub(a, of_a, out=product))
            if self.centred:
                x.sub_(gap)
            elif needs("V1", "W1"):
                torch.sub(xb, xa, out=x)
            if holes is not None:
                x.masked_fill_(holes, 0.0)
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
            if needs("W1", "W2", "R1"):
                weighted = torch.mul(w, x, out=xa)
                add("W1", weighted)
                dot("W2", weighted, x)
                dot("R1", weighted, w)
                dot("R2", weighted, weighted)
            if needs("V2", "S1"):
                weighted = torch.mul(v, x, out=xa)
                dot("V2", weighted, x)
                dot("S1", weighted, v)
                dot("S2", weighted, weighted)
            if needs("Pw"):
                rho = torch.sub(v, w, out=xb)
                dot("Pw", w, rho)
                dot("P2", rho, rho)
            total += part
        return total

    def _without_holes(
        self, a: Tensor, b: Tensor, xa: Tensor, xb: Tensor, slots: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zero what is −inf in a', b' (in place), a and b (copies); count the kinds of holes."""
        hole_a, hole_b = a == _NEG_INF, b == _NEG_INF
        xa.masked_fill_(hole_a, 0.0)
        xb.masked_fill_(hole_b, 0.0)
        holes = hole_a | hole_b
        slots["only_base"].copy_((hole_a > hole_b).sum(-1))
        slots["only_other"].copy_((hole_b > hole_a).sum(-1))
        slots["n"].sub_((hole_a & hole_b).sum(-1))
        a = self._buffer("a", a.shape).copy_(a).masked_fill_(holes, 0.0)
        b = self._buffer("b", b.shape).copy_(b).masked_fill_(holes, 0.0)
        return a, b, holes

    def _second_pass(self, rows: slice, base: Tensor, other: Tensor) -> None:
        """Jensen–Shannon, total variation and Hellinger: they need both normalisers first.

        With m = (p+q)/2 and s = (q−p)/(q+p): p = m(1−s), q = m(1+s), and
        2·JS = Σ p·log1p(−s) + q·log1p(s).
        """
        w0 = self.sums[_INDEX["W0"], rows, None]
        v0 = self.sums[_INDEX["V0"], rows, None]
        js, tv, he = (self.sums[_INDEX[name], rows] for name in ("JS", "TV", "HE"))
        for tile_a, tile_b in zip(
            torch.split(base, self.columns, 1), torch.split(other, self.columns, 1), strict=True
        ):
            a, b = self._load("a", tile_a), self._load("b", tile_b)
            s, log, p, q = self._powers(rows, a, b)
            p.div_(w0)
            q.div_(v0)
            torch.sub(q, p, out=s)
            tv += torch.abs(s, out=log).sum(-1)
            # The smallest float keeps 0/0 out; |s| = 1 would make 0·(−inf) of the empty side.
            torch.add(p, q, out=log).add_(_TINY)
            s.div_(log).clamp_(-_ALMOST_ONE, _ALMOST_ONE)
            js += torch.log1p(s, out=log).mul_(q).sum(-1)
            js += torch.log1p(s.neg_(), out=log).mul_(p).sum(-1)
            he += q.sqrt_().sub_(p.sqrt_()).square_().sum(-1)

    def _top_tokens(self, rows: slice, base: Tensor, other: Tensor) -> None:
        norms = torch.log(self.sums[[_INDEX["W0"], _INDEX["V0"]], rows])
        found = top_tokens.compare(
            (base, other), self.references[:, rows], norms, self.temperature, self.topk, reads=True
        )
        for whole, part in zip(
            (self.topk_floats, self.topk_rows, self.topk_ids), found, strict=True
        ):
            whole[:, rows] = part

    def state(self, offset: int) -> Tensor:
        """The sums as a mergeable state `(N, F)` of columns whose first has id `offset`."""
        empty = self.maxima == _NEG_INF
        seconds = (self.maxima - self.margins).masked_fill(empty, _NEG_INF)
        labels = self.label_logits if self.labels is not None else torch.zeros_like(self.maxima)
        references = self.references.masked_fill(empty, _NEG_INF)
        ids = (self.ids + offset).double().masked_fill(empty, 0.0)
        head = (references, self.maxima, seconds, ids, labels)
        held = torch.zeros_like(self.sums[:1])  # known to the op
        named = dict(zip(SUMS, self.sums, strict=True))
        rows = [*torch.cat([*head, held]), *(named[name] for name in SUM_FIELDS if name in named)]
        if self.options.precise and "W1" in self.needed:  # float64 sums: nothing cancels
            t1, t2 = named["W1"] / self.temperature, named["V1"] / self.temperature
            gap = named["V0"] - named["W0"]
            rows += [gap, gap - t1, t2 - gap]
        else:
            rows += [torch.zeros_like(named["W0"])] * len(PHI_SUMS)
        return torch.stack(rows, -1)

    def result(self) -> list[Tensor]:
        """Floats, ids, flags; then the subset's three; then the top tokens' three."""
        alpha, beta = self.references
        named = dict(zip(SUMS, self.sums, strict=True))
        fields = pair_fields(named, alpha, beta, self.options, full=self.full)
        packed = pack(
            fields,
            self.maxima,
            self.margins,
            self.ids,
            None if self.labels is None else self.label_logits,
            self.options,
        )
        if self.inner is not None:
            packed += self.inner.result()
        if self.topk:
            any_broken = ~torch.isfinite(self.maxima).all(0)
            self.topk_floats.masked_fill_(any_broken[:, None], float("nan"))
            self.topk_rows.masked_fill_(any_broken, float("nan"))
            packed += [self.topk_floats, self.topk_rows, self.topk_ids]
        return packed


def _tile_elements(total: int, work: torch.dtype, dtype: torch.dtype, device: torch.device) -> int:
    """Elements per buffer, so that all of them take about 5 % of the bytes of the logits.

    The upper bound keeps a tile's buffers in the last-level cache, the lower one keeps the cost of
    a launch small against its work. (Measured on two CPU cores at 64 × 49152, float32, core: 47 ms
    with tiles of 2¹⁶ elements, which fit the second-level cache, 22 ms with 2¹⁸.)
    """
    buffers = 6 if dtype == work else 8
    share = int(0.05 * 2 * dtype.itemsize * total) // (buffers * work.itemsize)
    low, high = (1 << 14, 1 << 18) if device.type == "cpu" else (1 << 20, 1 << 24)
    return max(low, min(high, share))
