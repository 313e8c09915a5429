"""Masses and divergences alone, of long rows on a CPU: what a KL, a log-normaliser or an NLL needs.

`PairSums` has eighteen sums to serve and finds ids, margins and excluded elements on its way; at
the sizes of one decoding step that bookkeeping takes longer than the four sums Σw, Σwx, Σv, Σvx.
Here a block of rows takes nine passes in two buffers, w and v being e^{a/T} and e^{b/T} themselves:
float32 holds these, with all their digits, of logits such as most models write. Where it does not,
or b−a is far from 0, the rows' maxima are found and subtracted. Rows that hold −inf, NaN or +inf
are left to `PairSums`; so are, at temperatures that spread rows out, those whose weights would
underflow: there a CPU's exponential is many times slower.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from prunekernels.metrics.closed_form import label_fields, pair_fields
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.result_rows import PAIR_FLAGS, PAIR_IDS
from prunekernels.metrics.sums.eager import (
    DOT_ROW,
    GROUP_ROWS,
    PairSums,
    tile_elements,
)
from prunekernels.rows import take_rows

_DIRECTIONS = ("kl_base_other", "kl_other_base")
#: e^{−80} is far above the smallest normal number, near which a CPU's exponential is slow.
_REACH = 80.0
# Rows up to this long are summed in one tile: two would take twice the calls. Four tiles of half
# that size (a, b and two buffers) stay in a second-level cache of a megabyte or two.
_ONE_TILE = 1 << 17
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
        # whose weights x is averaged with: KL(p‖q) needs Σwx alone, KL(q‖p) Σvx
        asked = options.asked
        self.weighted = tuple(name in asked for name in _DIRECTIONS)
        buffers = 2 + 2 * (dtype != torch.float32)
        tile = tile_elements(rows * vocab, buffers, torch.float32, dtype, torch.device("cpu"))
        tile = max(tile, min(vocab, _ONE_TILE))
        self.columns = -(-vocab // -(-vocab // tile))
        self.block_rows = min(max(1, tile // vocab), max(rows, 1))
        self.group_rows = max(self.block_rows, GROUP_ROWS)
        self.buffers = torch.empty(buffers, self.block_rows, self.columns)
        self.views = {self.buffers.shape[1:]: self.buffers.unbind(0)}
        # α, β, Σw, Σv, Σwx, Σvx per row; what rows that are left to `general` hold is overwritten
        self.found = [[1.0] * rows for _ in range(6)]
        self.label_logits = torch.zeros(2, rows if labels is not None else 0, dtype=torch.float64)
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
        gap = _CLOSE if any(self.weighted) else math.inf
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
        weight, x, *copies = self._views(a.shape)
        if copies:
            a, b = copies[0].copy_(a), copies[1].copy_(b)
        if any(self.weighted):
            torch.sub(b, a, out=x)
            if offset is not None:
                x -= offset
        masses, moments = [], []
        for side, logits in enumerate((a, b)):
            if references is not None:
                logits = torch.sub(logits, references[side], out=weight)
            if self.options.temperature != 1.0:
                logits = torch.mul(logits, 1.0 / self.options.temperature, out=weight)
            torch.exp(logits, out=weight)
            masses.append(weight.sum(-1).tolist())
            if self.weighted[side]:
                torch.mul(weight, x, out=weight)
                moments.append(weight.sum(-1).tolist())
            else:
                moments.append([0.0] * a.shape[0])
        return masses + moments

    def _views(self, shape: torch.Size) -> tuple[Tensor, ...]:
        views = self.views.get(shape)
        if views is None:
            rows, columns = shape
            views = self.views[shape] = self.buffers[:, :rows, :columns].unbind(0)
        return views

    def result(self) -> list[Tensor]:
        """Floats, ids and flags; ids and flags were not asked for and mean nothing."""
        alpha, beta, w0, v0, w1, v1 = torch.tensor(self.found, dtype=torch.float64)
        named = {"W0": w0, "V0": v0, "W1": w1, "V1": v1}
        fields = pair_fields(named, alpha, beta, self.options, full=False)
        if self.labels is not None:
            fields |= label_fields(fields, self.label_logits, self.options)
        floats = torch.stack([fields[name] for name in self.options.floats]).float()
        ids = torch.zeros(len(PAIR_IDS), self.shape[0], dtype=torch.int64)
        flags = torch.zeros(len(PAIR_FLAGS), self.shape[0], dtype=torch.bool)
        packed = [floats, ids, flags]
        if self.general is not None:
            for whole, part in zip(packed, self.general.result(), strict=True):
                whole[:, self.left] = part[:, self.left]
        return packed


#: How rows are summed, the fastest first; each says whether it could.
_WAYS = (LightSums._as_they_are, LightSums._below_maxima, LightSums._leave)
