"""Two models that are both in memory: what llama.cpp's `--kl-divergence` reports of them.

`prunekit compare --kl-report` prints it: the same windows, rows and statistics as `prunekit kld
--windows strided`, without anything on disk. Windows do not overlap, and all tokens but a window's
first are scored (llama.cpp scores the second half of each window).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from prunekernels import PairStats, summarize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.analysis.spaces import check_pair
from prunekit.divergence.measuring import check_finite, shared_readout
from prunekit.divergence.rows import Readout, Rows, compare, states_of
from prunekit.divergence.windows import planned
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import text_ids
from prunekit.evaluation.scoring import check_length
from prunekit.models.causal import check_measured
from prunekit.models.token_ids import check_ids
from prunekit.process import distributed
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import track


@usual_torch()
@torch.inference_mode()
def kl_report(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Sequence[int],
    *,
    context: int = 512,
    limit: int | None = None,
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
        limit: At most so many windows, from the text's beginning.
        batch_size: Windows per forward pass.
        progress: Show a progress bar on a terminal.

    Returns:
        `context`, the window length that was used, and what `prunekernels.summarize` returns for
        all scored positions: nats, shares of 1, and
        standard errors that treat positions as independent (they are not quite: those of one
        window share its text).

    Raises:
        PrunekitError: The text is shorter than two tokens, the models cannot be compared, or their
            logits are not finite.
    """
    check_pair(dense, pruned)
    check_measured(dense)
    ids = text_ids(tokenizer, text)
    if len(ids) < 2:
        raise PrunekitError(
            f"a text of {len(ids)} tokens has nothing to predict: pass a longer one"
        )
    for model in (dense, pruned):
        check_ids(model, ids, "the text")
        longest = getattr(model.config, "max_position_embeddings", None)
        context = context if longest is None else min(context, longest)
        check_length(model, min(context, len(ids)) - 1)
    windows = planned("strided", [ids], context=context, limit=limit)
    other = Readout.of(pruned)
    base = shared_readout(Readout.of(dense), other)
    runs = [range(i, min(i + batch_size, len(windows))) for i in range(0, len(windows), batch_size)]
    parts: list[PairStats] = []
    for run in track(distributed.shard(runs), "comparing distributions", enabled=progress):
        fed, firsts = (
            [windows.ids[index] for index in run],
            [windows.firsts[index] for index in run],
        )
        sides = [
            Rows(states_of(model, fed, firsts, batch_size * context), readout)
            for model, readout in ((dense, base), (pruned, other))
        ]
        found = compare(sides[0], sides[1], windows.labels(run), level="precise").to("cpu")
        check_finite(found, windows, run, ("dense model", "pruned model"))
        parts.append(found)
    return {"context": float(context), **summarize(PairStats.cat(distributed.gather(parts)))}
