"""Texts become token ids here, and token ids are compared with the embedding that reads them.

Scraped text holds halves of surrogate pairs, tokenizers hold tokens that were added after training,
and configurations name special tokens that do not exist. All of that is found here, before a model
runs: an id outside of an embedding is an IndexError on a CPU and ends the process on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError, one_line
from prunekit.files.texts import clean


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a PrunekitError unless `tokenizer` can be called on texts."""
    if tokenizer is None:
        raise PrunekitError(
            "texts need the model's tokenizer: pass tokenizer=…, as prunekit.load returns it"
        )
    if isinstance(tokenizer, str):
        raise PrunekitError(
            f"tokenizer is the text {tokenizer!r}: pass AutoTokenizer.from_pretrained(…) of it"
        )
    if not callable(tokenizer):
        raise PrunekitError(
            f"a {type(tokenizer).__module__}.{type(tokenizer).__name__} can't be called on texts: "
            "pass a transformers tokenizer, such as "
            "PreTrainedTokenizerFast(tokenizer_object=tokenizer)"
        )


def tokenize(tokenizer: Any, text: str | Sequence[str], **options: Any) -> Any:
    """`tokenizer(text, **options)`, with half surrogates replaced (`clean`).

    Args:
        tokenizer: A transformers tokenizer.
        text: A text, or several.
        **options: Passed on.

    Returns:
        What the tokenizer returns: a mapping with `input_ids`.

    Raises:
        PrunekitError: There is no tokenizer, or it fails on the text.
    """
    check_tokenizer(tokenizer)
    cleaned = clean(text) if isinstance(text, str) else [clean(one) for one in text]
    try:
        return tokenizer(cleaned, **options)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise PrunekitError(
            f"the tokenizer can't encode the text ({one_line(error)}): use the tokenizer that was "
            "saved with the model"
        ) from error


def check_ids(model: PreTrainedModel, ids: Iterable[int] | Tensor, what: str) -> None:
    """Raise a PrunekitError unless the model's embedding has a row for each of `ids`.

    Args:
        model: The model that will read them.
        ids: Token ids.
        what: Where they come from, for the message.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    given = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
    outside = given[(given < 0) | (given >= rows)]
    if outside.numel():
        raise PrunekitError(
            f"{what} holds token id {int(outside[0])}, and the model's embedding has {rows} rows "
            f"(ids 0 to {rows - 1}): use the tokenizer that belongs to the model, or call "
            "model.resize_token_embeddings(len(tokenizer)) and train the new rows"
        )


def check_special(model: PreTrainedModel, name: str, ids: Iterable[int]) -> None:
    """Raise a PrunekitError unless the special token `name` of the configuration exists.

    Args:
        model: The model.
        name: The configuration's field, such as "eos_token_id".
        ids: Its value, or values.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    wrong = next((token for token in ids if not 0 <= token < rows), None)
    if wrong is not None:
        raise PrunekitError(
            f"the model's {name} is {wrong}, and its embedding has {rows} rows (ids 0 to "
            f"{rows - 1}): correct it in config.json and generation_config.json, or set it to None"
        )
