"""Edges by hand, and the prediction of the first divergence against its own model."""

from __future__ import annotations

import numpy as np
import pytest

from prunekit.analysis.answers import expected_agreement
from prunekit.evaluation.intervals import Paired, paired
from prunekit.sweeping.edges import Edge, bounds, edge, is_lost
from prunekit.sweeping.prediction import BINS, calibration, flips_by_entropy, predicted


def change(gained: int, lost: int, n: int = 400) -> Paired:
    before = [True] * lost + [False] * (n - lost)
    after = [False] * lost + [True] * gained + [False] * (n - lost - gained)
    return paired(before, after)


def test_an_edge():
    changes = [change(9, 2), change(1, 6), change(4, 15), change(0, 80)]
    assert edge(changes, 2.0) == Edge(holds=1, shown=0, lost=3)
    assert edge(changes, 6.0) == Edge(holds=2, shown=2, lost=3)
    assert edge(changes[2:], 2.0) == Edge(holds=None, shown=None, lost=1)
    assert edge([change(0, 80), change(20, 20)], 2.0).lost is None  # it came back
    assert is_lost(change(0, 80), 2.0) and not is_lost(change(4, 15), 2.0)


def test_few_changes_rule_out_only_what_the_questions_could_show():
    for gained in (0, 1):
        low, high = bounds(change(gained, 0, n=50))
        assert -0.08 < low < -0.05 and high > 0.05
        assert edge([change(gained, 0, n=50)], 2.0) == Edge(holds=0, shown=None, lost=None)
        assert edge([change(gained, 0, n=50)], 10.0).shown == 0
    # where many changed, both ways give nearly the same
    many = change(60, 90)
    assert bounds(many) == pytest.approx((many.difference.low, many.difference.high), abs=0.006)


def test_agreement_by_chance():
    ours, theirs = ["10", "10.0", None, "7"], [None, "7", "10", "10", "10", "1"]
    pairs = [(a, b) for a in ours for b in theirs]
    same = [(a is None) == (b is None) and (a is None or float(a) == float(b)) for a, b in pairs]
    assert expected_agreement(ours, theirs) == pytest.approx(np.mean(same))
    assert expected_agreement(["1"] * 5, ["1"] * 3) == 1.0


def test_flips_are_counted_by_entropy():
    entropies = np.array([0.0, 0.01, 0.02, 0.3, 3.5, 50.0])
    found = flips_by_entropy(entropies, np.array([True, False, True, True, False, True]))
    assert sum(found["positions"]) == 6 and found["positions"][:2] == [2, 1]
    assert found["flips"][:2] == [1, 1] and found["positions"][-1] == 1
    assert len(found["positions"]) == len(BINS) - 1


def test_texts_that_follow_the_model_are_predicted():
    draw = np.random.default_rng(5)
    hazard = np.linspace(0.001, 0.3, len(BINS) - 1)
    places = draw.integers(0, len(BINS) - 1, 200_000)
    middle = np.array([*(np.add(BINS[:-2], BINS[1:-1]) / 2), 5.0])
    counted = flips_by_entropy(middle[places], draw.random(len(places)) < hazard[places])
    told = []
    for _ in range(3):
        paths = [draw.choice(len(BINS) - 1, 16, p=None) for _ in range(2000)]
        first = []
        for path in paths:
            flips = np.nonzero(draw.random(16) < hazard[path])[0]
            first.append(float(flips[0]) if len(flips) else None)
        told.append(predicted(counted, [middle[path] for path in paths], first))
    found = calibration(told)
    assert found["mean_absolute_error"] < 0.02 and found["correlation"] > 0.99
    assert told[0]["predicted_same"] == pytest.approx(told[0]["observed_same"], abs=0.04)
    assert [row["step"] for row in told[0]["steps"]] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert calibration([]) is None
