"""Grids: statistics over prompts by hand, concatenation, JSON."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from prunekit.analysis import grid as grids
from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.theory import theory
from prunekit.errors import PrunekitError

NAN = np.nan


def make(values, prompts, steps, metric="m"):
    return MetricGrid(
        ("prompt", "step"),
        {"prompt": list(prompts), "step": list(steps)},
        {metric: np.array(values, np.float64)},
    )


def test_prompts_not_steps_are_the_sampling_unit():
    # Prompt 0 has four steps of 1, prompt 1 a single one of 5: the mean is 3, not 9/5.
    grid = make([[1, 1, 1, 1], [5, NAN, NAN, NAN]], [0, 1], range(4))
    assert grid.mean("m") == 3
    found = grid.interval("m")
    assert (found.mean, found.n) == (3, 2)
    assert found.low == 1 and found.high == 5  # two prompts: resamples are {1,1}, {1,5}, {5,5}
    by_step = grid.interval("m", keep=("step",))
    np.testing.assert_array_equal(by_step.mean, [3, 1, 1, 1])
    np.testing.assert_array_equal(by_step.n, [2, 1, 1, 1])


def test_intervals_repeat_and_follow_their_seed():
    rng = np.random.default_rng(3)
    grid = make(rng.normal(size=(30, 2)), range(30), range(2))
    assert grid.interval("m") == grid.interval("m") == grid.interval("m", seed=0)
    assert grid.interval("m", seed=1) != grid.interval("m")


def test_concat_aligns_steps_and_sorts_on_request():
    whole = grids.concat([make([[1.0, 2.0]], [7], [0, 4]), make([[3.0, 4.0]], [2], [0, 2])])
    assert whole.labels == {"prompt": [7, 2], "step": [0, 2, 4]}
    np.testing.assert_array_equal(whole["m"], [[1, NAN, 2], [3, 4, NAN]])
    ordered = grids.in_order(whole)
    assert ordered.labels["prompt"] == [2, 7]
    np.testing.assert_array_equal(ordered["m"], [[3, 4, NAN], [1, NAN, 2]])
    again = grids.concat(whole.prompts())
    np.testing.assert_array_equal(again["m"], whole["m"])
    with pytest.raises(ValueError, match="can't be concatenated"):
        grids.concat([make([[1.0]], [0], [0]), make([[1.0]], [1], [0], "other")])


def test_select_where_and_unknown_names():
    grid = make([[1, 2], [3, 4]], [0, 1], [10, 20])
    np.testing.assert_array_equal(grid.select(step=20)["m"], [[2], [4]])
    masked = grid.where(np.array([[True, False], [True, True]]))
    np.testing.assert_array_equal(masked["m"], [[1, NAN], [3, 4]])
    with pytest.raises(PrunekitError, match="no metric 'x' here: use one of m"):
        grid.interval("x")
    with pytest.raises(PrunekitError, match=r"no step 30 here: use one of \[10, 20\]"):
        grid.select(step=30)
    with pytest.raises(PrunekitError, match="no axis 'layer' here: use one of prompt, step"):
        grid.mean("m", keep=("layer",))


def test_json_round_trip_is_exact_and_has_no_nan_literal():
    values = [[0.1, NAN], [np.inf, -1 / 3]]
    grid = make(values, ["a", "b"], [0, 1])
    text = json.dumps(grid.to_dict(), allow_nan=False)
    again = MetricGrid.from_dict(json.loads(text))
    assert (again.axes, again.labels) == (grid.axes, grid.labels)
    np.testing.assert_array_equal(again["m"], values)


def test_rows_and_csv_aggregate_over_prompts():
    grid = make([[1, 10], [3, NAN]], [0, 1], [0, 5])
    rows = grid.rows()
    assert [(row["step"], row["mean"], row["n"]) for row in rows] == [(0, 2, 2), (5, 10, 1)]
    table = list(csv.DictReader(io.StringIO(grid.to_csv())))
    assert [row["step"] for row in table] == ["0", "5"]
    assert [float(row["mean"]) for row in table] == [2, 10]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="first axis"):
        MetricGrid(("step",), {"step": [0]}, {})
    with pytest.raises(ValueError, match="not float64"):
        make([[1.0, 2.0]], [0], [0])


def test_theory_by_hand():
    names = ("h_one_minus_cosine", "p_one_minus_cosine", "kl_dense_pruned", "kl_pruned_dense")
    values = {name: np.full((2, 1, 1, 2), 0.5) for name in names}
    values["kl_dense_pruned"][..., 1] = 0.0
    for name in ("h_one_minus_cosine_estimate", "p_one_minus_cosine_estimate", "kl_estimate"):
        values[name] = np.full((2, 1, 1, 2), 0.25)
    values["estimate_valid"] = np.array([[[[1.0, 0.0]]], [[[1.0, 1.0]]]])
    labels = {"prompt": [0, 1], "step": [0], "layer": [3], "sublayer": ["attn", "mlp"]}
    grid = MetricGrid(("prompt", "step", "layer", "sublayer"), labels, values)
    rows = {(row["space"], row["sublayer"]): row for row in theory(grid)}
    assert len(rows) == 6 and all(row["layer"] == 3 for row in rows.values())
    assert rows["kl", "attn"]["ratio"] == 0.5 and rows["kl", "attn"]["valid"] == 1
    assert rows["kl", "mlp"]["ratio"] is None and rows["kl", "mlp"]["valid"] == 0.5
    assert rows["h", "mlp"]["ratio"] == 0.5 and rows["h", "mlp"]["valid"] is None
    reverse = {(row["space"], row["sublayer"]): row for row in theory(grid, weights="other")}
    assert reverse["kl", "mlp"]["exact"] == 0.5
    json.dumps(list(rows.values()), allow_nan=False)
