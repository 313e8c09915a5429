"""Log-likelihoods of chosen tokens under a causal language model, without full logits.

The base model runs once per batch; the output head and its log-sum-exp are applied only to the
positions whose next token is scored, a bounded number of them at a time.

Batches are padded on the right and carry no attention mask: causal attention keeps real tokens
from the padding after them, whereas a mask leaves padding beyond a sliding window with nothing to
attend to, and the NaN that follow spread (seen with Gemma 2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.architectures import input_device
from prunekit.models.token_ids import check_ids
from prunekit.process.progress import track

# Logits held at once: 64 MiB in fp32.
_LOGITS_PER_CHUNK = 2**24


def sequence_token_nlls(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    firsts: Sequence[int],
    *,
    batch_tokens: int,
    progress: bool = False,
    label: str = "scoring",
) -> list[NDArray[np.float64]]:
    """Negative log-likelihoods of the tail of each sequence, given all tokens before.

    Sequences of similar length share a batch.

    Args:
        model: Causal language model, in eval mode.
        sequences: Token ids; lengths may differ.
        firsts: Index of the first token to score in each; a sequence's first token has nothing
            before it and is never scored.
        batch_tokens: Padded tokens per forward pass (one sequence may exceed it).
        progress: Show a progress bar on a terminal.
        label: Its caption.

    Returns:
        For each sequence the NLLs of its tokens `first`.. to the end, in nats.

    Raises:
        PrunekitError: See `check_model` and `check_length`.
    """
    firsts = [max(first, 1) for first in firsts]
    results = [np.empty(0)] * len(sequences)
    scored = [i for i, sequence in enumerate(sequences) if len(sequence) > firsts[i]]
    if not scored:
        return results
    for sequence in sequences:
        check_ids(model, sequence, "a text")
    check_model(model, sequences[scored[0]])
    # The last token is only ever predicted, never read.
    fed = [list(sequence[:-1]) for sequence in sequences]
    check_length(model, max(len(fed[i]) for i in scored))
    scored.sort(key=lambda i: -len(fed[i]))  # longest first: memory trouble shows at once

    batches = list(_batches(scored, [len(ids) for ids in fed], batch_tokens))
    for batch in track(batches, label, enabled=progress, count=len):
        ids, _ = right_padded([fed[i] for i in batch], input_device(model))
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        rows, columns, targets = [], [], []
        for row, i in enumerate(batch):
            for position in range(firsts[i], len(sequences[i])):
                rows.append(row)
                columns.append(position - 1)
                targets.append(sequences[i][position])
        index = torch.tensor([rows, columns], device=hidden.device)
        nlls = target_nlls(model, hidden[index[0], index[1]], torch.tensor(targets)[:, None])
        lengths = [len(sequences[i]) - firsts[i] for i in batch]
        for i, share in zip(batch, torch.split(nlls[:, 0], lengths), strict=True):
            results[i] = share.numpy()
    return results


def continuation_nlls(
    model: PreTrainedModel,
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    batch_tokens: int,
    progress: bool = False,
    label: str = "scoring",
) -> list[list[float]]:
    """Negative log-likelihoods of several continuations of each prefix, read only once.

    The prefix's key-value cache is repeated for its continuations. Prefixes of exactly equal
    length share a batch, so that the cache holds no padding.

    Args:
        model: Causal language model with a key-value cache, in eval mode.
        prefixes: Token ids, at least one each.
        continuations: For each prefix, the token ids of its continuations, at least one each.
        batch_tokens: Padded tokens per forward pass (one prefix may exceed it).
        progress: Show a progress bar on a terminal.
        label: Its caption.

    Returns:
        For each prefix the NLL of each continuation, summed over its tokens, in nats.

    Raises:
        PrunekitError: The model has no key-value cache; else see `check_model`, `check_length`.
    """
    for prefix, few in zip(prefixes, continuations, strict=True):
        check_ids(model, [*prefix, *(token for ids in few for token in ids)], "a question")
    check_model(model, prefixes[0])
    # A continuation's last token is only ever predicted, never read.
    read = [max(map(len, few)) - 1 for few in continuations]
    check_length(model, max(len(p) + extra for p, extra in zip(prefixes, read, strict=True)))
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prefix in enumerate(prefixes):
        by_length[len(prefix)].append(i)

    batches = []
    for length, members in sorted(by_length.items(), reverse=True):
        widest = max(max(length, len(continuations[i]) * read[i]) for i in members)
        size = max(1, batch_tokens // widest)
        batches += [members[start : start + size] for start in range(0, len(members), size)]

    results: list[list[float]] = [[]] * len(prefixes)
    for batch in track(batches, label, enabled=progress, count=len):
        nlls = _batch_continuation_nlls(
            model, [prefixes[i] for i in batch], [continuations[i] for i in batch]
        )
        for i, each in zip(batch, nlls, strict=True):
            results[i] = each
    return results


def target_nlls(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods of `targets` under the model's head at `hidden`.

    Equivalent to `-log_softmax(softcap(head(hidden)), -1).gather(-1, targets)` in fp32 or better,
    with the logits of one chunk of rows at most in memory.

    Args:
        model: The model whose output head and `final_logit_softcapping` apply.
        hidden: Final normed hidden states (n, hidden).
        targets: Token ids (n, k): k tokens scored at each position.

    Returns:
        (n, k) float64 on the CPU, in nats.

    Raises:
        PrunekitError: The logits are NaN.
    """
    rows = max(1, _LOGITS_PER_CHUNK // int(model.get_output_embeddings().weight.shape[0]))
    parts = [torch.empty(0, targets.shape[1], dtype=torch.float64)]
    for states, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        logits = _logits(model, states)
        picked = logits.gather(-1, wanted.to(logits.device))
        parts.append((logits.logsumexp(-1, keepdim=True) - picked).double().cpu())
    nlls = torch.cat(parts)
    if nlls.isnan().any():
        raise PrunekitError("the model's logits are NaN: check its weights, or use another dtype")
    return nlls


def check_model(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Make sure that base model and head, called separately, give the model's own logits.

    Some architectures scale or shift their logits outside the head; scoring them silently wrong
    is worse than refusing. Costs one pass over two tokens.

    Raises:
        PrunekitError: The model is in training mode, its logits are NaN, or its logits are not
            those of its head.
    """
    if model.training:
        raise PrunekitError("the model is in training mode: call model.eval() first")
    if model.base_model is model or model.get_output_embeddings() is None:
        raise PrunekitError(
            f"{type(model).__name__} has no separate base model and output head; "
            "load it as a causal language model (AutoModelForCausalLM)"
        )
    ids = torch.tensor([list(tokens[:2])], device=input_device(model))
    theirs = model(input_ids=ids, use_cache=False).logits.to("cpu", torch.float64)
    ours = _logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if theirs.isnan().any():
        raise PrunekitError("the model's logits are NaN: check its weights, or use another dtype")
    # Room for half-precision rounding of the softcap; a forgotten scale is far outside it.
    if (ours.cpu().double() - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise PrunekitError(
            f"{type(model).__name__} changes its logits after the output head in a way prunekit "
            "does not know; use one of the supported architectures"
        )


def check_length(model: PreTrainedModel, tokens: int, fix: str = "shorten it") -> None:
    """Make sure that the model reads `tokens` tokens.

    Raises:
        PrunekitError: It does not; the message ends with `fix`.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise PrunekitError(f"{tokens} tokens exceed the model's context of {limit}: {fix}")


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (n, longest) int64, padded on the right.

    Rows are filled up with their own last token: a padding token would make transformers warn
    where the mask is not used.
    """
    longest = max(map(len, sequences))
    rows = [[*ids, *[ids[-1] if ids else 0] * (longest - len(ids))] for ids in sequences]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _batch_continuation_nlls(
    model: PreTrainedModel,
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
) -> list[list[float]]:
    """`continuation_nlls` of prefixes of equal length, in one batch."""
    ids, _ = right_padded(prefixes, input_device(model))
    states = model.base_model(input_ids=ids, use_cache=True)
    cache = getattr(states, "past_key_values", None)
    if cache is None or not hasattr(cache, "batch_select_indices"):
        raise PrunekitError(
            f"{type(model).__name__} has no key-value cache to continue; pass share_context=False"
        )
    most = max(map(len, continuations))
    firsts = [[ids[0] for ids in few] + [0] * (most - len(few)) for few in continuations]
    totals = target_nlls(model, states.last_hidden_state[:, -1], torch.tensor(firsts))

    longer = [
        (row, column, tokens)
        for row, few in enumerate(continuations)
        for column, tokens in enumerate(few)
        if len(tokens) > 1
    ]
    if longer:
        # An index on the CPU selects from layers on any device.
        cache.batch_select_indices(torch.tensor([row for row, _, _ in longer]))
        ids, mask = right_padded([tokens[:-1] for _, _, tokens in longer], ids.device)
        states = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        hidden = states.last_hidden_state[mask.bool()]
        targets = torch.tensor([token for _, _, tokens in longer for token in tokens[1:]])
        nlls = target_nlls(model, hidden, targets[:, None])[:, 0]
        shares = torch.split(nlls, [len(tokens) - 1 for _, _, tokens in longer])
        for (row, column, _), share in zip(longer, shares, strict=True):
            totals[row, column] += share.sum()
    return [totals[row, : len(few)].tolist() for row, few in enumerate(continuations)]


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of normed hidden states, in fp32 or better."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _batches(
    order: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Cut `order` (longest first) into runs whose padded size stays within `batch_tokens`."""
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        yield list(order[start : start + size])
        start += size
