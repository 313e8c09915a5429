"""The effect of pruning layer by layer, in h, z and p.

`layerwise` is counterfactual: in the dense model's own context, one sublayer at a time is replaced
by its pruned twin (or by nothing, where it was dropped),

    h = r + dense(r),   h' = r + pruned(r),

and both are read through the dense model's norm and head. `accumulated` lets the perturbations add
up instead: the states behind each layer of both models, each run on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.analysis import grid as grids
from prunekit.analysis.grid import Array, MetricGrid
from prunekit.analysis.spaces import Lens, Level, Reader, Weights, check_pair, twin_layers
from prunekit.analysis.steps import StepBatch, step_batches
from prunekit.models import blocks
from prunekit.models.architectures import Architecture
from prunekit.models.generation import Rollout
from prunekit.models.layouts import SUBLAYERS
from prunekit.process.progress import track

# States of one model held at once before they are measured, in elements (256 MiB of float32).
_STATE_BUDGET = 64 * 1024 * 1024


@torch.inference_mode()
def layerwise(
    dense: PreTrainedModel,
    pruned: PreTrainedModel | None,
    sequences: Sequence[Rollout],
    *,
    temperature: float = 1.0,
    lens: Lens = "final_norm",
    weights: Weights = "base",
    level: Level = "precise",
    positions: Iterable[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> MetricGrid:
    """Effect of each sublayer's pruning alone, at every decode step.

    Args:
        dense: The dense model.
        pruned: Its pruned or dropped copy. None asks what removing each sublayer of the dense
            model would do, one at a time.
        sequences: Prompts and the continuations whose steps are looked at (the dense model's own).
        temperature: T in p = softmax(z / T).
        lens: "final_norm", or "raw" to read z from un-normed states as the research code does.
        weights: Whose distribution weighs the second-order estimates, see `Reader`.
        level: Precision of the divergences.
        positions: Decode steps, all by default.
        batch_size: Sequences run together.
        progress: Show a progress bar (on a terminal only).

    Returns:
        A grid over (prompt, step, layer, sublayer); layers are those of the dense model.

    Raises:
        PrunekitError: The models can't be compared, or a sequence or option is out of range.

    To reproduce the research code: its pruned mode logs KL(pruned ‖ dense) with the pruned
    distribution as weights, `lens="raw", weights="other"` and `kl_pruned_dense`; its dropped mode
    logs KL(dense ‖ dropped) with the dense distribution, `pruned=None, lens="raw"` and
    `kl_dense_pruned`.
    """
    ours = Architecture(dense) if pruned is None else check_pair(dense, pruned)[0]
    theirs = None if pruned is None else Architecture(pruned)
    twins = [None] * len(ours.layers) if theirs is None else twin_layers(ours, theirs)
    reader = Reader(ours, temperature=temperature, lens=lens, weights=weights, level=level)
    labels: dict[str, list[Any]] = {"layer": list(range(len(twins))), "sublayer": list(SUBLAYERS)}
    found = []
    batches = step_batches(ours, sequences, batch_size, positions)
    for batch in track(batches, "layerwise", enabled=progress, count=len):
        states = _States(reader, batch)
        inputs = blocks.capture(ours, batch.input_ids)
        hidden = inputs.hidden
        for index, kwargs in enumerate(inputs.kwargs):
            trace = blocks.trace_layer(ours, index, hidden, kwargs)
            hidden, twin = trace.output, twins[index]
            for sublayer, read, residual, output in (
                ("attn", trace.attn_input, trace.attn_input, trace.mlp_residual),
                ("mlp", trace.mlp_input, trace.mlp_residual, hidden),
            ):
                if theirs is not None and twin is not None:
                    added = theirs.contribution(twin, sublayer, read, kwargs)
                    residual = residual + added.to(residual.device)
                states.add(output, residual)
        found.append(batch.grid(states.metrics(), ("layer", "sublayer"), labels))
    return grids.in_order(grids.concat(found))


@torch.inference_mode()
def accumulated(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    sequences: Sequence[Rollout],
    *,
    temperature: float = 1.0,
    lens: Lens = "final_norm",
    weights: Weights = "base",
    level: Level = "precise",
    positions: Iterable[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> MetricGrid:
    """Distance of the two models behind each layer, on the same tokens.

    Each model's states are read through its own final norm and head. Where a whole block was
    dropped, the pruned model's state behind it is the one before it.

    Args:
        dense: The dense model.
        pruned: Its pruned or dropped copy.
        sequences: Prompts and continuations.
        temperature: T in p = softmax(z / T).
        lens: "final_norm" or "raw".
        weights: Whose distribution weighs the second-order estimates.
        level: Precision of the divergences.
        positions: Decode steps, all by default.
        batch_size: Sequences run together.
        progress: Show a progress bar (on a terminal only).

    Returns:
        A grid over (prompt, step, layer); its last layer is what the models really output.

    Raises:
        PrunekitError: The models can't be compared, or a sequence or option is out of range.
    """
    ours, theirs = check_pair(dense, pruned)
    twins = twin_layers(ours, theirs)
    reader = Reader(ours, theirs, temperature=temperature, lens=lens, weights=weights, level=level)
    labels = {"layer": list(range(len(ours.layers)))}
    found = []
    batches = step_batches(ours, sequences, batch_size, positions)
    for batch in track(batches, "accumulated", enabled=progress, count=len):
        states = _States(reader, batch)
        dense_inputs = blocks.capture(ours, batch.input_ids)
        pruned_inputs = blocks.capture(theirs, batch.input_ids)
        base, other = dense_inputs.hidden, pruned_inputs.hidden
        for index, twin in enumerate(twins):
            base = blocks.run_layer(ours, index, base, dense_inputs.kwargs[index])
            if twin is not None:
                other = blocks.run_layer(theirs, twin, other, pruned_inputs.kwargs[twin])
            states.add(base, other)
        found.append(batch.grid(states.metrics(), ("layer",), labels))
    return grids.in_order(grids.concat(found))


class _States:
    """Collects the steps' states of both models; measures as many as fit in one call."""

    def __init__(self, reader: Reader, batch: StepBatch) -> None:
        self._reader, self._batch = reader, batch
        self._base: list[Tensor] = []
        self._other: list[Tensor] = []
        self._measured: list[dict[str, Array]] = []

    def add(self, base: Tensor, other: Tensor) -> None:
        """Add states (rollouts, tokens, hidden) of both models at one place."""
        self._base.append(self._batch.pick(base))
        self._other.append(self._batch.pick(other))
        if len(self._base) * self._base[0].numel() >= _STATE_BUDGET:
            self._measure()

    def metrics(self) -> dict[str, Array]:
        """Per metric an array (places · N), in the order they were added."""
        if self._base:
            self._measure()
        return {
            name: np.concatenate([part[name] for part in self._measured])
            for name in self._measured[0]
        }

    def _measure(self) -> None:
        device = self._reader.head.weight.device  # layers may be spread over several
        base = torch.cat([rows.to(device) for rows in self._base])
        other = torch.cat([rows.to(device) for rows in self._other])
        labels = self._batch.labels.repeat(len(self._base))
        self._measured.append(self._reader.read(base, other, labels=labels).metrics)
        self._base, self._other = [], []
