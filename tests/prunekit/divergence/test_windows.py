"""The plans: which tokens are read and scored, and what the bootstrap resamples."""

from __future__ import annotations

import pytest

from prunekit.divergence.windows import of_text, planned
from prunekit.errors import PrunekitError


def test_llama_cpp_scores_the_second_half_of_whole_chunks():
    ids = list(range(100, 127))
    plan = planned("llama.cpp", [ids], context=8, begin=1)
    assert len(plan) == 3  # 27 tokens: the last 3 are left
    for number, window in enumerate(plan.ids):
        assert window == (1, *ids[8 * number + 1 : 8 * number + 8])
    assert plan.starts == (100, 108, 116)
    # logits of positions n_ctx/2 … n_ctx−2 are scored: n_ctx − 1 − n_ctx/2 of them
    assert plan.scored == [3, 3, 3] and plan.firsts == (5, 5, 5)
    assert plan.labels(range(1, 2)) == [113, 114, 115]
    assert planned("llama.cpp", [ids], context=9).scored == [4, 4, 4]  # 9 − 1 − 4


def test_strided_windows_score_every_token_but_the_first_once():
    ids = list(range(50))
    for context, stride in ((8, 8), (8, 3), (8, 1), (60, 60), (49, 48)):
        plan = planned("strided", [ids], context=context, stride=stride)
        scored = plan.labels(range(len(plan)))
        missing = set(ids) - set(scored)
        assert len(scored) == len(set(scored))
        # a window that starts where the one before ended leaves its own first token unscored
        assert missing == (set(range(0, 50, context)) if stride == context else {0})
        for window, first in zip(plan.ids, plan.firsts, strict=True):
            assert len(window) <= context and first >= 1


def test_each_document_is_a_text_of_its_own():
    plan = planned("documents", [list(range(5)), list(range(20, 33)), [7]], context=8)
    assert [window[0] for window in plan.ids] == [0, 20, 28]
    assert plan.scored == [4, 7, 4]


def test_documents_are_blocks_where_there_are_enough(word_tokenizer, documents):
    joined = of_text(word_tokenizer, documents, context=16)
    assert joined.unit == "document" and joined.facts()["blocks"] == 12
    # every scored token belongs to the document that it stands in
    lengths = [len(document.split()) for document in documents]
    at = {}
    for number, length in enumerate(lengths):
        for _ in range(length):
            at[len(at)] = number
    for index, blocks in enumerate(joined.blocks):
        expected = tuple(at[16 * index + place] for place in range(joined.firsts[index], 16))
        assert blocks == expected
    alone = of_text(word_tokenizer, documents, kind="documents", context=64)
    assert alone.unit == "document" and len(alone) == 12
    one = of_text(word_tokenizer, documents[:1] * 3, context=16)
    assert one.unit == "window" and one.facts()["blocks"] == len(one)


def test_overlapping_windows_share_a_block():
    plan = planned("strided", [list(range(64))], context=16, stride=4)
    starts = [window[0] for window in plan.ids]
    assert [row[0] for row in plan.blocks] == [start // 16 for start in starts]


def test_groups_cover_all_windows_in_order():
    plan = planned("llama.cpp", [list(range(400))], context=8)
    groups = plan.groups(10)
    assert [index for group in groups for index in group] == list(range(len(plan)))
    assert max(sum(plan.scored[i] for i in group) for group in groups) <= 10
    assert len(plan.groups(1)) == len(plan)  # one window at least


def test_digest_sees_tokens_and_scored_positions():
    first, second = (planned("llama.cpp", [list(range(n, n + 32))], context=8) for n in (0, 1))
    assert first.digest() != second.digest()
    strided = planned("strided", [list(range(32))], context=8)
    assert strided.ids == first.ids and strided.digest() != first.digest()
    assert first.limited(2).digest() != first.digest() == first.limited(9).digest()


def test_bad_plans_name_the_fix():
    ids = list(range(40))
    for message, arguments in (
        (r"context 3 .* use 4 or more", {"kind": "llama.cpp", "context": 3}),
        (r"context 1 .* use 2 or more", {"kind": "strided", "context": 1}),
        (r"40 tokens has nothing .* need 64", {"kind": "llama.cpp", "context": 64}),
        (r"stride 9 with context 8", {"kind": "strided", "context": 8, "stride": 9}),
        (r"stride of 4 is for strided", {"kind": "documents", "context": 8, "stride": 4}),
        (r"unknown windows 'sliding'", {"kind": "sliding", "context": 8}),
    ):
        arguments = dict(arguments)
        with pytest.raises(PrunekitError, match=message):
            planned(arguments.pop("kind"), [ids], **arguments)
