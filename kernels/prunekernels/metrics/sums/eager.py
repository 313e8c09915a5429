"""Chunked sums over the vocabulary for pairs of logit rows: the engine of the eager metrics.

Rows are taken a few at a time and summed in buffers that stay in cache and are reused, so the
extra memory does not grow with the vocabulary, and by some hundred bytes per row. "core" sums in
float32; "precise" and "full" run the same sums in float64, which leaves nothing to cancel.
b'−a' would have the roundings of both, which are large against a small x: hence x = (b−a)−(β−α).
Weights are cut off where they would vanish only if a row reaches that far down. Where masses and
divergences alone are asked for, `light` has less to do.
Mathematics: the module docstring of `closed_form`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prunekernels.metrics import needed_sums, result_rows, top_tokens
from prunekernels.metrics.closed_form import PHI_SUMS, SUMS, pack, pair_fields
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.partial import SUM_FIELDS

_LOG2E = math.log2(math.e)
_NEG_INF = float("-inf")
_ALMOST_ONE = math.nextafter(1.0, 0.0)
_INDEX = {name: row for row, name in enumerate(SUMS)}
_SECOND = ("JS", "TV", "HE")
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
# How far below its maximum a row may reach before weights are cut off: where squares of weights
# are summed, and where they are not.
_REACH = {True: 42.0, False: 80.0}
_SQUARES = ("R0", "S0", "C0", "R1", "S1", "Pw")
_OF_ONE_ROW = frozenset((*needed_sums.MASSES, "Wy", "Vy"))  # these need no x
# A row's dot product by the library reads it once, where a product and its sum take three passes.
# Torch's own sums cascade, the library's do not: in float32 it takes the second moments, of which
# figures with a relative error of millionths are made. Shorter rows cost more calls than that.
_BY_DOT = frozenset(("W2", "V2", "R1", "S1", "R2", "S2", "U2"))
DOT_ROW = 1 << 12
# Columns of a tile on a CPU at most: of more, float32 sums round too much. A call on one such row
# runs in one thread; several rows keep several busy, and so do pieces of one row below one another.
_COLUMNS = 1 << 15
_PIECES = 1 << 17  # elements of a tile of such pieces at most
# Columns that a weight's sum adds in one go: small terms that follow a large one are rounded to its
# digits. Of several likely tokens, entropies erred by 1.6 of what is allowed; by 0.8 in such runs.
_RUN = 256
_KEPT_SHARE = 0.04  # of the logits' bytes, at most, for the weights of a block of whole rows


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
        self.full = options.second_pass
        self.reach = _REACH[not self.needed.isdisjoint(_SQUARES)] * self.temperature
        self.dots = device.type == "cpu" and vocab >= DOT_ROW
        buffers = 6 + 2 * (dtype != self.work) + bool(self.full)
        tile = tile_elements(rows * vocab, buffers, self.work, dtype, device)
        longest = min(tile, _COLUMNS) if device.type == "cpu" else tile
        # a GPU's sum is a tree already, and float64 needs none
        self.runs = device.type == "cpu" and self.work == torch.float32
        if self.runs:
            longest -= longest % _RUN
        self.columns = -(-vocab // -(-vocab // longest))  # as many in each tile of a row
        if self.runs and self.columns < vocab:
            self.columns = -(-self.columns // _RUN) * _RUN
        self.block_rows = min(tile // self.columns, max(rows, 1))
        self.pieces = 1
        if self.block_rows == 1:
            self.pieces = max(1, min(tile, _PIECES, vocab) // self.columns)
        # Finding the maxima takes few bytes per row but many small launches: more rows at once.
        self.group_rows = max(self.block_rows, GROUP_ROWS)
        # Whether the second pass finds the weights that the first pass took.
        weights = 2 * self.work.itemsize * max(self.block_rows * vocab, tile)
        self.keeps = bool(self.full) and weights <= _KEPT_SHARE * 2 * dtype.itemsize * rows * vocab
        self.one = torch.ones((), dtype=self.work, device=device)
        self.masked = False
        self.wide = True  # whether weights are cut off
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[tuple[str, torch.Size], Tensor] = {}
        self.rows_of: dict[int, tuple[Tensor, ...]] = {}  # by the id of a view

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.sums = zeros(len(SUMS), rows)
        self.references = zeros(2, rows)  # α, β
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
        self._split_gaps(rows)
        for row in range(0, base.shape[0], self.block_rows):
            block = slice(row, row + self.block_rows)
            self._add_block(start + row, base[block], other[block])
        if self.topk:
            self._top_tokens(rows, base, other)
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
        self.wide = self._is_wide(rows, base, other)
        total = self._first_pass(rows, base, other)
        if not self.masked and not bool(torch.isfinite(total).all()):
            # A −inf makes x infinite or undefined. Do the block again and look at each element;
            # a masked vocabulary is likely masked in every row, so keep looking from here on.
            self.masked = True
            total = self._first_pass(rows, base, other)
        self.sums[:, rows] = total
        if self.full:
            self._second_pass(rows, base, other)

    def _is_wide(self, rows: slice, base: Tensor, other: Tensor) -> bool:
        """Whether some logit lies so far below its row's reference that weights are cut off."""
        if self.work == torch.float64 or base.device.type != "cpu":
            return True
        tops = self.references[:, rows].amax(-1).tolist()
        lows = base.amin().item(), other.amin().item()
        # NaN compares as False
        return not all(top - low < self.reach for top, low in zip(tops, lows, strict=True))

    def _buffer(self, name: str, shape: torch.Size) -> Tensor:
        view = self.views.get((name, shape))
        if view is None:
            if name not in self.buffers:
                self.buffers[name] = torch.empty(
                    self.block_rows * self.pieces * self.columns,
                    dtype=self.work,
                    device=self.sums.device,
                )
            view = self.buffers[name][: shape.numel()].view(shape)
            self.views[name, shape] = view
            if self.dots:
                self.rows_of[id(view)] = view.unbind(0)
        return view

    def _load(self, name: str, tile: Tensor) -> Tensor:
        return tile if tile.dtype == self.work else self._buffer(name, tile.shape).copy_(tile)

    def _powers(
        self, rows: slice, tile: int, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a', b', w, v of one tile, in buffers of these names (a', b' only if they are summed).

        Where weights are kept, each tile has buffers of its own for them.
        """
        found = []
        for logits, side, shifted, weight, total in (
            (a, 0, "xa", "w", "Wy"),
            (b, 1, "xb", "v", "Vy"),
        ):
            reference = self.references[side, rows, None].to(self.work)
            out = self._buffer(f"{weight}{tile}" if self.keeps else weight, a.shape)
            x = self._buffer(shifted, a.shape) if total in self.needed else out
            torch.sub(logits, reference, out=x)
            found += [x, self._power(x, out)]
        return found[0], found[2], found[1], found[3]

    def _power(self, x: Tensor, out: Tensor) -> Tensor:
        """e^{x/T}: in float32 without the rounding of x·log2(e), in float64 the faster 2^x."""
        if self.work == torch.float64:
            return torch.mul(x, _LOG2E / self.temperature, out=out).exp2_()
        if self.temperature != 1.0:
            x = torch.mul(x, 1.0 / self.temperature, out=out)
        if not self.wide:
            return torch.exp(x, out=out)
        torch.clamp_min(x, _UNDERFLOW, out=out).exp_()
        return torch.nn.functional.threshold(out, _NEGLIGIBLE, 0.0, inplace=True)

    def _first_pass(self, rows: slice, base: Tensor, other: Tensor) -> Tensor:
        total = torch.zeros(len(SUMS), base.shape[0], dtype=torch.float64, device=base.device)
        part = total.new_empty(0, 0)
        slots: dict[str, Tensor] = {}
        found: dict[str, list[float]] = {}
        in_runs: dict[str, Tensor] = {}  # of a tile, still to be added up

        def needs(*names: str) -> bool:
            return not self.needed.isdisjoint(names)

        def add(name: str, value: Tensor) -> None:
            if name not in self.needed:
                return
            if name in _OF_ONE_ROW and self.runs:
                in_runs[name] = _sums_of_runs(value)
            else:
                torch.sum(value, -1, out=slots[name])

        def rows_of(tensor: Tensor) -> tuple[Tensor, ...]:
            known = self.rows_of.get(id(tensor)) or of_inputs.get(id(tensor))
            if known is None:
                known = of_inputs[id(tensor)] = tensor.unbind(0)
            return known

        def dot(name: str, left: Tensor, right: Tensor) -> None:
            if name not in self.needed:
                return
            if not (self.dots and (name in _BY_DOT or self.work == torch.float64)):
                add(name, torch.mul(left, right, out=self._buffer("product", left.shape)))
                return
            both = zip(rows_of(left), rows_of(right), strict=True)
            so_far = found.get(name)
            values = [torch.dot(x, y).item() for x, y in both]
            found[name] = values if len(values) == total.shape[1] else [sum(values)]
            if so_far is not None:
                found[name] = [x + y for x, y in zip(so_far, found[name], strict=True)]

        of_a, of_b, gap = self.gaps[:, rows, None]
        for tile, tile_a, tile_b in self._tiles(base, other):
            if part.shape[1] != tile_a.shape[0]:
                part = total.new_zeros(len(SUMS), tile_a.shape[0], dtype=self.work)
                slots = dict(zip(SUMS, part, strict=True))
            a, b = self._load("a", tile_a), self._load("b", tile_b)
            of_inputs: dict[int, tuple[Tensor, ...]] = {}
            xa, xb, w, v = self._powers(rows, tile, a, b)
            slots["n"].fill_(a.shape[1])
            holes = None
            if self.masked:
                a, b, holes = self._without_holes(a, b, xa, xb, slots)
            add("W0", w)
            add("V0", v)
            dot("Wy", w, xa)
            dot("Vy", v, xb)
            if in_runs:
                sums = torch.stack(list(in_runs.values())).sum(-1, dtype=torch.float64)
                total[[_INDEX[name] for name in in_runs]] += _of_rows(sums, len(base))
            if self.needed <= _OF_ONE_ROW:
                total += _of_rows(part, len(base))
                continue
            # From here on the buffers of a' and b' hold what is short-lived.
            x = torch.sub(b, a, out=self._buffer("x", a.shape))
            dot("Z2", a, a)
            dot("ZZ", a, b)
            dot("B2", b, b)
            dot("Zd", a, x)
            dot("D2", x, x)
            if needs("L1"):
                add("L1", torch.abs(x, out=self._buffer("xa", a.shape)))
            if self.apart:
                torch.sub(b, of_b, out=x).sub_(torch.sub(a, of_a, out=self._buffer("xa", a.shape)))
            x.sub_(gap)
            if holes is not None:
                x.masked_fill_(holes, 0.0)
            add("U1", x)
            dot("U2", x, x)
            dot("W1", w, x)
            dot("V1", v, x)
            dot("R0", w, w)
            dot("S0", v, v)
            dot("C0", w, v)
            if needs("W2", "R1", "R2"):
                weighted = torch.mul(w, x, out=self._buffer("xa", a.shape))
                dot("W2", weighted, x)
                dot("R1", weighted, w)
                dot("R2", weighted, weighted)
            if needs("V2", "S1", "S2"):
                weighted = torch.mul(v, x, out=self._buffer("xa", a.shape))
                dot("V2", weighted, x)
                dot("S1", weighted, v)
                dot("S2", weighted, weighted)
            if needs("Pw", "P2"):
                rho = torch.sub(v, w, out=self._buffer("xb", a.shape))
                dot("Pw", w, rho)
                dot("P2", rho, rho)
            total += _of_rows(part, len(base))
        for name, values in found.items():
            total[_INDEX[name]] = torch.tensor(values, dtype=torch.float64)
        return total

    def _without_holes(
        self, a: Tensor, b: Tensor, xa: Tensor, xb: Tensor, slots: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zero what is −inf in a', b' (in place), a and b (copies); count the kinds of holes."""
        hole_a, hole_b = a == _NEG_INF, b == _NEG_INF
        for x, hole, name in ((xa, hole_a, "Wy"), (xb, hole_b, "Vy")):
            if name in self.needed:  # else x is w or v, which is 0 there
                x.masked_fill_(hole, 0.0)
        holes = hole_a | hole_b
        slots["only_base"].copy_((hole_a > hole_b).sum(-1))
        slots["only_other"].copy_((hole_b > hole_a).sum(-1))
        slots["n"].sub_((hole_a & hole_b).sum(-1))
        a = self._buffer("a", a.shape).copy_(a).masked_fill_(holes, 0.0)
        b = self._buffer("b", b.shape).copy_(b).masked_fill_(holes, 0.0)
        return a, b, holes

    def _tiles(self, base: Tensor, other: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number and columns of each tile of a block of rows.

        As many as `pieces` of them, of a row alone, stand below one another, as those of rows do.
        """
        rows, vocab = base.shape
        tile, start = 0, 0
        while start < vocab:
            pieces = max(1, min(self.pieces, (vocab - start) // self.columns))
            stop = min(start + pieces * self.columns, vocab)
            shape = rows * pieces, (stop - start) // pieces
            yield tile, base[:, start:stop].view(shape), other[:, start:stop].view(shape)
            tile, start = tile + 1, stop

    def _second_pass(self, rows: slice, base: Tensor, other: Tensor) -> None:
        """Jensen–Shannon, total variation and Hellinger: they need both normalisers first.

        With m = (p+q)/2 and s = (q−p)/(q+p): p = m(1−s), q = m(1+s), and
        2·JS = Σ p·ln(1−s) + q·ln(1+s), whose rounding is p's and q's own: where 1−s or 1+s loses
        digits, the weight before its logarithm is as small.
        """
        w0 = self.sums[_INDEX["W0"], rows, None]
        ratio = w0 / self.sums[_INDEX["V0"], rows, None]
        found = self.sums[[_INDEX[name] for name in _SECOND], rows]
        js, tv, he = found
        for tile, tile_a, tile_b in self._tiles(base, other):
            shape = tile_a.shape
            if self.keeps:
                p, q = self._buffer(f"w{tile}", shape), self._buffer(f"v{tile}", shape)
            else:
                a, b = self._load("a", tile_a), self._load("b", tile_b)
                _, _, p, q = self._powers(rows, tile, a, b)
            s, log = self._buffer("xa", shape), self._buffer("xb", shape)
            q.mul_(ratio)  # both are W0 times what they are called
            torch.sub(q, p, out=s)
            if "total_variation" in self.full:
                tv += _of_rows(torch.abs(s, out=log).sum(-1), len(base))
            if "js" in self.full:
                js += _of_rows(self._twice_js(p, q, s, log), len(base))
            if "hellinger" in self.full:
                he += _of_rows(q.sqrt_().sub_(p.sqrt_()).square_().sum(-1), len(base))
        self.sums[[_INDEX[name] for name in _SECOND], rows] = found / w0[:, 0]

    def _twice_js(self, p: Tensor, q: Tensor, s: Tensor, log: Tensor) -> Tensor:
        """Σ p·ln(1−s) + q·ln(1+s) of each row; `s` holds q−p, `log` is scratch memory."""
        torch.div(s, torch.add(p, q, out=log), out=s)
        first = self._dots(torch.add(s, 1.0, out=log).log_(), q)
        total = first + self._dots(torch.sub(self.one, s, out=log).log_(), p)
        if bool(torch.isfinite(total).all()):
            return total
        # |s| = 1 makes 0·(−inf) of the empty side, and 0/0 was where both are.
        s.nan_to_num_(0.0).clamp_(-_ALMOST_ONE, _ALMOST_ONE)
        first = torch.add(s, 1.0, out=log).log_().mul_(q).sum(-1)
        return first + torch.sub(self.one, s, out=log).log_().mul_(p).sum(-1)

    def _dots(self, left: Tensor, right: Tensor) -> Tensor:
        """Products of the rows of two buffers, summed."""
        if not self.dots:
            return torch.mul(left, right, out=left).sum(-1)
        both = zip(self.rows_of[id(left)], self.rows_of[id(right)], strict=True)
        sums = [torch.dot(x, y).item() for x, y in both]
        return torch.tensor(sums, dtype=torch.float64)

    def _top_tokens(self, rows: slice, base: Tensor, other: Tensor) -> None:
        norms = torch.log(self.sums[[_INDEX["W0"], _INDEX["V0"]], rows])
        found = top_tokens.compare(
            (base, other),
            self.references[:, rows],
            norms,
            self.temperature,
            self.topk,
            reads=True,
            exact_masses=self.work == torch.float64,
            tail_rows=self.block_rows,
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
        if not self.masked:  # nothing was excluded
            del named["only_base"], named["only_other"]
        fields = pair_fields(named, alpha, beta, self.options, full=bool(self.full))
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


def _of_rows(sums: Tensor, rows: int) -> Tensor:
    """Sums `(…, R)` of rows from those of what stood below one another in a tile."""
    if sums.shape[-1] == rows:
        return sums
    return torch.unflatten(sums, -1, (rows, -1)).sum(-1, dtype=torch.float64)


def _sums_of_runs(values: Tensor) -> Tensor:
    """Sums `(R, ⌈C / _RUN⌉)` of `(R, C)` values, `_RUN` neighbours each."""
    whole = values.shape[1] // _RUN * _RUN
    runs = torch.unflatten(values[:, :whole], 1, (-1, _RUN)).sum(-1)
    if whole < values.shape[1]:
        runs = torch.cat([runs, values[:, whole:].sum(-1, keepdim=True)], 1)
    return runs


def tile_elements(
    total: int, buffers: int, work: torch.dtype, dtype: torch.dtype, device: torch.device
) -> int:
    """Elements per buffer, so that all of them take about 5 % of the bytes of the logits.

    The upper bound keeps a tile's buffers in the second-level cache. On a CPU buffers take at least
    a megabyte, and three where the logits are a few megabytes themselves: the cost of a call, which
    waits for all threads, shall stay small against its work.
    """
    logits = 2 * dtype.itemsize * total
    share = int(0.05 * logits) // (buffers * work.itemsize)
    if device.type == "cpu":
        least = (3 << 20) if logits < (8 << 20) else (1 << 20)
        return max(least // (buffers * work.itemsize), min(1 << 18, share))
    return max(1 << 20, min(1 << 24, share))
