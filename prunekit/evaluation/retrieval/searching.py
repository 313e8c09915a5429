"""`retrieve`: how well a language model's hidden states find the documents that answer queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import Interval, bootstrap_mean, paired_difference
from prunekit.evaluation.retrieval.collection import Collection, load_collection
from prunekit.evaluation.retrieval.embedding import POOLINGS, Pooling, pooled
from prunekit.evaluation.retrieval.measures import Floats, of_query, ranks, table
from prunekit.process.ambient import usual_torch

CUTS = (10, 100)
# Stands before every query, none before documents, as models trained for retrieval expect.
INSTRUCTION = "Task: find the passages that answer this question.\nQuestion: "
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Retrieval:
    """What one model found.

    Attributes:
        queries: Ids of the queries.
        ranks: Per query the ranks of its relevant documents, from 1, in the order of `relevant`.
        values: Per measure (ndcg@10, recall@10, ndcg@100, recall@100, mrr) one float64 per query.
        meta: Collection, numbers of documents and queries, and options.
    """

    queries: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    values: Mapping[str, Floats]
    meta: dict[str, Any]

    def interval(self, measure: str, *, seed: int = 0) -> Interval:
        """Mean of a measure over the queries, with its bootstrap interval.

        Raises:
            PrunekitError: There is no such measure.
        """
        return bootstrap_mean(self._of(measure), seed=seed)

    def change(self, other: Retrieval, measure: str, *, seed: int = 0) -> Interval:
        """Mean of `other` less this one's on the same queries, with its paired interval.

        Raises:
            PrunekitError: The queries differ, or there is no such measure.
        """
        if self.queries != other.queries:
            raise PrunekitError("the two searched for other queries: use the same collection")
        return paired_difference(self._of(measure), other._of(measure), seed=seed)

    def _of(self, measure: str) -> Floats:
        if measure not in self.values:
            raise PrunekitError(f"no measure '{measure}': use one of {', '.join(self.values)}")
        return self.values[measure]


def retrieve(
    model: PreTrainedModel,
    tokenizer: Any,
    collection: Collection | None = None,
    *,
    pooling: Pooling = "last",
    instruction: str = INSTRUCTION,
    max_length: int = 512,
    append_eos: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> Retrieval:
    """Rank all documents for every query by the cosine of their vectors.

    The vectors are pooled final hidden states (`pooled`). A document that has the id of the query
    does not take part, as in BEIR. Under several processes each embeds its share of the texts.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        collection: What to search; None: the built-in one.
        pooling: "last" or "mean".
        instruction: Stands before every query.
        max_length: Longest text in tokens.
        append_eos: Put the end-of-text token behind every text.
        batch_size: Texts run together.
        progress: Show progress bars (on a terminal only).

    Raises:
        PrunekitError: See `pooled`.
    """
    return retrieve_by(
        model,
        tokenizer,
        collection,
        poolings=(pooling,),
        instruction=instruction,
        max_length=max_length,
        append_eos=append_eos,
        batch_size=batch_size,
        progress=progress,
    )[pooling]


@usual_torch()
def retrieve_by(
    model: PreTrainedModel,
    tokenizer: Any,
    collection: Collection | None = None,
    *,
    poolings: Sequence[Pooling] = POOLINGS,
    instruction: str = INSTRUCTION,
    **options: Any,
) -> dict[Pooling, Retrieval]:
    """`retrieve` with several poolings of the same states, which are computed once."""
    searched = load_collection() if collection is None else collection
    asked = [instruction + text for text in searched.queries.values()]
    told = list(searched.documents.values())
    queries = pooled(model, tokenizer, asked, poolings, label="queries", **options)
    documents = pooled(model, tokenizer, told, poolings, label="documents", **options)
    meta = {
        "collection": searched.name,
        "documents": len(searched.documents),
        "queries": len(searched.queries),
        "notes": list(searched.notes),
        "instruction": instruction,
        "max_length": options.get("max_length", 512),
        "append_eos": options.get("append_eos", False),
    }
    return {
        pooling: _searched(
            searched, queries[pooling], documents[pooling], {**meta, "pooling": pooling}
        )
        for pooling in poolings
    }


def _searched(
    searched: Collection,
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    meta: dict[str, Any],
) -> Retrieval:
    """Ranks and measures of every query, from vectors of length 1."""
    place = {name: index for index, name in enumerate(searched.documents)}
    found: list[tuple[int, ...]] = []
    values: list[dict[str, float]] = []
    names = list(searched.queries)
    for start in range(0, len(names), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        scores = queries[part].astype(np.float64) @ documents.T.astype(np.float64)
        for query, row in zip(names[part], scores, strict=True):
            relevant = searched.relevant[query]
            own = ranks(row, [place[name] for name in relevant], place.get(query))
            found.append(tuple(own))
            values.append(of_query(own, list(relevant.values()), CUTS))
    return Retrieval(tuple(names), tuple(found), table(values), meta)
