"""Sentences about a study claim no more than its numbers show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_studies import PROMPTS, make_study

from prunekit import report
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.grid import MetricGrid
from prunekit.evaluation.intervals import wilson
from prunekit.report import (
    contents,
    sentences,
)
from prunekit.study.study import Study


def said(study: Study) -> str:
    return " ".join(one.text for one in sentences.describe(study))


def test_sentences_say_whether_the_estimate_holds():
    small, middle, large = (make_study(size) for size in (0.005, 0.15, 2.0))
    assert "estimate of KL is valid at" in said(small)
    assert said(small).count("24 prompts") == 3
    assert not any(one.warn for one in sentences.describe(small))
    assert "so take it with care" in said(middle)
    assert "is not usable here" in said(large)
    assert [one.warn for one in sentences.describe(large)].count(True) == 1


@pytest.mark.parametrize(
    ("right", "verdict", "claim"),
    [
        ((50, 48), "includes zero: 2 right answers turn wrong and 0 wrong ones right", True),
        ((50, 40), "excludes zero: 10 right answers turn wrong and 0 wrong ones right", False),
        ((50, 50), "no answer turns from right to wrong or back; up to 5.0", True),
    ],
    ids=str,
)
def test_sentences_claim_no_more_than_the_scores_show(right, verdict, claim):
    text = said(make_study(right=right))
    assert verdict in text and "goes from 69.44 % [" in text
    assert ("does not show what happened" in text) == claim


def test_equal_accuracies_may_hide_flips_and_old_studies_claim_no_change():
    whole = make_study(right=(36, 36))
    swapped = replace(whole, right={**whole.right, "pruned": whole.right["dense"][::-1]})
    text = said(swapped)
    assert "paired difference is 0.00 points [" in text and "36 right answers turn wrong" in text
    assert "and 36 wrong ones right (McNemar's exact p = 1)" in text
    old = said(replace(whole, right=None, answers=None))
    assert "paired" not in old and "does not show what happened" not in old


def test_sentences_about_few_prompts_and_questions():
    whole = make_study()
    assert "Only" not in said(whole)
    decoding = replace(whole.decoding, generations=whole.decoding.generations[:5])
    few = {name: {"accuracy": wilson(6, 10)} for name in ("dense", "pruned")}
    right = dict.fromkeys(few, (True,) * 6 + (False,) * 4)
    text = said(replace(whole, decoding=decoding, scores=few, right=right, answers=None))
    assert "Only 5 prompts" in text and "Only 10 questions" in text
    assert "does not show what happened" not in text


def test_identical_models_are_called_identical(tmp_path):
    whole = make_study()
    grid = whole.decoding.teacher_forced
    values = {
        n: np.ones_like(v) if n.endswith("cosine") else np.zeros_like(v)
        for n, v in grid.values.items()
    }
    values |= {n: np.zeros_like(v) for n, v in values.items() if "one_minus" in n}
    same = MetricGrid(grid.axes, grid.labels, values)
    nothing = np.full(PROMPTS, math.nan)
    texts = tuple(replace(g, first_divergence=None) for g in whole.decoding.generations)
    sequence = {
        **whole.decoding.sequence,
        "first_divergence": nothing,
        "identical": nothing * 0 + 1,
    }
    sequence["identical"] = np.ones(PROMPTS)
    study = replace(whole, decoding=Decoding(same, texts, sequence))
    text = said(study)
    assert "identical at every position" in text and "all 24 greedy texts are identical" in text
    assert "KL(dense‖pruned) averages" not in text
    # its figures have a logarithmic axis without any positive value
    report.save(Study(study.meta, decoding=study.decoding), tmp_path / "out")
    cards = contents.payload(study)["hierarchy"]
    assert [card["value"]["mean"] for card in cards] == [1, 1, 1]
