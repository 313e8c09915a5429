"""Answer options against the full vocabulary: why multiple choice survives what text does not.

A multiple-choice score compares a handful of tokens at one position. The models are compared
there twice: on the softmax over the option tokens alone, and over the whole vocabulary.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prunekit.analysis import grid as grids
from prunekit.analysis.grid import Array, MetricGrid
from prunekit.analysis.spaces import Level, Reader, Weights, check_pair, to_array
from prunekit.analysis.steps import StepBatch, final_states, step_batches
from prunekit.analysis.transcripts import TOP_TOKENS, TopToken, named, top_tokens
from prunekit.errors import PrunekitError
from prunekit.evaluation.items import Choice
from prunekit.models.generation import Chat, Rollout, encode
from prunekit.models.token_ids import check_ids, tokenize
from prunekit.process.progress import track

# How an option may be spelled behind "Answer:"; the first that is one token each is taken.
SPELLINGS = (" {upper}", "{upper}", " {lower}", "{lower}")

# What a chat is asked for, and the words behind which either kind of model names a letter.
INSTRUCTION = "Answer with the letter of the right option."
OPENING = "Answer:"

# Metric of the grid -> field of PairStats.subset.
SUBSET_FIELDS = {
    "subset_z_cosine": "cos_logit",
    "subset_p_cosine": "cos_prob",
    "subset_p_one_minus_cosine": "one_minus_cos_prob",
    "subset_kl_dense_pruned": "kl_base_other",
    "subset_kl_pruned_dense": "kl_other_base",
}


@dataclass(frozen=True)
class Item:
    """One question as both models see it.

    Attributes:
        id: Name of the question.
        question: Its text.
        options: Its options.
        answer: Index of the right one.
        logprobs_dense: The dense model's log-probability of each option's token, over the full
            vocabulary, in nats.
        logprobs_pruned: The pruned model's.
        top_dense: The dense model's most likely next tokens.
        top_pruned: The pruned model's.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    logprobs_dense: tuple[float, ...]
    logprobs_pruned: tuple[float, ...]
    top_dense: tuple[TopToken, ...]
    top_pruned: tuple[TopToken, ...]


@dataclass(frozen=True)
class Subspace:
    """Both models on multiple-choice questions.

    Attributes:
        tokens: The option tokens' texts.
        token_ids: Their ids.
        grid: Grid over (prompt): the metrics of `spaces.METRICS` over the full vocabulary, those of
            `SUBSET_FIELDS` over the options, and correct_dense, correct_pruned (the best option is
            the right one), agreement (both models' best option is the same), kendall and spearman
            (rank correlation of the options' logits), outside_dense and outside_pruned
            (probability that is on no option).
        items: The questions.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    grid: MetricGrid
    items: tuple[Item, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "tokens": list(self.tokens),
            "token_ids": list(self.token_ids),
            "grid": self.grid.to_dict(),
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Subspace:
        """Undo `to_dict`."""
        items = []
        for entry in data["items"]:
            fields: dict[str, Any] = dict(entry)
            for name in ("options", "logprobs_dense", "logprobs_pruned"):
                fields[name] = tuple(fields[name])
            for name in ("top_dense", "top_pruned"):
                fields[name] = tuple(TopToken(**token) for token in fields[name])
            items.append(Item(**fields))
        grid = MetricGrid.from_dict(data["grid"])
        return cls(tuple(data["tokens"]), tuple(data["token_ids"]), grid, tuple(items))


def question_ids(
    tokenizer: Any, choices: Sequence[Choice], *, chat: Chat = "auto"
) -> list[list[int]]:
    """Token ids of the prompts whose next token is the answer's letter.

    Through a chat template the question, its options and `INSTRUCTION` are the user's turn and
    `OPENING` begins the model's reply: a model that was taught to chat names a letter there, and
    hardly ever behind plain text. Without one, `OPENING` follows the options on a new line.

    Args:
        tokenizer: A transformers tokenizer.
        choices: The questions.
        chat: Whether they are asked through the chat template, see `generation.encode`.

    Returns:
        One list of token ids per question.

    Raises:
        PrunekitError: See `generation.encode`.
    """
    templated = chat == "always" or (chat == "auto" and bool(tokenizer.chat_template))
    asked = [
        f"{_listed(choice)}\n{INSTRUCTION}" if templated else _listed(choice) for choice in choices
    ]
    return encode(tokenizer, asked, chat=chat, opening=OPENING)


def _listed(choice: Choice) -> str:
    """A question and its options, each on a line behind its letter."""
    options = zip(string.ascii_uppercase, choice.options, strict=False)
    listed = "\n".join(f"{letter}. {option}" for letter, option in options)
    return f"{choice.question}\n{listed}"


def option_tokens(
    tokenizer: Any, count: int, options: Sequence[str] | Sequence[int] | None = None
) -> tuple[int, ...]:
    """Ids of the tokens that name `count` options.

    Args:
        tokenizer: The tokenizer.
        count: Number of options.
        options: Their spellings (one token each) or ids; letters in the first of `SPELLINGS` that
            fits the tokenizer by default.

    Raises:
        PrunekitError: Too few options, one is not a single token, or two are the same.
    """
    if options is not None:
        ids = tuple(o if isinstance(o, int) else _single(tokenizer, o) for o in options)
        if None in ids:
            wrong = options[ids.index(None)]
            raise PrunekitError(f"option {wrong!r} is not a single token: spell it another way")
        if len(ids) < count or len(set(ids)) < len(ids):
            raise PrunekitError(
                f"{len(set(ids))} different option tokens for questions of {count} options: give "
                "one per option"
            )
        return tuple(int(i) for i in ids[:count] if i is not None)
    if count > len(string.ascii_uppercase):
        raise PrunekitError(f"a question has {count} options: use at most 26")
    for spelling in SPELLINGS:
        letters = string.ascii_uppercase[:count]
        texts = [spelling.format(upper=letter, lower=letter.lower()) for letter in letters]
        ids = tuple(_single(tokenizer, text) for text in texts)
        if None not in ids and len(set(ids)) == count:
            return tuple(int(i) for i in ids if i is not None)
    raise PrunekitError("this tokenizer splits option letters: give the option tokens' ids")


@torch.inference_mode()
def subspace(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: Any,
    choices: Sequence[Choice],
    *,
    options: Sequence[str] | Sequence[int] | None = None,
    temperature: float = 1.0,
    weights: Weights = "base",
    level: Level = "precise",
    chat: Chat = "auto",
    batch_size: int = 8,
    progress: bool = False,
) -> Subspace:
    """Compare two models at the answer position of multiple-choice questions.

    Args:
        dense: The dense model.
        pruned: Its pruned or dropped copy.
        tokenizer: The tokenizer of both.
        choices: The questions, at least one.
        options: Option tokens, see `option_tokens`.
        temperature: T in p = softmax(z / T).
        weights: Whose distribution weighs the second-order estimates, see `Reader`.
        level: Precision of the divergences.
        chat: Whether questions are asked through the chat template, see `question_ids`.
        batch_size: Questions run together.
        progress: Show a progress bar (on a terminal only).

    Raises:
        PrunekitError: The models can't be compared, or a question or option is out of range.
    """
    ours, theirs = check_pair(dense, pruned)
    if not choices:
        raise PrunekitError("no multiple-choice questions: give at least one")
    reader = Reader(ours, theirs, temperature=temperature, weights=weights, level=level)
    all_ids = option_tokens(tokenizer, max(len(choice.options) for choice in choices), options)
    prompts = question_ids(tokenizer, choices, chat=chat)
    found: list[MetricGrid] = []
    items: dict[int, Item] = {}
    for count in sorted({len(choice.options) for choice in choices}):
        group = [index for index, choice in enumerate(choices) if len(choice.options) == count]
        ids = all_ids[:count]
        # the right option's token is each prompt's one-token continuation
        rollouts = [
            Rollout(tuple(prompts[index]), (ids[choices[index].answer],)) for index in group
        ]
        for rollout in rollouts:
            check_ids(dense, rollout.ids, "a question")
        batches = step_batches(ours, rollouts, batch_size)
        for batch in track(batches, "subspace", enabled=progress, count=len):
            batch = replace(batch, prompts=[group[row] for row in batch.prompts])
            metrics, seen = _measure(reader, batch, ids, tokenizer, choices)
            grid = batch.grid(metrics)
            values = {name: value[:, 0] for name, value in grid.values.items()}
            found.append(MetricGrid(("prompt",), {"prompt": grid.labels["prompt"]}, values))
            items |= seen
    texts = tuple(tokenizer.decode([token]) for token in all_ids)
    grid = grids.in_order(grids.concat(found))
    return Subspace(texts, all_ids, grid, tuple(items[index] for index in range(len(choices))))


def _measure(
    reader: Reader,
    batch: StepBatch,
    ids: Sequence[int],
    tokenizer: Any,
    choices: Sequence[Choice],
) -> tuple[dict[str, Array], dict[int, Item]]:
    states = final_states(reader.dense, batch), final_states(reader.pruned, batch)
    topk = min(TOP_TOKENS, reader.head.weight.shape[0])
    subset = torch.tensor(list(ids), device=states[0].device)
    reading = reader.read(*states, labels=batch.labels, normed=True, topk=topk, subset=subset)
    pairs, inside = reading.pairs, reading.pairs.subset
    assert inside is not None
    metrics = reading.metrics | {
        name: to_array(getattr(inside, field)) for name, field in SUBSET_FIELDS.items()
    }
    logprobs = [
        _logprobs(arch.head, state, subset, reader.temperature) - to_array(lse)[:, None]
        for arch, state, lse in (
            (reader.dense, states[0], pairs.lse_base),
            (reader.pruned, states[1], pairs.lse_other),
        )
    ]
    answers = np.array([choices[index].answer for index in batch.prompts])
    best = [to_array(chosen) for chosen in (inside.argmax_base, inside.argmax_other)]
    kendall, spearman = rank_agreement(*logprobs)
    metrics |= {
        "correct_dense": (best[0] == answers).astype(np.float64),
        "correct_pruned": (best[1] == answers).astype(np.float64),
        "agreement": (best[0] == best[1]).astype(np.float64),
        "kendall": kendall,
        "spearman": spearman,
        "outside_dense": -np.expm1(to_array(inside.lse_base) - to_array(pairs.lse_base)),
        "outside_pruned": -np.expm1(to_array(inside.lse_other) - to_array(pairs.lse_other)),
    }
    items, tops = {}, top_tokens(pairs)
    for row, index in enumerate(batch.prompts):
        choice = choices[index]
        items[index] = Item(
            choice.id,
            choice.question,
            tuple(choice.options),
            choice.answer,
            tuple(logprobs[0][row].tolist()),
            tuple(logprobs[1][row].tolist()),
            named(tokenizer, tops[0][row]),
            named(tokenizer, tops[1][row]),
        )
    return metrics, items


def rank_agreement(a: Array, b: Array) -> tuple[Array, Array]:
    """Kendall's τ_a and Spearman's ρ of each row of two (N, k) arrays, k at least 2.

    Tied values share their mean rank in ρ and count as neither order in τ; ρ is NaN where all
    values of a row are tied.
    """
    orders = [np.sign(x[:, :, None] - x[:, None, :]) for x in (a, b)]
    k = a.shape[1]
    kendall: Array = (orders[0] * orders[1]).sum((1, 2)) / (k * (k - 1))
    ranks = [order.sum(2) for order in orders]  # centred, twice the rank
    norms = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    with np.errstate(invalid="ignore"):
        spearman: Array = (ranks[0] * ranks[1]).sum(1) / norms
    return kendall, spearman


def _logprobs(head: Any, state: torch.Tensor, subset: torch.Tensor, temperature: float) -> Array:
    """z/T of the option tokens, (N, k): log-probabilities but for the normaliser."""
    bias = None if head.bias is None else head.bias[subset].float()
    options = replace(head, weight=head.weight[subset].float(), bias=bias)
    return to_array(options.logits(state.float())) / temperature


def _single(tokenizer: Any, text: str) -> int | None:
    """The id of `text` if it is one token."""
    ids = tokenize(tokenizer, text, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None
