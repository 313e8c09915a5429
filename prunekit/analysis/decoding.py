"""The effect of pruning step by step while decoding, under two protocols.

Teacher-forced: both models read the dense model's own greedy continuation, so every step has the
same context and can be compared. Free-running: each model continues by itself. The contexts are
the same up to and including the first step at which the tokens differ, so there the free-running
metrics are the teacher-forced ones; behind it the two are different texts and only measures of
whole texts make sense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prunekit.analysis import grid as grids
from prunekit.analysis.grid import Array, MetricGrid
from prunekit.analysis.sequence_metrics import sequence_metrics, text_nlls
from prunekit.analysis.spaces import Level, Reader, Weights, check_pair
from prunekit.analysis.steps import final_states, step_batches
from prunekit.analysis.transcripts import TOP_TOKENS, Generation, Tops, top_tokens, transcribed
from prunekit.models import generation
from prunekit.models.generation import Rollout
from prunekit.process.progress import track


@dataclass(frozen=True)
class Decoding:
    """Both protocols on the same prompts.

    Attributes:
        teacher_forced: Grid over (prompt, step) on the dense model's continuations; h is the final
            normed state.
        generations: The texts, one per prompt.
        sequence: Per name of `SEQUENCE_METRICS` one float64 value per prompt; NaN = not
            applicable (no divergence, text too short for n-grams).
    """

    teacher_forced: MetricGrid
    generations: tuple[Generation, ...]
    sequence: dict[str, Array]

    @property
    def free_running(self) -> MetricGrid:
        """Metrics while both models, each on its own, still share their context.

        These are the teacher-forced values of the steps up to and including the first divergence
        (same tokens before, hence the same states); NaN behind it.
        """
        steps = np.array(self.teacher_forced.labels["step"])
        first = self.sequence["first_divergence"][:, None]
        return self.teacher_forced.where(np.isnan(first) | (steps[None, :] <= first))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        prompts = MetricGrid(("prompt",), {"prompt": self.prompts}, self.sequence)
        return {
            "teacher_forced": self.teacher_forced.to_dict(),
            "generations": [generation.to_dict() for generation in self.generations],
            "sequence": prompts.to_dict()["values"],
        }

    @property
    def prompts(self) -> list[Any]:
        """Labels of the prompts."""
        return self.teacher_forced.labels["prompt"]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decoding:
        """Undo `to_dict`."""
        grid = MetricGrid.from_dict(data["teacher_forced"])
        labels = {"prompt": grid.labels["prompt"]}
        prompts = {"axes": ["prompt"], "labels": labels, "values": data["sequence"]}
        generations = tuple(Generation.from_dict(entry) for entry in data["generations"])
        return cls(grid, generations, MetricGrid.from_dict(prompts).values)


def decode(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    weights: Weights = "base",
    level: Level = "precise",
    batch_size: int = 8,
    chat: generation.Chat = "auto",
    rollouts: Sequence[Rollout] | None = None,
    progress: bool = False,
) -> Decoding:
    """Continue every prompt greedily with both models and compare them under both protocols.

    Args:
        dense: The dense model.
        pruned: Its pruned or dropped copy; the dense model itself is not run twice.
        tokenizer: The tokenizer of both.
        prompts: Texts, at least one.
        max_new_tokens: Longest continuation.
        temperature: T in p = softmax(z / T) of the metrics; decoding itself is greedy.
        weights: Whose distribution weighs the second-order estimates, see `Reader`.
        level: Precision of the divergences.
        batch_size: Prompts run together; both models see the same batches.
        chat: Whether prompts are asked through the chat template, see `generation.encode`.
        rollouts: The dense model's greedy continuations, if they are there already.
        progress: Show progress bars (on a terminal only).

    Raises:
        PrunekitError: The models can't be compared, or a prompt or option is out of range.
    """
    check_pair(dense, pruned)
    encoded = generation.encode(tokenizer, prompts, chat=chat)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "ends": generation.end_tokens(dense),
        "progress": progress,
    }
    if rollouts is None:
        rollouts = generation.generate(dense, encoded, label="dense", **options)
    theirs = list(rollouts)
    if pruned is not dense:
        theirs = generation.generate(pruned, encoded, label="pruned", **options)
    grid, tops = teacher_forced(
        dense,
        pruned,
        rollouts,
        temperature=temperature,
        weights=weights,
        level=level,
        batch_size=batch_size,
        progress=progress,
    )
    generations = tuple(
        transcribed(tokenizer, prompts[i], ours, theirs[i], grid, i, tops[i])
        for i, ours in enumerate(rollouts)
    )
    nlls = text_nlls(dense, generations, grid["nll_dense"] if temperature == 1 else None)
    sequence = sequence_metrics(generations, options["ends"], *nlls)
    return Decoding(grid, generations, sequence)


@torch.inference_mode()
def teacher_forced(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    temperature: float = 1.0,
    weights: Weights = "base",
    level: Level = "precise",
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[MetricGrid, list[tuple[Tops, Tops]]]:
    """Metrics of every step of `rollouts` from one batched forward pass of each model.

    Returns:
        The grid over (prompt, step), and per rollout, for the dense and for the pruned model, each
        step's top tokens as (id, probability).
    """
    ours, theirs = check_pair(dense, pruned)
    reader = Reader(ours, theirs, temperature=temperature, weights=weights, level=level)
    found: list[MetricGrid] = []
    tops: dict[int, tuple[Tops, Tops]] = {}
    topk = min(TOP_TOKENS, ours.head.weight.shape[0])
    batches = step_batches(ours, rollouts, batch_size)
    for batch in track(batches, "teacher-forced", enabled=progress, count=len):
        mine = final_states(ours, batch)
        states = mine, mine if pruned is dense else final_states(theirs, batch)
        reading = reader.read(*states, labels=batch.labels, normed=True, topk=topk)
        found.append(batch.grid(reading.metrics))
        columns = top_tokens(reading.pairs)
        for row, index in enumerate(batch.prompts):
            places = (batch.rows == row).nonzero().flatten().tolist()
            tops[index] = [columns[0][at] for at in places], [columns[1][at] for at in places]
    return grids.in_order(grids.concat(found)), [tops[index] for index in range(len(rollouts))]
