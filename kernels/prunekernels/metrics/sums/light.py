"""Masses and divergences alone, of long rows on a CPU: what a KL, a log-normaliser or an NLL needs.

`PairSums` has eighteen sums to serve and finds ids, margins and excluded elements on its way; at
the sizes of one decoding step that bookkeeping takes longer than the four sums Σw, Σwx, Σv, Σvx.
Here a block of rows takes four calls of the library: x = b−a, w = e^{a/T}, v = e^{b/T} and one
batched product of the pieces of (w, v) with those of (1, x), which is all four sums. float32 holds
w and v, with all their digits, of logits such as most models write. Where it does not, or b−a is
far from 0, the rows' maxima are found and subtracted. Rows that hold −inf, NaN or +inf are left to
`PairSums`; so are, at temperatures that spread rows out, those whose weights would underflow: there
a CPU's exponential is many times slower.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prunekernels.metrics.closed_form import divergences, label_fields, log_normaliser
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.result_rows import PAIR_FLAGS, PAIR_IDS
from prunekernels.metrics.sums.eager import (
    DOT_ROW,
    GROUP_ROWS,
    PairSums,
)
from prunekernels.rows import take_rows

_DIRECTIONS = ("kl_base_other", "kl_other_base")
#: e^{−80} is far above the smallest normal number, near which a CPU's exponential is slow.
_REACH = 80.0
# Elements of a tile. a, b and what is made of them then stay in two cores' second-level caches;
# smaller tiles mean more calls, and each of these waits for all threads.
_TILE = 1 << 17
# Columns of one product. The library adds them up in float32 without cascading: of so few, with the
# pieces' sums added in float64, Σw errs by 1.1e-7 where torch's cascading sum errs by 2.2e-7.
_PIECE = 768
# b−a is summed as it is where max b and max a are this close: it costs no digit of a KL.
_CLOSE = 2.0
# Where they are further apart than this, b−a rounds too much: `PairSums` takes the difference off
# the larger of them first.
_APART = 16.0
# First logits of rows whose e^a is tried, and what it must sum to: beside that much, what float32
# cannot hold is nothing.
_TRIED, _LEAST = (-60.0, 40.0), 1e-4


def suffices(options: PairOptions, vocab: int, device: torch.device, subset: bool) -> bool:
    """Whether `LightSums` can take what is asked for."""
    return device.type == "cpu" and vocab >= DOT_ROW and not subset and options.light


class _Views(NamedTuple):
    """The buffers as tiles of one shape `(R, C)` use them.

    Attributes:
        x: b−a.
        weights: w and v.
        copies: a and b in float32; none where they are.
        left: `(R·P, 2, piece)`, w and v in pieces.
        right: `(R·P, piece, 2)`, 1 and x in pieces.
        products: `(R·P, 2, 2)`, of left and right.
    """

    x: Tensor
    weights: tuple[Tensor, Tensor]
    copies: Sequence[Tensor]
    left: Tensor
    right: Tensor
    products: Tensor


class LightSums:
    """The four sums of all rows, filled group by group; the interface of `PairSums`.

    Args:
        rows: N, rows in all.
        vocab: V.
        dtype: of the logits.
        labels: N ids or None.
        options: what is asked for.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        dtype: torch.dtype,
        labels: Tensor | None,
        options: PairOptions,
    ) -> None:
        self.shape, self.dtype, self.options = (rows, vocab), dtype, options
        self.labels = None if labels is None else labels.reshape(-1)
        # whether anything is averaged: masses alone need no x
        self.weighted = not options.asked.isdisjoint(_DIRECTIONS)
        buffers = 4 + 2 * (dtype != torch.float32)
        self.columns = -(-vocab // -(-vocab // _TILE))
        self.block_rows = min(max(1, _TILE // vocab), max(rows, 1))
        self.group_rows = max(self.block_rows, GROUP_ROWS)
        # 1, x, w and v in rows of whole pieces; then a and b where they are not float32
        whole = -(-self.columns // _PIECE) * _PIECE
        self.buffers = torch.empty(buffers, self.block_rows, whole)
        self.buffers[0].fill_(1.0)
        if whole != self.columns:
            self._clear(self.block_rows, self.columns)
        self.views: dict[torch.Size, _Views] = {}
        # α, β, Σw, Σv, Σwx, Σvx per row; what rows that are left to `general` hold is overwritten
        self.found = [[1.0] * rows for _ in range(6)]
        if labels is not None:
            self.label_logits = torch.zeros(2, rows, dtype=torch.float64)
        self.general: PairSums | None = None
        self.left: list[int] = []
        self.way = 0  # of `_WAYS`; where one fails some rows, it is likely to fail others

    def add(self, start: int, base: Tensor, other: Tensor) -> None:
        """Take rows `start …` from two `(R, V)` logit blocks."""
        for row in range(0, base.shape[0], self.block_rows):
            stop = min(row + self.block_rows, base.shape[0])
            rows = slice(start + row, start + stop)
            block = take_rows(base, row, stop), take_rows(other, row, stop)
            while not _WAYS[self.way](self, rows, *block):
                self.way += 1

    def _as_they_are(self, rows: slice, base: Tensor, other: Tensor) -> bool:
        """Sum with α = β = 0; False where a weight would be rounded, or b−a be far from 0."""
        if self.options.temperature != 1.0:  # a/T would round where a' is exact
            return False
        low, high = _TRIED
        firsts = base[:, 0].tolist() + other[:, 0].tolist()
        if not all(low < first < high for first in firsts):
            return False
        total = self._sums(base, other, None, None)
        gap = _CLOSE if self.weighted else math.inf
        for w, v, wx, vx in zip(*total, strict=True):
            # a comparison with NaN is False
            fit = _LEAST < w < math.inf and _LEAST < v < math.inf and math.isfinite(wx + vx)
            if not (fit and abs(math.log(v / w)) < gap):
                return False
        zeros = [0.0] * base.shape[0]
        self._hold(rows, base, other, [zeros, zeros, *total])
        return True

    def _below_maxima(self, rows: slice, base: Tensor, other: Tensor) -> bool:
        """Sum with α = max a and β = max b; False where that is not enough."""
        references = base.amax(-1, keepdim=True), other.amax(-1, keepdim=True)
        tops = [reference.squeeze(-1).tolist() for reference in references]
        gaps = [beta - alpha for alpha, beta in zip(*tops, strict=True)]
        # a comparison with NaN is False
        if not (all(abs(gap) < _APART for gap in gaps) and self._is_narrow(tops, base, other)):
            return False
        offsets, offset = [0.0] * len(gaps), None
        if any(abs(gap) > _CLOSE for gap in gaps):
            rounded = torch.tensor([gap if abs(gap) > _CLOSE else 0.0 for gap in gaps])
            offsets, offset = rounded.tolist(), rounded.unsqueeze(-1)
        total = self._sums(base, other, references, offset)
        for mass, moment in zip(total[:2], total[2:], strict=True):  # x relative to β−α
            for i, (gap, exact) in enumerate(zip(gaps, offsets, strict=True)):
                moment[i] -= (gap - exact) * mass[i]
        if not all(map(math.isfinite, itertools.chain(*tops, *total))):
            return False
        self._hold(rows, base, other, [*tops, *total])
        return True

    def _leave(self, rows: slice, base: Tensor, other: Tensor) -> bool:
        """Leave the rows to `PairSums`."""
        if self.general is None:
            device = torch.device("cpu")
            self.general = PairSums(
                *self.shape, device, self.dtype, self.labels, None, self.options
            )
        self.general.add(rows.start, base, other)
        self.left += range(rows.start, rows.stop)
        return True

    def _hold(self, rows: slice, base: Tensor, other: Tensor, found: list[list[float]]) -> None:
        for whole, part in zip(self.found, found, strict=True):
            whole[rows] = part
        if self.labels is not None:
            index = self.labels[rows, None]
            self.label_logits[0, rows] = base.gather(1, index).squeeze(1).double()
            self.label_logits[1, rows] = other.gather(1, index).squeeze(1).double()

    def _is_narrow(self, tops: list[list[float]], base: Tensor, other: Tensor) -> bool:
        """Whether no weight can underflow; not looked at where only few elements would."""
        temperature = self.options.temperature
        if temperature >= 1.0:
            return True
        lows = base.amin().item(), other.amin().item()
        # a comparison with NaN is False, and so is one of an infinite difference
        return all(
            max(top) - low < _REACH * temperature for top, low in zip(tops, lows, strict=True)
        )

    def _sums(
        self,
        base: Tensor,
        other: Tensor,
        references: tuple[Tensor, Tensor] | None,
        offset: Tensor | None,
    ) -> list[list[float]]:
        """Σw, Σv, Σwx and Σvx of each row; without references α = β = 0."""
        if self.columns == self.shape[1]:
            return self._tile(base, other, references, offset)
        total: list[list[float]] = []
        for column in range(0, self.shape[1], self.columns):
            tile = slice(column, column + self.columns)
            found = self._tile(base[:, tile], other[:, tile], references, offset)
            if total:
                both = zip(total, found, strict=True)
                found = [[x + y for x, y in zip(*sums, strict=True)] for sums in both]
            total = found
        return total

    def _tile(
        self,
        a: Tensor,
        b: Tensor,
        references: tuple[Tensor, Tensor] | None,
        offset: Tensor | None,
    ) -> list[list[float]]:
        """The sums of each row of a tile."""
        view = self.views.get(a.shape)
        if view is None:
            view = self.views[a.shape] = self._view(*a.shape)
        if a.shape[1] < self.columns:
            self._clear(*a.shape)
        if view.copies:
            a, b = (copy.copy_(x) for copy, x in zip(view.copies, (a, b), strict=True))
        if self.weighted:
            torch.sub(b, a, out=view.x)
            if offset is not None:
                view.x.sub_(offset)
        for side, (logits, weight) in enumerate(zip((a, b), view.weights, strict=True)):
            if references is not None:
                logits = torch.sub(logits, references[side], out=weight)
            if self.options.temperature != 1.0:
                logits = torch.mul(logits, 1.0 / self.options.temperature, out=weight)
            torch.exp(logits, out=weight)
        if not self.weighted:
            zeros = [0.0] * a.shape[0]
            return [*(weight.sum(-1).tolist() for weight in view.weights), zeros, zeros]
        # with `out`, autocast leaves the product in float32
        products = torch.bmm(view.left, view.right, out=view.products).view(a.shape[0], -1, 4)
        w, wx, v, vx = products.sum(1, dtype=torch.float64).t().tolist()
        return [w, v, wx, vx]

    def _view(self, rows: int, columns: int) -> _Views:
        _, x, w, v, *copies = self.buffers[:, :rows, :columns].unbind(0)
        pieces = self.buffers[:4, :rows].view(4, -1, _PIECE)
        left, right = pieces[2:].transpose(0, 1), pieces[:2].permute(1, 2, 0)
        return _Views(x, (w, v), copies, left, right, left.new_empty(left.shape[0], 2, 2))

    def _clear(self, rows: int, columns: int) -> None:
        """Let what follows the columns of rows in the pieces weigh nothing."""
        self.buffers[1:4, :rows, columns:].zero_()

    def result(self) -> list[Tensor]:
        """Floats, ids and flags; ids and flags were not asked for and mean nothing."""
        floats = self._floats()
        ids = torch.zeros(len(PAIR_IDS), self.shape[0], dtype=torch.int64)
        flags = torch.zeros(len(PAIR_FLAGS), self.shape[0], dtype=torch.bool)
        packed = [floats, ids, flags]
        if self.general is not None:
            for whole, part in zip(packed, self.general.result(), strict=True):
                whole[:, self.left] = part[:, self.left]
        return packed

    def _floats(self) -> Tensor:
        """The float fields, in numbers: the calls that tensors take cost as much as a row."""
        temperature, names = self.options.temperature, self.options.floats
        alpha, beta, w0, v0, w1, v1 = self.found
        fields: dict[str, list[float]] = {}
        if self.weighted:
            rows = zip(w0, v0, w1, v1, strict=True)
            both = [divergences(math.log, *row, temperature) for row in rows]
            for side, name in enumerate(_DIRECTIONS):
                fields[name] = [max(row[side], 0.0) for row in both]
        for name, references, masses in (("lse_base", alpha, w0), ("lse_other", beta, v0)):
            if name in names or self.labels is not None:
                each = zip(references, masses, strict=True)
                fields[name] = [log_normaliser(math.log, *row, temperature) for row in each]
        if self.labels is None:
            return torch.tensor([fields[name] for name in names], dtype=torch.float32)
        known = {name: torch.tensor(row, dtype=torch.float64) for name, row in fields.items()}
        known |= label_fields(known, self.label_logits, self.options)
        return torch.stack([known[name] for name in names]).float()


#: How rows are summed, the fastest first; each says whether it could.
_WAYS = (LightSums._as_they_are, LightSums._below_maxima, LightSums._leave)
