"""Tables for the terminal: numbers keep what matters."""

from __future__ import annotations

import io
import math

import pytest
from made_studies import make_study
from rich import console

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
    assert str(summary_tables.Value(50.0, 41.25, 58.75, "%")) == "50.00 % [41.25, 58.75]"
    assert str(summary_tables.Value(25.0, 25.0, 25.0, "%")) == "25 %"
    assert str(summary_tables.Value(2.5)) == "2.5"


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ((15.6476, 9.7281, 25.3725), "15.65 [9.73, 25.37]"),
        ((0.981481, 0.962963, 1.0), "0.981 [0.963, 1.000]"),
        ((0.9995116, 0.9994808, 0.9995391), "0.999512 [0.999481, 0.999539]"),
        ((98.148, 95.1234, 100.0), "98.1 [95.1, 100.0]"),
        ((0.0, -0.05, 0.05), "0.00000 [-0.05000, 0.05000]"),
        ((3.0, 1.0, 5.0), "3 [1, 5]"),
        ((2.1e-4, 1.0e-4, 3.4e-4), "2.10e-04 [1.00e-04, 3.40e-04]"),
        ((0.0123, 0.0001, 30.0), "0.012 [0.000, 30.000]"),
    ],
    ids=str,
)
def test_a_value_and_its_interval_have_the_same_decimals(ends, shown):
    assert str(summary_tables.Value(*ends)) == shown


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_tables_fit_the_terminal_without_wrapping_cells(study, width):
    def text(shown: object) -> str:
        out = io.StringIO()
        console.Console(file=out, width=width, force_terminal=True, color_system=None).print(shown)
        return out.getvalue()

    other = make_study(size=2.0)
    for shown in (
        terminal.study_summary(study),
        terminal.studies_side_by_side({"small": study, "large": other}),
    ):
        assert max(map(len, text(shown).splitlines())) <= width
    both = text(terminal.studies_side_by_side({"small": study, "large": other}))
    for one in (study, other):  # a mean and its unit are never torn apart
        value = summary_tables.Value.of(one.summary()["kl_dense_pruned"], "nats")
        assert value.short() in both or str(value) in both
    assert ("share of the positions" in both) == (width == 200)
    assert ("Intervals: on a wider terminal" in both) == (width <= 100)
    rows = [{"Name": "a", "What": "long words " * 6, "Rate": "12.5 tokens/s"}]
    narrow = text(terminal.records("Rates", rows, spare=["What"]))
    assert ("long words" in narrow) == (width > 80) and "12.5 tokens/s" in narrow


def test_terminal_tables_show_the_numbers(study):
    def text(shown: object) -> str:
        out = io.StringIO()
        terminal.show(shown, out)
        return out.getvalue()

    summary = text(terminal.study_summary(study))
    for metric in ("kl_dense_pruned", "kl_pruned_dense", "kl_estimate"):
        found = study.summary()[metric]
        assert str(summary_tables.Value.of(found, "nats")) in summary
    assert "to probability: 24 prompts" in summary
    assert "Single-step (72 questions) against generative (24 prompts)" in summary
    assert "estimates valid" in summary and "first difference after" in summary
    assert "single-step: accuracy" in summary and "69.44 % [" in summary and "66.67 % [" in summary
    other = make_study(size=2.0)
    both = text(terminal.studies_side_by_side({"small": study, "large": other}))
    ends = [
        str(summary_tables.Value.of(s.summary()["kl_dense_pruned"], "nats")) for s in (study, other)
    ]
    line = next(line for line in both.splitlines() if line.startswith("KL(dense‖pruned)"))
    assert line.index(ends[0]) < line.index(ends[1])
    assert "small: whole vocabulary" in both and "large: whole vocabulary" in both
    row = [line for line in both.splitlines() if line.startswith("KL(dense‖pruned)")][1]
    metrics = ("subset_kl_dense_pruned", "kl_dense_pruned")
    wanted = [
        str(summary_tables.Value.of(one.subspace.grid.interval(name), "nats")).split()[0]
        for one in (study, other)
        for name in metrics
    ]
    assert [word for word in row.split() if word in wanted] == wanted
    assert "generated: exact match" in summary and "generated: same answer" in summary
    assert "exact match on 6 open questions goes from 100" in " ".join(summary.split())


def test_sizes_for_people():
    assert [terminal.size(n) for n in (999, 1500, 269_000_000)] == ["999 B", "1.5 kB", "269 MB"]
