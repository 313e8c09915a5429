"""Tables for the terminal: numbers keep what matters."""

from __future__ import annotations

import io
import math

import pytest
from made_studies import make_study, sweep_rows

from prunekit.report import (
    charts,
    summary_tables,
    terminal,
)


@pytest.mark.parametrize(
    ("number", "short", "shown"),
    [
        (0.99999871, 0.9999987, "0.999999"),
        (0.99312346, 0.9931235, "0.9931"),
        (1234567.0, 1234567, "1.23e+06"),
        (0.000123456, 0.00012346, "1.23e-04"),
        (3.0, 3, "3"),
        (45.6789, 45.6789, "45.68"),
        (math.nan, None, "–"),
        (math.inf, None, "∞"),
    ],
)
def test_numbers_keep_what_matters(number, short, shown):
    assert charts.compact_number(number) == short
    assert summary_tables.number(number) == shown


def test_values_hide_intervals_that_say_nothing():
    assert str(summary_tables.Value(50.0, 41.25, 58.75, "%")) == "50 % [41.25, 58.75]"
    assert str(summary_tables.Value(25.0, 25.0, 25.0, "%")) == "25 %"
    assert str(summary_tables.Value(2.5)) == "2.5"


def test_terminal_tables_show_the_numbers(study):
    def text(shown: object) -> str:
        out = io.StringIO()
        terminal.show(shown, out)
        return out.getvalue()

    summary = text(terminal.study_summary(study))
    for metric in ("kl_dense_pruned", "kl_pruned_dense", "kl_estimate"):
        found = study.summary()[metric]
        ends = [
            summary_tables.number(float(getattr(found, end))) for end in ("mean", "low", "high")
        ]
        assert f"{ends[0]} nats [{ends[1]}, {ends[2]}]" in summary
    assert "to probability: 24 prompts" in summary
    assert "Single-step (72 questions) against generative (24 prompts)" in summary
    assert "estimates valid" in summary and "first difference after" in summary
    assert "single-step: accuracy" in summary and "69.44 % [" in summary and "66.67 % [" in summary
    other = make_study(size=2.0)
    both = text(terminal.studies_side_by_side({"small": study, "large": other}))
    ends = [
        summary_tables.number(float(s.summary()["kl_dense_pruned"].mean)) for s in (study, other)
    ]
    line = next(line for line in both.splitlines() if line.startswith("KL(dense‖pruned)"))
    assert line.index(ends[0]) < line.index(ends[1])
    assert "small: whole vocabulary" in both and "large: whole vocabulary" in both
    row = [line for line in both.splitlines() if line.startswith("KL(dense‖pruned)")][1]
    metrics = ("subset_kl_dense_pruned", "kl_dense_pruned")
    wanted = [
        summary_tables.number(float(one.subspace.grid.interval(name).mean))
        for one in (study, other)
        for name in metrics
    ]
    assert [word for word in row.split() if word in wanted] == wanted
    swept = text(terminal.sweep_table(sweep_rows()))
    assert "24 questions, 24 prompts" in swept
    assert "60" in swept and "58" in swept and "30" in swept


def test_sizes_for_people():
    assert [terminal.size(n) for n in (999, 1500, 269_000_000)] == ["999 B", "1.5 kB", "269 MB"]
