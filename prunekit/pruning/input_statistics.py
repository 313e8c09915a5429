"""Statistics of a matrix's inputs, summed while its layer runs.

Hooks read the inputs of the modules that hold the matrices; matrices of one input group (q, k and
v) share one `InputStatistics`. Sums are all-reduced, so every process prunes alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.models.weight_refs import WeightRef
from prunekit.process import distributed
from prunekit.pruning import sparsegpt

_SQUARED_TOGETHER = 64  # rows whose squares a CPU forms at once

SAMPLED_ROWS = 128  # inputs per group, over all batches, on which output errors are measured


class InputStatistics:
    """Sums over all calibration tokens that enter one input group.

    Args:
        width: Number of inputs.
        device: Where the sums live.
        hessian: Also sum XᵀX.

    Attributes:
        square_sum: (in,), float64, Σ x²; with a Hessian its diagonal, once finished.
        hessian: (in, in), float32, Σ x xᵀ, or None.
        tokens: How many tokens entered.
    """

    def __init__(self, width: int, device: torch.device, *, hessian: bool) -> None:
        self.square_sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.hessian = torch.zeros(width, width, device=device) if hessian else None
        self.tokens = 0
        self._sampled: list[Tensor] = []

    def update(self, inputs: Tensor, sample: int) -> None:
        """Add (…, in) inputs, and remember `sample` rows of them, evenly spaced."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(rows)
        if self.hessian is None:
            _add_squares_(self.square_sum, rows)
        else:
            sparsegpt.accumulate_(self.hessian, rows)
        if sample and len(rows):
            picked = torch.arange(min(sample, len(rows))) * len(rows) // min(sample, len(rows))
            self._sampled.append(rows[picked.to(rows.device)].float())

    def finish(self) -> None:
        """Sum over processes; then every process holds the same sums."""
        count = self.square_sum.new_tensor([self.tokens])
        self.tokens = int(distributed.all_reduce_(count))
        if self.hessian is None:
            distributed.all_reduce_(self.square_sum)
        else:
            distributed.all_reduce_(self.hessian)
            sparsegpt.mirror_(self.hessian)
            self.square_sum.copy_(self.hessian.diagonal())

    def permute_(self, order: Tensor) -> None:
        """Put the inputs into another order, (in,) int64."""
        self.square_sum = self.square_sum[order]
        if self.hessian is not None:
            self.hessian = self.hessian[order][:, order]
        self._sampled = [rows[:, order] for rows in self._sampled]

    @property
    def mean_square(self) -> Tensor:
        """(in,), float64, mean of x² over the tokens."""
        return self.square_sum / max(self.tokens, 1)

    @property
    def sampled(self) -> Tensor:
        """(rows, in), float32: this process's sampled inputs."""
        if self._sampled:
            return torch.cat(self._sampled)
        return torch.zeros(0, len(self.square_sum), device=self.square_sum.device)


def _add_squares_(sums: Tensor, rows: Tensor) -> None:
    """Add Σ x² of rows (tokens, in), of any dtype, to sums (in,), float64.

    Float32 squares and sums of a few rows at a time, which stay in cache, lose nothing that
    matters (some 1e-7); it is the long sum that must not.
    """
    step = _SQUARED_TOGETHER if rows.device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step].float()
        sums += (part * part).sum(0)


class _AllSeenError(Exception):
    """Every input of the layer has been read: the rest of its forward is of no use."""


class LayerCollector:
    """Reads the inputs of some of a layer's matrices.

    Args:
        refs: The matrices.
        hessians: Names of those that need XᵀX.
        batches: Number of batches over all processes: they share `SAMPLED_ROWS`.
    """

    def __init__(self, refs: Sequence[WeightRef], hessians: set[str], batches: int) -> None:
        self.groups: dict[str, InputStatistics] = {}
        self._batches = batches
        self._sources: dict[nn.Module, list[WeightRef]] = {}
        self._pending: set[nn.Module | None] = set()  # None: never all seen
        self._batch = 0
        for ref in refs:
            if ref.input_group in self.groups:
                continue
            needs_hessian = any(
                other.input_group == ref.input_group and other.name in hessians for other in refs
            )
            matrix = ref.matrix
            self.groups[ref.input_group] = InputStatistics(
                matrix.shape[1], matrix.device, hessian=needs_hessian
            )
            self._sources.setdefault(ref.module, []).append(ref)

    def observe(self, run: Callable[[], object], batch: int) -> None:
        """Run a layer on batch number `batch` until all inputs are read.

        Args:
            run: Runs the layer; stopped in the middle once nothing more is to be read.
            batch: The batch's index over all processes.
        """
        self._batch = batch
        self._pending = {*self._sources}
        with self._hooks(), contextlib.suppress(_AllSeenError):
            run()

    def through(self, run: Callable[[], Tensor], batch: int) -> Tensor:
        """Run the whole layer on batch number `batch`, its inputs read; returns its output."""
        self._batch, self._pending = batch, {None}
        with self._hooks():
            return run()

    def finish(self) -> None:
        """Sum over processes.

        Raises:
            PrunekitError: Inputs overflowed or are NaN.
        """
        for name, statistics in self.groups.items():
            statistics.finish()
            if not bool(torch.isfinite(statistics.square_sum).all()):
                raise PrunekitError(
                    f"calibration gives inf or NaN at the input of {name}: use a wider dtype "
                    "(bfloat16 or float32), or check the model"
                )

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(self._read, with_kwargs=True)
            for module in self._sources
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refs = self._sources[module]
        inputs = [*args, *kwargs.values()]
        if refs[0].expert is not None:
            self._read_experts(refs, *inputs[:2])
        else:
            self.groups[refs[0].input_group].update(inputs[0], self._quota())
        self._pending.discard(module)
        if not self._pending:
            raise _AllSeenError

    def _read_experts(self, refs: Sequence[WeightRef], hidden: Tensor, experts: Tensor) -> None:
        """Split a fused experts module's tokens (tokens, in) by their experts (tokens, k)."""
        by_expert: dict[int, list[WeightRef]] = {}
        for ref in refs:
            assert ref.expert is not None
            by_expert.setdefault(ref.expert, []).append(ref)
        for expert, its_refs in by_expert.items():
            tokens = hidden[(experts == expert).any(-1)]
            for ref in its_refs:
                self.groups[ref.input_group].update(ref.expert_inputs(tokens), self._quota())

    def _quota(self) -> int:
        """Rows to sample from this batch: shares of all batches add up to SAMPLED_ROWS."""
        before, after = (
            SAMPLED_ROWS * count // self._batches for count in (self._batch, self._batch + 1)
        )
        return after - before
