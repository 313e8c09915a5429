"""What pruning does step by step while decoding, under two protocols.

Teacher-forced: both models read the dense model's own greedy continuation, so every step has the
same context and can be compared. Free-running: each model continues by itself. The contexts are
the same up to and including the first step at which the tokens differ, so there the free-running
metrics are the teacher-forced ones; behind it the two are different texts and only measures of
whole texts make sense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from prunekernels import PairStats
from transformers import PreTrainedModel

from prunekit import generation
from prunekit.analysis import grid as grids
from prunekit.analysis.grid import Array, MetricGrid
from prunekit.analysis.spaces import Level, Reader, Weights, check_pair
from prunekit.analysis.steps import final_states, step_batches
from prunekit.evaluation import text
from prunekit.evaluation.likelihood import sequence_nll
from prunekit.evaluation.scoring import right_padded
from prunekit.generation import Rollout
from prunekit.progress import track

TOP_TOKENS = 5
Tops = list[list[tuple[int, float]]]

# Per-prompt measures of `Decoding.sequence`; the perplexities are under the dense model.
SEQUENCE_METRICS = (
    "identical",
    "first_divergence",
    "exact_prefix",
    "exact_prefix_share",
    "chrf",
    "repetition_dense",
    "repetition_pruned",
    "distinct2_dense",
    "distinct2_pruned",
    "eos_dense",
    "eos_pruned",
    "length_dense",
    "length_pruned",
    "nll_dense_text",
    "nll_pruned_text",
    "perplexity_dense_text",
    "perplexity_pruned_text",
)


@dataclass(frozen=True)
class TopToken:
    """A likely next token: its id, its text and its probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One step of the dense model's continuation, as both models see it.

    Attributes:
        kl: KL(dense ‖ pruned), in nats.
        p_cosine: Cosine of the two distributions.
        top_dense: The dense model's most likely next tokens, most likely first.
        top_pruned: The pruned model's.
    """

    kl: float
    p_cosine: float
    top_dense: tuple[TopToken, ...]
    top_pruned: tuple[TopToken, ...]


@dataclass(frozen=True)
class Generation:
    """One prompt and what both models make of it, greedily.

    Attributes:
        prompt: The text that was asked.
        prompt_ids: Token ids the models were given (chat template included).
        dense_ids: The dense model's continuation, with its end-of-sequence token if it came.
        pruned_ids: The pruned model's.
        dense_text: Text of `dense_ids` without special tokens.
        pruned_text: Text of `pruned_ids`.
        dense_tokens: One string per token of `dense_ids`, for display.
        pruned_tokens: One string per token of `pruned_ids`.
        first_divergence: First step at which the tokens differ, None if none does.
        steps: Per token of `dense_ids`, both models' view of that step (teacher-forced).
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    dense_ids: tuple[int, ...]
    pruned_ids: tuple[int, ...]
    dense_text: str
    pruned_text: str
    dense_tokens: tuple[str, ...]
    pruned_tokens: tuple[str, ...]
    first_divergence: int | None
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; a non-finite number becomes a string."""
        data = asdict(self)
        for step in data["steps"]:
            for name in ("kl", "p_cosine"):
                step[name] = step[name] if np.isfinite(step[name]) else repr(step[name])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Generation:
        """Undo `to_dict`."""
        steps = tuple(
            Step(
                float(step["kl"]),
                float(step["p_cosine"]),
                tuple(TopToken(**token) for token in step["top_dense"]),
                tuple(TopToken(**token) for token in step["top_pruned"]),
            )
            for step in data["steps"]
        )
        fields: dict[str, Any] = dict(data)
        for name in ("prompt_ids", "dense_ids", "pruned_ids", "dense_tokens", "pruned_tokens"):
            fields[name] = tuple(fields[name])
        return cls(**(fields | {"steps": steps}))


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
        pruned: Its pruned or dropped copy.
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
        _generation(tokenizer, prompts[i], ours, theirs[i], grid, i, tops[i])
        for i, ours in enumerate(rollouts)
    )
    nlls = _text_nlls(dense, generations, grid["nll_dense"] if temperature == 1 else None)
    sequence = _sequence_metrics(generations, options["ends"], *nlls)
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
    for batch in track(batches, "teacher-forced", enabled=progress):
        states = final_states(ours, batch), final_states(theirs, batch)
        reading = reader.read(*states, labels=batch.labels, normed=True, topk=topk)
        found.append(batch.grid(reading.metrics))
        columns = top_tokens(reading.pairs)
        for row, index in enumerate(batch.prompts):
            mine = (batch.rows == row).nonzero().flatten().tolist()
            tops[index] = [columns[0][at] for at in mine], [columns[1][at] for at in mine]
    return grids.in_order(grids.concat(found)), [tops[index] for index in range(len(rollouts))]


def top_tokens(pairs: PairStats) -> tuple[Tops, Tops]:
    """Each row's top tokens as (id, probability), of the dense and of the pruned model."""
    top = pairs.topk
    assert top is not None
    sides = (top.ids_base, top.prob_base), (top.ids_other, top.prob_other)
    lists = [
        [
            list(zip(row_ids, row_probs, strict=True))
            for row_ids, row_probs in zip(ids.tolist(), probs.tolist(), strict=True)
        ]
        for ids, probs in sides
    ]
    return lists[0], lists[1]


def named(tokenizer: Any, tokens: Sequence[tuple[int, float]]) -> tuple[TopToken, ...]:
    """Top tokens with their texts."""
    return tuple(TopToken(i, tokenizer.decode([i]), probability) for i, probability in tokens)


def _generation(
    tokenizer: Any,
    prompt: str,
    ours: Rollout,
    theirs: Rollout,
    grid: MetricGrid,
    index: int,
    tops: tuple[Tops, Tops],
) -> Generation:
    def shown(ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(tokenizer.decode([token]) for token in ids)

    steps = tuple(
        Step(
            float(grid["kl_dense_pruned"][index, step]),
            float(grid["p_cosine"][index, step]),
            named(tokenizer, tops[0][step]),
            named(tokenizer, tops[1][step]),
        )
        for step in range(len(ours.continuation))
    )
    return Generation(
        prompt,
        ours.prompt,
        ours.continuation,
        theirs.continuation,
        tokenizer.decode(list(ours.continuation), skip_special_tokens=True),
        tokenizer.decode(list(theirs.continuation), skip_special_tokens=True),
        shown(ours.continuation),
        shown(theirs.continuation),
        text.first_divergence(ours.continuation, theirs.continuation),
        steps,
    )


def _sequence_metrics(
    generations: Sequence[Generation],
    ends: Sequence[int],
    dense_nlls: Array,
    pruned_nlls: Array,
) -> dict[str, Array]:
    table = []
    for index, found in enumerate(generations):
        ours, theirs = found.dense_ids, found.pruned_ids
        prefix = text.exact_prefix(ours, theirs)
        table.append(
            {
                "identical": float(found.first_divergence is None),
                "first_divergence": np.nan
                if found.first_divergence is None
                else float(found.first_divergence),
                "exact_prefix": float(prefix),
                "exact_prefix_share": prefix / max(len(ours), len(theirs)),
                "chrf": text.chrf(found.pruned_text, found.dense_text),
                "repetition_dense": text.repetition_rate(ours, 4),
                "repetition_pruned": text.repetition_rate(theirs, 4),
                "distinct2_dense": text.distinct_n(ours, 2),
                "distinct2_pruned": text.distinct_n(theirs, 2),
                "eos_dense": float(ours[-1] in ends),
                "eos_pruned": float(theirs[-1] in ends),
                "length_dense": float(len(ours)),
                "length_pruned": float(len(theirs)),
                "nll_dense_text": dense_nlls[index],
                "nll_pruned_text": pruned_nlls[index],
                "perplexity_dense_text": float(np.exp(dense_nlls[index])),
                "perplexity_pruned_text": float(np.exp(pruned_nlls[index])),
            }
        )
    return {name: np.array([row[name] for row in table], np.float64) for name in SEQUENCE_METRICS}


def _text_nlls(
    dense: PreTrainedModel, generations: Sequence[Generation], stepwise: Array | None
) -> tuple[Array, Array]:
    """Mean NLL per token, in nats, of the dense and of the pruned texts under the dense model.

    Args:
        dense: The dense model.
        generations: The texts.
        stepwise: (prompt, step) NLLs of the dense texts' tokens, if they were measured at T = 1.
    """
    if stepwise is None:
        ours = _mean_nlls(dense, [Rollout(g.prompt_ids, g.dense_ids) for g in generations])
    else:
        ours = grids.nan_mean(stepwise, (1,))
    other = [i for i, found in enumerate(generations) if found.first_divergence is not None]
    texts = [Rollout(generations[i].prompt_ids, generations[i].pruned_ids) for i in other]
    theirs = ours.copy()  # a text that is the same is as likely
    if texts:
        theirs[other] = _mean_nlls(dense, texts)
    return ours, theirs


def _mean_nlls(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> Array:
    """Mean NLL per continuation token of each rollout, in nats."""
    device = model.get_input_embeddings().weight.device
    ids, mask = right_padded([rollout.ids for rollout in rollouts], device)
    found = sequence_nll(model, ids, mask, [len(rollout.prompt) for rollout in rollouts])
    means: Array = found.totals / found.tokens
    return means
