"""The floor of exact match: by hand, and against texts that follow the prediction's own model."""

from __future__ import annotations

import numpy as np
import pytest

from prunekit.sweeping.floors import Floor, calibration, floor_of, from_where
from prunekit.sweeping.prediction import BINS, survival

CURVES = [np.array([0.9, 0.5, 0.1]), np.array([0.8, 0.2]), np.array([0.7])]


def test_a_floor_by_hand():
    first = [2.0, None, 0.0]
    found = floor_of(CURVES, [2, 1, 1], first, [True, True, False], [True, False, True], seed=0)
    assert found.floor == pytest.approx((0.5 + 0.8) / 3)
    assert found.observed == pytest.approx(found.dense) == pytest.approx(2 / 3)
    assert found.lost == pytest.approx(100 * (2 / 3 - 1.3 / 3))
    assert found.above.low < found.above.mean < found.above.high
    assert (found.kept, found.strayed) == (2, 1)
    # one token more or less is another floor
    for complete in ([3, 1, 1], [1, 1, 1], [2, 2, 1]):
        other = floor_of(CURVES, complete, first, [True, True, False], [True] * 3, seed=0)
        assert abs(other.floor - found.floor) > 0.1 and other.strayed == 0
    assert floor_of(CURVES, [3, 1, 1], first, [True] * 3, [True] * 3, seed=0).kept == 1


def written(back: float, moved: int = 0, questions: int = 4000) -> Floor:
    """The floor of a copy that leaves the dense texts by the hazard that S is made of.

    Its answer is right again with probability `back` once its text has left the dense one before
    the answer was complete; the floor reads S `moved` tokens too late.
    """
    draw = np.random.default_rng(7)
    hazard = np.linspace(0.02, 0.3, len(BINS) - 1)
    middle = np.array([*(np.add(BINS[:-2], BINS[1:-1]) / 2), 5.0])
    bins = draw.integers(0, len(BINS) - 1, (questions, 9))
    complete = draw.integers(2, 8, questions)
    dense = draw.random(questions) < 0.7
    flips = draw.random(bins.shape) < hazard[bins]
    # the step of the first flip, as `first_divergence` counts, and none that is ever reached
    first = np.where(flips.any(1), flips.argmax(1), 99)
    copy = dense & ((first >= complete) | (draw.random(questions) < back))
    curves = survival(hazard, [middle[path].tolist() for path in bins])
    moved_ends = (complete + moved).tolist()
    return floor_of(curves, moved_ends, first.tolist(), dense.tolist(), copy.tolist(), seed=0)


def test_a_floor_is_met_where_texts_follow_its_model():
    exact = written(back=0.0)
    assert exact.above.low < 0 < exact.above.high and abs(exact.above.mean) < 0.015
    assert exact.strayed == 0 and exact.kept == pytest.approx(4000 * exact.observed)
    assert 0.05 < exact.floor < exact.dense - 0.05  # neither nothing nor all is left
    # answers that stay right behind a divergence stand on it
    loose = written(back=0.5)
    assert loose.above.low > 0
    assert loose.above.mean == pytest.approx((loose.dense - loose.floor) / 2, abs=0.02)
    # and it is no floor, or a lower one, where positions are off by one
    assert written(back=0.0, moved=-1).above.high < 0 < written(back=0.0, moved=1).above.low


def test_where_exact_match_goes():
    assert from_where([1.0, 3.0, 1.0, 2.5, 4.0], 2.0) == 3
    assert from_where([3.0, 2.1], 2.0) == 0
    assert from_where([3.0, 2.0], 2.0) is None and from_where([], 2.0) is None


def test_calibration_by_hand():
    first: list[float | None] = [None] * 60
    one = floor_of(CURVES, [2, 1, 1], first[:3], [True, True, False], [True, True, True], seed=0)
    many = floor_of([np.array([0.9])] * 60, [1] * 60, first, [True] * 60, [False] * 60, seed=0)
    told = calibration([one, many])
    assert (told["points"], told["reached"], told["allows"]) == (2, 1, 1)
    assert (told["kept"], told["strayed"]) == (62, 60)
    assert told["mean_above"] == pytest.approx((1 - 1.3 / 3 - 0.9) / 2)
    assert told["mean_distance"] == pytest.approx((1 - 1.3 / 3 + 0.9) / 2)
    assert told["dense_mean_distance"] == pytest.approx((1 / 3 + 1) / 2)
    assert calibration([]) is None
