"""Which tokens a text is read in, and which of them are scored: the plan of a comparison.

| kind        | windows                                      | scored tokens                  |
|-------------|----------------------------------------------|--------------------------------|
| `llama.cpp` | whole chunks of n_ctx tokens; the rest is cut | the last n_ctx − 1 − ⌊n_ctx/2⌋ |
| `strided`   | one every `stride` tokens                    | those no window before reached |
| `documents` | each document, cut beyond the context        | all but a window's first       |

`llama.cpp` is what its perplexity tool does, the token at a chunk's start replaced by the
tokenizer's beginning-of-text token where it has one. `strided` with a stride of the context is what
`prunekit compare --kl-report` and the pruning papers do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prunekit.errors import PrunekitError
from prunekit.files.texts import clean
from prunekit.models.token_ids import tokenize

KINDS = ("llama.cpp", "strided", "documents")
JOIN = "\n\n"  # between documents that are read as one text
FEWEST_DOCUMENTS = 8  # below so many, windows are what the bootstrap resamples
GROUP_POSITIONS = 2048  # scored positions that are computed, shared and resumed together


@dataclass(frozen=True)
class Windows:
    """A plan: the windows of a text.

    Attributes:
        kind: One of `KINDS`.
        context: Longest window in tokens.
        stride: Tokens from one window's start to the next; 0 where the kind has none.
        ids: Token ids of each window. The last is only predicted, never read.
        firsts: Index of the first scored token of each window, 1 or more.
        starts: The text's own token at each window's start, where another may have replaced it.
        blocks: Per window the block (scored,) of each scored token: what the bootstrap resamples.
        block_names: What each block is called.
        unit: What a block is: "document" or "window".
    """

    kind: str
    context: int
    stride: int
    ids: tuple[tuple[int, ...], ...]
    firsts: tuple[int, ...]
    starts: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    block_names: tuple[str, ...]
    unit: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def scored(self) -> list[int]:
        """Number of scored tokens of each window."""
        return [len(ids) - first for ids, first in zip(self.ids, self.firsts, strict=True)]

    @property
    def positions(self) -> int:
        """Number of scored tokens."""
        return sum(self.scored)

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The scored tokens of the windows `indices`, one after the other."""
        return [token for index in indices for token in self.ids[index][self.firsts[index] :]]

    def block_of(self) -> NDArray[np.int64]:
        """(positions,) block of every scored token."""
        return np.array([block for row in self.blocks for block in row], dtype=np.int64)

    def groups(self, positions: int = GROUP_POSITIONS) -> list[range]:
        """Runs of consecutive windows with at most so many scored positions (or one window)."""
        found, start, held = [], 0, 0
        for index, count in enumerate(self.scored):
            if index > start and held + count > positions:
                found.append(range(start, index))
                start, held = index, 0
            held += count
        return [*found, range(start, len(self))] if len(self) else found

    def where(self, position: int) -> tuple[int, int]:
        """Window, and index in it, of the token scored at `position` of all."""
        for index, count in enumerate(self.scored):
            if position < count:
                return index, self.firsts[index] + position
            position -= count
        raise IndexError(position)

    def limited(self, limit: int | None) -> Windows:
        """The first `limit` windows; all for None."""
        if limit is None or limit >= len(self):
            return self
        kept = {name: getattr(self, name)[:limit] for name in ("ids", "firsts", "starts", "blocks")}
        return replace(self, **kept)

    def digest(self) -> str:
        """SHA-256 of what is read and scored: equal plans give equal numbers."""
        plan = [list(ids) for ids in self.ids], self.firsts
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a reader of results must know about the plan."""
        return {
            "windows": self.kind,
            "context": self.context,
            "stride": self.stride,
            "count": len(self),
            "positions": self.positions,
            "blocks": len({block for row in self.blocks for block in row}),
            "block_unit": self.unit,
            "sha256": self.digest(),
        }


def planned(
    kind: str,
    documents: Sequence[Sequence[int]],
    *,
    context: int,
    stride: int | None = None,
    begin: int | None = None,
    limit: int | None = None,
    document_of: Sequence[int] | None = None,
) -> Windows:
    """The windows of tokenised documents.

    Args:
        kind: One of `KINDS`.
        documents: Token ids of each document; one for a text that is read as a whole.
        context: Longest window, 2 or more tokens (`llama.cpp`: 4 or more).
        stride: Of `strided`, 1 to `context`; None means `context`.
        begin: Of `llama.cpp`: token that replaces each chunk's first, or None.
        limit: Use at most so many windows.
        document_of: Where a single document is several, joined: the document of each token.

    Raises:
        PrunekitError: A parameter is out of range, or nothing is long enough to be scored.
    """
    if kind not in KINDS:
        raise PrunekitError(f"unknown windows '{kind}': use one of {', '.join(KINDS)}")
    least = 4 if kind == "llama.cpp" else 2
    if context < least:
        raise PrunekitError(
            f"context {context} is too short to predict anything: use {least} or more"
        )
    if stride is not None and kind != "strided":
        raise PrunekitError(f"a stride of {stride} is for strided windows, these are {kind}")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise PrunekitError(f"stride {stride} with context {context}: use 1 to {context}")
    plan = _documents if kind == "documents" else _chunks if kind == "llama.cpp" else _strided
    found: list[tuple[int, int, int, int]] = []  # document, start, end, first scored token
    for index, ids in enumerate(documents):
        found += [(index, *window) for window in plan(len(ids), context, stride)]
    if not found:
        longest = max(map(len, documents), default=0)
        needed = context if kind == "llama.cpp" else 2
        raise PrunekitError(
            f"a text of {longest} tokens has nothing to predict in {kind} windows of {context}, "
            f"which need {needed}: pass a longer one or a smaller context"
        )
    found = found[:limit]
    names, unit = [f"document {index + 1}" for index in range(len(documents))], "document"
    if document_of is not None:
        names = [f"document {index + 1}" for index in range(max(document_of) + 1)]
    if len(names) < FEWEST_DOCUMENTS:
        per_block = context if kind == "strided" else 0  # overlapping windows share their text
        spans = [(index, start // per_block if per_block else start) for index, start, *_ in found]
        order = {span: number for number, span in enumerate(dict.fromkeys(spans))}
        names, unit = [f"window {number + 1}" for number in range(len(order))], "window"
        of_window = [order[span] for span in spans]
        blocks = [
            (block,) * (end - start - first)
            for block, (_, start, end, first) in zip(of_window, found, strict=True)
        ]
    elif document_of is not None:
        blocks = [tuple(document_of[start + first : end]) for _, start, end, first in found]
    else:
        blocks = [(index,) * (end - start - first) for index, start, end, first in found]
    windows = [tuple(documents[index][start:end]) for index, start, end, _ in found]
    starts = tuple(ids[0] for ids in windows)
    if begin is not None and kind == "llama.cpp":
        windows = [(begin, *ids[1:]) for ids in windows]
    return Windows(
        kind,
        context,
        stride if kind == "strided" else 0,
        tuple(windows),
        tuple(first for *_, first in found),
        starts,
        tuple(blocks),
        tuple(names),
        unit,
    )


def of_text(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    kind: str = "llama.cpp",
    context: int = 512,
    stride: int | None = None,
    limit: int | None = None,
) -> Windows:
    """The windows of texts; documents are joined by a blank line unless each is read by itself.

    Raises:
        PrunekitError: See `planned`.
    """
    options: dict[str, Any] = {"context": context, "stride": stride, "limit": limit}
    if kind == "documents":
        encoded = tokenize(tokenizer, documents, verbose=False)["input_ids"]
        return planned(kind, encoded, **options)
    offsets = tokenizer.is_fast and len(documents) >= FEWEST_DOCUMENTS
    text = JOIN.join(map(clean, documents))
    encoded = tokenize(tokenizer, text, verbose=False, return_offsets_mapping=offsets)
    document_of = None
    if offsets:
        ends = np.cumsum([len(clean(document)) + len(JOIN) for document in documents])
        begins = np.array([begin for begin, _ in encoded["offset_mapping"]])
        last = len(documents) - 1
        document_of = np.minimum(np.searchsorted(ends, begins, side="right"), last).tolist()
    ids: list[int] = encoded["input_ids"]
    begin = tokenizer.bos_token_id
    begins_so = bool(ids) and begin is not None and ids[0] == begin
    return planned(
        kind, [ids], begin=begin if begins_so else None, document_of=document_of, **options
    )


Span = tuple[int, int, int]  # start, end, first scored token (counted from the start)


def _chunks(tokens: int, context: int, stride: int) -> list[Span]:
    """llama.cpp's: `first` = n_ctx/2; logits of positions first … n_ctx−2 are scored."""
    starts = range(0, tokens - context + 1, context)
    return [(start, start + context, context // 2 + 1) for start in starts]


def _strided(tokens: int, context: int, stride: int) -> list[Span]:
    found, reached = [], 0
    for start in range(0, tokens, stride):
        end = min(start + context, tokens)
        first = max(reached - start, 1)
        if end - start > first:
            found.append((start, end, first))
        reached = end
        if reached == tokens:
            break
    return found


def _documents(tokens: int, context: int, stride: int) -> list[Span]:
    return _strided(tokens, context, context)
