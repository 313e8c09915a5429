"""Decode steps of rollouts as rows of one teacher-forced forward pass.

A causal model's state before emitting token t depends only on the tokens before it, so one pass
over prompt + continuation holds every decode step, with no decode loop and no KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.analysis.grid import Array, MetricGrid
from prunekit.errors import PrunekitError
from prunekit.evaluation.scoring import right_padded
from prunekit.models.architectures import Architecture, input_device
from prunekit.models.generation import Rollout, batches_by_length


@dataclass(frozen=True)
class StepBatch:
    """Some rollouts, right-padded, and where their decode steps are.

    Attributes:
        prompts: Index of each rollout, (rollouts,).
        input_ids: (rollouts, tokens) int64.
        rows: (N,) index into `prompts` of every step.
        columns: (N,) index of the token whose state predicts that step's token.
        steps: (N,) decode step, 0 predicts the first token of the continuation.
        labels: (N,) the token that follows.
    """

    prompts: list[int]
    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    steps: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many rollouts it holds."""
        return len(self.prompts)

    def pick(self, hidden: Tensor) -> Tensor:
        """The rows of the steps, (N, hidden), of states (rollouts, tokens, hidden)."""
        return hidden[self.rows.to(hidden.device), self.columns.to(hidden.device)]

    def grid(
        self,
        metrics: Mapping[str, Array],
        axes: Sequence[str] = (),
        labels: Mapping[str, Sequence[Any]] | None = None,
    ) -> MetricGrid:
        """Lay metrics out over (prompt, step, *axes).

        Args:
            metrics: Arrays (*axes, N).
            axes: Names of the leading axes.
            labels: Their labels.
        """
        labels = {} if labels is None else labels
        extra = tuple(len(labels[axis]) for axis in axes)
        steps = sorted(set(self.steps.tolist()))
        place = (self.rows.cpu().numpy(), np.searchsorted(steps, self.steps.cpu().numpy()))
        values: dict[str, Array] = {}
        for name, flat in metrics.items():
            value = np.full((len(self.prompts), len(steps), *extra), np.nan)
            value[place] = np.moveaxis(flat.reshape(*extra, -1), -1, 0)
            values[name] = value
        named = {"prompt": list(self.prompts), "step": steps}
        named |= {axis: list(labels[axis]) for axis in axes}
        return MetricGrid(("prompt", "step", *axes), named, values)


def step_batches(
    arch: Architecture,
    rollouts: Sequence[Rollout],
    batch_size: int,
    positions: Iterable[int] | None = None,
) -> list[StepBatch]:
    """Cut rollouts into batches of similar length.

    Args:
        arch: The model, for its device and context length.
        rollouts: Prompts with continuations, each of at least one token.
        batch_size: Rollouts per batch.
        positions: Decode steps to look at, all by default; steps that a rollout doesn't have are
            left out.

    Raises:
        PrunekitError: A rollout is empty or exceeds the context, or none has any of the positions.
    """
    wanted = None if positions is None else sorted(set(positions))
    device = input_device(arch.model)
    for index, rollout in enumerate(rollouts):
        if not rollout.prompt or not rollout.continuation:
            raise PrunekitError(f"sequence {index} has no prompt or no continuation: remove it")
        if len(rollout.ids) > arch.context_length:
            raise PrunekitError(
                f"sequence {index} has {len(rollout.ids)} tokens, the model's context is "
                f"{arch.context_length}: shorten it"
            )
    found = []
    for indices in batches_by_length([rollout.ids for rollout in rollouts], batch_size):
        # the last token is predicted, never read
        # No mask: causal attention never looks at padding on the right.
        ids, _ = right_padded([rollouts[index].ids[:-1] for index in indices], device)
        rows, columns, steps, labels = [], [], [], []
        for row, index in enumerate(indices):
            rollout = rollouts[index]
            for step in range(len(rollout.continuation)) if wanted is None else wanted:
                if not 0 <= step < len(rollout.continuation):
                    continue
                rows.append(row)
                columns.append(len(rollout.prompt) + step - 1)
                steps.append(step)
                labels.append(rollout.continuation[step])
        if not rows:
            continue
        tensors = (torch.tensor(part, device=device) for part in (rows, columns, steps, labels))
        found.append(StepBatch(indices, ids, *tensors))
    if not found:
        raise PrunekitError(f"no sequence has any of the positions {wanted}: use lower ones")
    return found


def final_states(arch: Architecture, batch: StepBatch) -> Tensor:
    """The model's final normed states at the steps of `batch`, (N, hidden), without its head."""
    output = arch.base(input_ids=batch.input_ids, use_cache=False)
    return batch.pick(output.last_hidden_state)
