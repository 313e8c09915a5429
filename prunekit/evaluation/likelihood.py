"""Single-step scores: multiple choice by option log-likelihood, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import Interval, wilson
from prunekit.evaluation.items import Choice
from prunekit.evaluation.scoring import (
    check_length,
    continuation_nlls,
    sequence_token_nlls,
)
from prunekit.models.token_ids import tokenize
from prunekit.process.ambient import usual_torch


@dataclass(frozen=True)
class ChoiceResult:
    """Log-likelihoods of every option of n items with up to k options; absent options are NaN.

    Attributes:
        ids: Names of the items.
        answers: (n,) index of the right option.
        logliks: (n, k) summed log-likelihood of the option's tokens given the question, in nats.
        tokens: (n, k) number of tokens in the sum; 0 where there is no such option.
        characters: (n, k) length of the option's text; 0 where there is no such option.
    """

    ids: tuple[str, ...]
    answers: NDArray[np.int64]
    logliks: NDArray[np.float64]
    tokens: NDArray[np.int64]
    characters: NDArray[np.int64]

    @property
    def normalised(self) -> NDArray[np.float64]:
        """(n, k) log-likelihood per character of the option (lm-eval's `acc_norm` rule)."""
        return self.logliks / np.where(self.characters > 0, self.characters, 1)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(n,) option with the largest summed log-likelihood (lm-eval's `acc` rule)."""
        return np.nanargmax(self.logliks, axis=1)

    @property
    def predicted_normalised(self) -> NDArray[np.int64]:
        """(n,) option with the largest log-likelihood per character."""
        return np.nanargmax(self.normalised, axis=1)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) whether `predicted` is right."""
        return self.predicted == self.answers

    @property
    def correct_normalised(self) -> NDArray[np.bool_]:
        """(n,) whether `predicted_normalised` is right."""
        return self.predicted_normalised == self.answers

    @property
    def accuracy(self) -> Interval:
        """Share of right answers by summed log-likelihood, Wilson interval at 95 %."""
        return wilson(int(self.correct.sum()), len(self.ids))

    @property
    def accuracy_normalised(self) -> Interval:
        """Share of right answers by log-likelihood per character, Wilson interval at 95 %."""
        return wilson(int(self.correct_normalised.sum()), len(self.ids))

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing."""
        return float(np.mean(1 / np.sum(self.tokens > 0, axis=1)))


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    Attributes:
        value: exp(nll_mean).
        nll_mean: Mean negative log-likelihood of the scored tokens, in nats.
        tokens: Number of scored tokens.
    """

    value: float
    nll_mean: float
    tokens: int


@dataclass(frozen=True)
class SequenceNll:
    """Negative log-likelihoods of B sequences.

    Attributes:
        totals: (B,) summed over the scored tokens, in nats; 0 where there are none.
        tokens: (B,) number of scored tokens.
    """

    totals: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def perplexities(self) -> NDArray[np.float64]:
        """(B,) exp of the mean per token; NaN where there are no tokens."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.exp(self.totals / self.tokens)


@usual_torch()
@torch.inference_mode()
def option_logliks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choices: Sequence[Choice],
    *,
    batch_tokens: int = 4096,
    share_context: bool = True,
    progress: bool = True,
) -> ChoiceResult:
    """Score each option as the continuation of "Question: … Answer:", in plain text, zero-shot.

    Equivalent to summing the log-softmax of the full logits over the option's tokens, one option at
    a time, without materialising logits at other positions.

    Args:
        model: Any Hugging Face causal language model, in eval mode.
        tokenizer: Its tokenizer. Its chat template is not used.
        choices: The items, each with two or more options.
        batch_tokens: Padded tokens per forward pass.
        share_context: Read each question once and continue its key-value cache with every option,
            instead of reading the question again for each; same scores, about a third of the work.
        progress: Show a progress bar on a terminal.

    Raises:
        PrunekitError: There are no items, one exceeds the context or can't be scored
            (`encode_choices`), or the model's logits cannot be computed from its base model and
            head, or are NaN.
    """
    if not choices:
        raise PrunekitError("no multiple-choice items: pass at least one")
    questions, options = zip(*encode_choices(tokenizer, choices), strict=True)
    score = continuation_nlls if share_context else _uncached_nlls
    nlls = score(
        model,
        questions,
        options,
        batch_tokens=batch_tokens,
        progress=progress,
        label="multiple choice",
    )

    shape = len(choices), max(map(len, options))
    result = ChoiceResult(
        tuple(choice.id for choice in choices),
        np.array([choice.answer for choice in choices], dtype=np.int64),
        np.full(shape, np.nan),
        np.zeros(shape, dtype=np.int64),
        np.zeros(shape, dtype=np.int64),
    )
    for i, choice in enumerate(choices):
        present = slice(len(choice.options))
        result.logliks[i, present] = -np.array(nlls[i])
        result.tokens[i, present] = [len(ids) for ids in options[i]]
        result.characters[i, present] = [len(option) for option in choice.options]
    return result


@usual_torch()
@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Sequence[int] | Tensor,
    *,
    context: int = 512,
    stride: int | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a text under a model, in windows of `context` tokens.

    By default windows do not overlap and each starts afresh, its first token unscored, as in the
    tables of the pruning papers (Frantar and Alistarh 2023; Sun et al. 2024), except that a shorter
    last window counts too. With `stride` < `context` windows overlap and each scores only the
    tokens the one before did not reach, so that every token but the first has a context of at
    least `context - stride` tokens, or all there is.

    Args:
        model: Any Hugging Face causal language model, in eval mode.
        tokenizer: Encodes `text` with its own special tokens; may be None for token ids.
        text: A text, or its token ids.
        context: Window length in tokens, 2 or more.
        stride: Tokens from one window's start to the next; None means `context`.
        batch_tokens: Padded tokens per forward pass.
        progress: Show a progress bar on a terminal.

    Returns:
        Perplexity: log-likelihoods in fp32 or better, summed in float64.

    Raises:
        PrunekitError: The text is shorter than two tokens, or a parameter does not fit the model.
    """
    stride = context if stride is None else stride
    if context < 2 or not 1 <= stride <= context:
        raise PrunekitError(
            f"context {context} with stride {stride}: use context >= 2 and 1 <= stride <= context"
        )
    ids = text_ids(tokenizer, text)
    if len(ids) < 2:
        raise PrunekitError(f"perplexity of {len(ids)} tokens is undefined: pass a longer text")

    check_length(model, min(context, len(ids)) - 1, fix="use a smaller context")

    windows, firsts, reached = [], [], 0
    for start in range(0, len(ids), stride):
        windows.append(ids[start : start + context])
        firsts.append(reached - start)
        reached = start + len(windows[-1])
        if reached == len(ids):
            break
    nlls = np.concatenate(
        sequence_token_nlls(
            model, windows, firsts, batch_tokens=batch_tokens, progress=progress, label="perplexity"
        )
    )
    mean = math.fsum(nlls) / len(nlls)
    with np.errstate(over="ignore"):  # a broken model's perplexity may exceed float64
        return Perplexity(float(np.exp(mean)), mean, len(nlls))


@usual_torch()
@torch.inference_mode()
def sequence_nll(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    start: int | Sequence[int] | Tensor,
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> SequenceNll:
    """Summed negative log-likelihood of each sequence's tokens from column `start` on.

    For the perplexity of a generated text under another model: `start` is the first generated
    column. Masked positions are left out wherever they are (left or right padding, or between
    prompt and continuation); a sequence's first token is never scored.

    Args:
        model: Any Hugging Face causal language model, in eval mode.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), non-zero where there is a token.
        start: First column to score, one for all or one per sequence.
        batch_tokens: Padded tokens per forward pass.
        progress: Show a progress bar on a terminal.

    Raises:
        PrunekitError: Shapes disagree, a sequence exceeds the context, or logits are NaN.
    """
    starts = torch.as_tensor(start).cpu()
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise PrunekitError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)}: "
            "pass two (batch, tokens) tensors of the same shape"
        )
    if starts.ndim > 1 or (starts.ndim == 1 and len(starts) != len(input_ids)):
        raise PrunekitError(f"start has shape {tuple(starts.shape)}: pass one column per sequence")
    starts = starts.expand(len(input_ids))
    kept = attention_mask.bool().cpu()
    sequences = [row[mask].tolist() for row, mask in zip(input_ids.cpu(), kept, strict=True)]
    firsts = [int(mask[: max(int(at), 0)].sum()) for mask, at in zip(kept, starts, strict=True)]
    nlls = sequence_token_nlls(
        model, sequences, firsts, batch_tokens=batch_tokens, progress=progress, label="scoring"
    )
    totals = np.array([math.fsum(each) for each in nlls], dtype=np.float64)
    return SequenceNll(totals, np.array([len(each) for each in nlls], dtype=np.int64))


def text_ids(
    tokenizer: PreTrainedTokenizerBase | None, text: str | Sequence[int] | Tensor
) -> list[int]:
    """Token ids of a text, with the tokenizer's own special tokens; token ids stay as they are.

    Raises:
        PrunekitError: A text, and no tokenizer, or one that fails on it.
    """
    if not isinstance(text, str):
        return [int(token) for token in torch.as_tensor(text).flatten()]
    if tokenizer is None:
        raise PrunekitError("a text needs a tokenizer: pass one, or pass token ids")
    return list(tokenize(tokenizer, text, verbose=False)["input_ids"])


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, choices: Sequence[Choice]
) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of each item's question, and of each of its options as its continuation.

    Raises:
        PrunekitError: Two options of an item are the same tokens, or one is none.
    """
    return [_encode(tokenizer, choice) for choice in choices]


def _encode(
    tokenizer: PreTrainedTokenizerBase, choice: Choice
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the question, and of each option as its continuation.

    Question and option are encoded together, since some tokenizers merge across the boundary; what
    all options share with the question alone is the question.
    """
    context = f"Question: {choice.question}\nAnswer:"
    alone: list[int] = tokenize(tokenizer, context)["input_ids"]
    texts = [f"{context} {option}" for option in choice.options]
    whole: list[list[int]] = tokenize(tokenizer, texts)["input_ids"]
    shared = len(alone)
    for ids in whole:
        shared = next((i for i in range(shared) if i >= len(ids) or ids[i] != alone[i]), shared)
    if shared == 0 or any(len(ids) == shared for ids in whole):
        raise PrunekitError(f"item {choice.id!r}: an option is encoded as no tokens; reword it")
    for index, ids in enumerate(whole):
        first = whole.index(ids)
        if first < index:
            raise PrunekitError(
                f"item {choice.id!r}: the options {choice.options[first]!r} and "
                f"{choice.options[index]!r} are the same tokens to this tokenizer; reword one"
            )
    return alone[:shared], [ids[shared:] for ids in whole]


def _uncached_nlls(
    model: PreTrainedModel,
    questions: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    batch_tokens: int,
    progress: bool,
    label: str,
) -> list[list[float]]:
    """`continuation_nlls`, with every option read after its own copy of the question."""
    pairs = [(q, option) for q, few in zip(questions, options, strict=True) for option in few]
    nlls = sequence_token_nlls(
        model,
        [[*question, *option] for question, option in pairs],
        [len(question) for question, _ in pairs],
        batch_tokens=batch_tokens,
        progress=progress,
        label=label,
    )
    totals = iter([math.fsum(each) for each in nlls])
    return [[next(totals) for _ in few] for few in options]
