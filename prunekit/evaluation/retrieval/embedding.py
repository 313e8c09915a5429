"""Texts as vectors: pooled final hidden states of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.evaluation.scoring import check_length, right_padded
from prunekit.models.architectures import input_device
from prunekit.models.causal import check_measured
from prunekit.models.generation import batches_by_length
from prunekit.models.token_ids import check_ids, tokenize
from prunekit.process import distributed
from prunekit.process.progress import track

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


def embed(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], **options: Any
) -> NDArray[np.float32]:
    """The vectors of one pooling; arguments as in `pooled`, with `pooling` instead of `poolings`.

    Returns:
        (texts, hidden) float32, each row of Euclidean norm 1.

    Raises:
        PrunekitError: See `pooled`.
    """
    pooling: Pooling = options.pop("pooling", "last")
    return pooled(model, tokenizer, texts, (pooling,), **options)[pooling]


@torch.inference_mode()
def pooled(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    poolings: Sequence[Pooling] = POOLINGS,
    *,
    max_length: int = 512,
    append_eos: bool = False,
    batch_size: int = 8,
    progress: bool = False,
    label: str = "embedding",
) -> dict[Pooling, NDArray[np.float32]]:
    """One vector of length 1 for each text: its pooled hidden states behind the final norm.

    Under several processes each embeds its share, and all get the whole.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer; special tokens are added as it does.
        texts: At least one, none empty.
        poolings: "last": the state of the last token; "mean": the mean over all tokens. One pass
            gives all of them.
        max_length: Longest text in tokens; what comes after it is cut off.
        append_eos: Put the end-of-text token behind every text, as embedding models such as
            E5-Mistral were trained with.
        batch_size: Texts run together, of similar length.
        progress: Show a progress bar (on a terminal only).
        label: Its caption.

    Returns:
        Per pooling (texts, hidden) float32, each row of Euclidean norm 1.

    Raises:
        PrunekitError: An option is out of range, the model can't be measured, or a text has no
            tokens or states that are not finite.
    """
    for pooling in poolings:
        if pooling not in POOLINGS:
            raise PrunekitError(f"pooling '{pooling}' is unknown: use {' or '.join(POOLINGS)}")
    if max_length < 1 or batch_size < 1:
        raise PrunekitError("max_length and batch_size must be at least 1: raise them")
    check_measured(model)
    if model.training:
        raise PrunekitError("the model is in training mode: call model.eval() first")
    share = distributed.shard(texts)
    ids = _ids(model, tokenizer, share, max_length, append_eos)
    found: list[Any] = [None] * len(ids)
    batches = batches_by_length(ids, batch_size)[::-1]  # longest first: memory trouble shows soon
    for batch in track(batches, label, enabled=progress, count=len):
        rows, mask = right_padded([ids[index] for index in batch], input_device(model))
        # no mask: causal attention never looks at padding on the right
        states = model.base_model(input_ids=rows, use_cache=False).last_hidden_state.float()
        vectors = [_unit(_pool(states, mask.to(states.device), pooling)) for pooling in poolings]
        for row, index in enumerate(batch):
            found[index] = [each[row] for each in vectors]
            if not all(np.isfinite(vector).all() for vector in found[index]):
                raise PrunekitError(
                    f"the state of the text {share[index][:40]!r} is not finite: check the "
                    "model's weights, or load it in float32"
                )
    gathered = distributed.gather(found)
    return {
        pooling: np.stack([each[place] for each in gathered]).astype(np.float32)
        for place, pooling in enumerate(poolings)
    }


def _ids(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], max_length: int, append_eos: bool
) -> list[list[int]]:
    """Token ids of each text, checked and cut to the longest that is allowed."""
    end = [_end_of_text(tokenizer)] if append_eos else []
    told = tokenize(tokenizer, texts).input_ids if texts else []
    ids = [[*row[: max_length - len(end)], *end] for row in told]
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise PrunekitError(f"the text {text!r} has no tokens: leave it out")
        check_ids(model, row, "a text")
    check_length(model, max(map(len, ids), default=1), "lower --max-length (max_length)")
    return ids


def _pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(texts, hidden) of states (texts, tokens, hidden) where the mask (texts, tokens) is 1."""
    lengths = mask.sum(1)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    return (states * mask[:, :, None]).sum(1) / lengths[:, None]


def _unit(vectors: Tensor) -> NDArray[np.float32]:
    """Rows divided by their norms, on the CPU."""
    # by the largest entry first: squares of 16-bit models' outliers may overflow float32
    scaled = vectors / vectors.abs().amax(-1, keepdim=True)
    return (scaled / scaled.norm(dim=-1, keepdim=True)).cpu().numpy()


def _end_of_text(tokenizer: Any) -> int:
    token = tokenizer.eos_token_id
    if token is None:
        raise PrunekitError("the tokenizer has no end-of-text token: leave append_eos out")
    return int(token)
