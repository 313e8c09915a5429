"""How far a pruned model's next-token distribution is from the dense one's, over a text.

The statistics that llama.cpp's `perplexity --kl-divergence` prints, of every position of a text:
KL(dense ‖ pruned), agreement of the top token, change of the actual token's probability (Δp), and
perplexities. The windows are those of `evaluation.likelihood.perplexity`: they do not overlap, and
all tokens but a window's first are scored (llama.cpp scores the second half of each window).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from prunekernels import PairStats, summarize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit import distributed
from prunekit.analysis.spaces import Reader, check_pair
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import text_ids
from prunekit.evaluation.scoring import check_length, check_model, right_padded
from prunekit.models.architectures import input_device
from prunekit.progress import track


@torch.inference_mode()
def kl_report(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Sequence[int],
    *,
    context: int = 512,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float]:
    """Statistics of the two models' next-token distributions over a text, at temperature 1.

    Args:
        dense: The model that was pruned, in eval mode.
        pruned: Its pruned copy.
        tokenizer: Encodes `text`; may be None for token ids.
        text: A text, or its token ids.
        context: Window length in tokens, 2 or more; shortened to what both models can read.
        batch_size: Windows per forward pass.
        progress: Show a progress bar on a terminal.

    Returns:
        What `prunekernels.summarize` returns for all scored positions: nats, shares of 1, and
        standard errors that treat positions as independent (they are not quite: those of one
        window share its text).

    Raises:
        PrunekitError: The text is shorter than two tokens, the models cannot be compared, or their
            logits are not finite.
    """
    if context < 2:
        raise PrunekitError(f"context {context} is too short to predict anything: use 2 or more")
    ids = text_ids(tokenizer, text)
    if len(ids) < 2:
        raise PrunekitError(
            f"a text of {len(ids)} tokens has nothing to predict: pass a longer one"
        )
    reader = Reader(*check_pair(dense, pruned))
    for model in (dense, pruned):
        check_model(model, ids)
        limit = getattr(model.config, "max_position_embeddings", None)
        context = context if limit is None else min(context, limit)
        check_length(model, min(context, len(ids)) - 1)
    windows = [ids[start : start + context] for start in range(0, len(ids), context)]
    windows = distributed.shard([window for window in windows if len(window) > 1])
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    parts: list[PairStats] = []
    for batch in track(batches, "comparing distributions", enabled=progress):
        parts += _window_stats(reader, dense, pruned, batch)
    return summarize(PairStats.cat(distributed.gather(parts)))


def _window_stats(
    reader: Reader, dense: PreTrainedModel, pruned: PreTrainedModel, windows: list[list[int]]
) -> list[PairStats]:
    """Pair statistics of every scored position of each window, on the CPU."""
    # The last token is only ever predicted, never read.
    padded, mask = right_padded([window[:-1] for window in windows], input_device(dense))
    states = [
        model.base_model(input_ids=padded, use_cache=False).last_hidden_state[mask.bool()]
        for model in (dense, pruned)
    ]
    labels = torch.tensor([token for window in windows for token in window[1:]])
    pairs = reader.read(states[0], states[1], labels=labels, normed=True).pairs.to("cpu")
    ends = torch.tensor([len(window) - 1 for window in windows]).cumsum(0).tolist()
    return [pairs[start:end] for start, end in zip([0, *ends], ends, strict=False)]
