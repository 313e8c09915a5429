"""Measures of a ranking: nDCG, recall, reciprocal rank, from the ranks of relevant documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prunekit.errors import PrunekitError

Floats = NDArray[np.float64]


def ranks(scores: Floats, relevant: Sequence[int], left_out: int | None = None) -> list[int]:
    """Ranks, from 1, of documents by descending score; among equal scores the first comes first.

    Args:
        scores: (documents,), finite.
        relevant: Indices of the documents to place.
        left_out: Index of a document that does not take part (the query itself), or None.

    Raises:
        PrunekitError: A score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        raise PrunekitError(
            "a similarity is not finite: check the model's weights, or load it in float32"
        )
    taking_part = np.ones(len(scores), bool)
    if left_out is not None:
        taking_part[left_out] = False
    found = []
    for index in relevant:
        before = scores > scores[index]
        before[:index] |= scores[:index] == scores[index]
        found.append(1 + int((before & taking_part).sum()))
    return found


def ndcg(found: Sequence[int], grades: Sequence[int], cut: int) -> float:
    """nDCG at `cut`: Σ grade / log2(rank + 1), over that of the ideal order (Järvelin 2002).

    As trec_eval's ndcg_cut and BEIR count it: gains are the grades themselves.

    Args:
        found: Ranks of the relevant documents, from 1.
        grades: Their grades, 1 or more.
        cut: Ranks beyond it gain nothing.
    """
    gained = sum(
        grade / np.log2(rank + 1) for rank, grade in zip(found, grades, strict=True) if rank <= cut
    )
    ideal = sorted(grades, reverse=True)[:cut]
    return float(gained / sum(grade / np.log2(place + 2) for place, grade in enumerate(ideal)))


def recall(found: Sequence[int], cut: int) -> float:
    """Share of the relevant documents whose rank is at most `cut`."""
    return sum(rank <= cut for rank in found) / len(found)


def reciprocal_rank(found: Sequence[int]) -> float:
    """One over the rank of the first relevant document, over the whole ranking."""
    return 1 / min(found)


def of_query(found: Sequence[int], grades: Sequence[int], cuts: Sequence[int]) -> dict[str, float]:
    """All measures of one query, by name: ndcg@k and recall@k of every cut, and mrr."""
    values = {f"ndcg@{cut}": ndcg(found, grades, cut) for cut in cuts}
    values |= {f"recall@{cut}": recall(found, cut) for cut in cuts}
    return {**values, "mrr": reciprocal_rank(found)}


def table(queries: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    """Per measure its values, one for each query."""
    return {name: np.array([values[name] for values in queries]) for name in queries[0]}
