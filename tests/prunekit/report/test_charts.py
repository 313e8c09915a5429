"""Charts and their PNG figures: what they show, mark and leave out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_studies import LAYERS, make_grid, make_study
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from prunekit.analysis.grid import MetricGrid
from prunekit.report import (
    answer_charts,
    charts,
    contents,
    grid_charts,
    png,
)


def test_figures_show_data_in_the_colours_of_the_legend(folder):
    expected = {
        "layerwise_similarity": ("h", "z", "p"),
        "layerwise_estimates": ("p", "estimate"),
        "accumulated": ("h", "z", "p", "reverse"),
        "stepwise": ("h", "z", "p", "generative"),
        "options": ("dense", "pruned"),
        "single_step_vs_generative": ("dense", "pruned"),
    }
    assert {path.stem for path in (folder / "figures").iterdir()} == set(expected)
    for name, roles in expected.items():
        image = imread(folder / "figures" / f"{name}.png")[..., :3]
        assert image.shape[0] > 400 and image.shape[1] > 700
        for role in roles:
            near = np.abs(image - to_rgb(charts.COLORS[role])).max(-1) < 0.02
            assert near.sum() > 100, (name, role)


def test_the_right_option_is_marked_where_a_long_one_is_not_cut(study):
    item = study.subspace.items[0]
    long = replace(item, options=tuple(f"{option} and so on" * 9 for option in item.options))
    subspace = replace(study.subspace, items=(long,))
    chart = answer_charts.options(subspace, None).charts[0]
    assert [name[:4] for name in chart.categories if "✓" in name] == [f"✓ {'ABCD'[item.answer]}."]


def test_removal_replaces_the_layerwise_figure():
    whole = make_study()
    other = replace(whole, removal=make_grid(whole.layerwise.axes, 11, shape=(6, 8, LAYERS, 2)))
    titles = [contents.figures(one)[0].text for one in (whole, other)]
    assert "replaced by its pruned twin" in titles[0] and "is removed" in titles[1]
    means = [contents.figures(one)[0].charts[0].series[2].mean for one in (whole, other)]
    assert (
        means[1] == pytest.approx(other.removal["p_cosine"][:, :, :, 0].mean((0, 1)), rel=1e-12)
        and means[0] != means[1]
    )


def test_estimates_go_with_the_kl_whose_weights_they_have():
    whole = make_study()
    labels = [
        contents.figures(replace(whole, meta={**whole.meta, "weights": w}))[1].charts[0].y_label
        for w in ("base", "other")
    ]
    assert labels == ["KL(dense‖pruned) (nats)", "KL(pruned‖dense) (nats)"]


def test_layers_without_change_have_no_estimate_figure():
    whole = make_study().layerwise
    values = {name: value.copy() for name, value in whole.values.items()}
    values["kl_dense_pruned"][:] = 0
    still = MetricGrid(whole.axes, whole.labels, values)
    assert grid_charts.layerwise_estimates(grid_charts.Traced(still, False, {})) is None
    values["kl_dense_pruned"][:, :, 4, 1] = 0.5
    figure = grid_charts.layerwise_estimates(grid_charts.Traced(still, False, {}))
    assert [chart.key for chart in figure.charts] == ["estimate-kl-mlp", "estimate-cos-mlp"]


def test_dropped_layers_are_counted_in_the_dense_model():
    dense = {"kept_blocks": [0, 1, 2, 3, 4, 6], "dropped": {"attn": [1], "mlp": []}}
    pruned = {"kept_blocks": [0, 1, 3, 4, 6], "dropped": {"attn": [1, 3], "mlp": [4]}}
    models = {"dense": dense, "pruned": pruned}
    assert contents.dropped_layers(models) == {"attn": [2, 4], "mlp": [2, 5]}


def test_invalid_estimates_are_marked(tmp_path):
    x = list(range(6))
    exact = charts.Series("exact", "p", x, [1.0] * 6)
    for valid, marked in (([1.0] * 6, []), ([1, 0.4, 0.5, 0, 1, math.nan], [1, 3])):
        estimate = charts.Series("estimate", "estimate", x, [2.0] * 6, valid=valid)
        assert estimate.invalid_at() == marked
        chart = charts.Chart("c", "t", "layer", "KL", [exact, estimate], log=True)
        png.draw(charts.Figure("f", "t", "", [chart]), tmp_path / f"{len(marked)}.png")
    drawn = [imread(tmp_path / f"{count}.png") for count in (0, 2)]
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)


def test_series_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        charts.Series("a", "p", [0, 1], [0.5])
