"""Figures show what the CSVs say: ratios by hand, and nothing is drawn without rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import plot, result_rows


def row(**columns: object) -> dict[str, object]:
    made: dict[str, object] = dict.fromkeys(result_rows.COLUMNS, "")
    fixed = {"status": "ok", "device": "x", "torch": "2", "commit": "c", "roof_gb_s": 4000.0}
    return made | fixed | {"roof_tflop_s": 800.0} | columns


def timed(milliseconds: float, **columns: object) -> dict[str, object]:
    times = {"p20_ms": 0.9 * milliseconds, "p50_ms": milliseconds, "p80_ms": 1.2 * milliseconds}
    return row(**times, gb_s=100.0, tflop_s=1.0, items_s=1000 / milliseconds, **columns)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layers = [
        timed(ms, op="linear", mode=mode, provider=name, shape=f"M={m} N=64 K=32 sparsity={s}")
        for mode, others in (("2:4", ("2:4 auto", "peer")), ("unstructured", ("bitmap auto",)))
        for m in (1, 16)
        for s in ((0.5,) if mode == "2:4" else (0.5, 0.7))
        for ms, name in zip((2.0, 1.0, 4.0), ("dense", *others), strict=False)
    ]
    layers.append(row(status="absent", provider="gone", mode="2:4", shape="M=1 N=64 K=32"))
    result_rows.append_rows(tmp_path / "sparse.csv", layers)
    pairs = [
        timed(ms, op="pair_stats", provider=name, dtype="float32", shape=f"N=8 V={v}")
        for v in (1000, 2000)
        for ms, name in ((9.0, "torch eager"), (3.0, "prunekernels core"), (1.0, "copy"))
    ]
    result_rows.append_rows(tmp_path / "metrics.csv", pairs)
    models = [
        timed(ms, op="decode", mode="tiny static", provider=name, shape=f"batch={b} prompt=8 new=4")
        for b in (1, 8)
        for ms, name in ((9.0, "dense"), (6.0, "dropped"))
    ]
    result_rows.append_rows(tmp_path / "model.csv", models)
    return tmp_path


def test_every_figure_is_drawn_once(folder):
    made = plot.draw(folder)
    assert [path.name for path in made] == [
        "roofline.png",
        "speedup_over_tokens.png",
        "speedup_over_sparsity.png",
        "speedup_over_vocabulary.png",
        "end_to_end.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_speedups_are_ratios_of_medians_within_a_case(folder):
    rows = plot.speedups(plot.read(folder / "sparse.csv"), "dense", "mode", "N", "K", "M")
    assert {r["provider"]: r["speedup"] for r in rows if r["M"] == 1 and r["mode"] == "2:4"} == {
        "dense": 1.0,
        "2:4 auto": 2.0,
        "peer": 0.5,
    }
    peer = next(r for r in rows if r["provider"] == "peer")
    assert peer["low"] == pytest.approx(2 / 4.8) and peer["high"] == pytest.approx(2 / 3.6)
    assert "gone" not in {r["provider"] for r in rows}


@pytest.fixture
def figures(folder, monkeypatch):
    """Every figure by its file's name, unwritten, with its axes."""
    found = {}
    monkeypatch.setattr(
        plot, "finish", lambda figure, axes, path: found.update({path.name: (figure, axes)})
    )
    plot.draw(folder)
    yield found
    plot.plt.close("all")


def test_ratios_are_logarithmic_around_one_with_plain_numbers(figures):
    for kind in ("tokens", "sparsity", "vocabulary"):
        _, axes = figures[f"speedup_over_{kind}.png"]
        for axis in axes:
            bottom, top = axis.get_ylim()
            assert axis.get_yscale() == "log" and bottom < 0.75 and top > 1.35
            assert 1 in axis.get_yticks()
            figures[f"speedup_over_{kind}.png"][0].canvas.draw()
            assert "1" in {label.get_text() for label in axis.get_yticklabels()}
    (axis,) = figures["speedup_over_sparsity.png"][1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["50 %", "70 %"]


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0.02, 1.4, [0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        (0.7, 1.7, [0.8, 1, 1.2, 1.5]),
        (0.5, 900, [1, 10, 100]),
    ],
)
def test_ticks_of_ratios_are_few_and_round(low, high, ticks):
    assert plot.ratio_ticks(low, high) == ticks


def test_the_foot_says_how_spread_is_drawn_where_it_is(figures):
    notes = {name: figure.texts[-1].get_text() for name, (figure, _) in figures.items()}
    assert {name for name, note in notes.items() if "band" in note} == {
        f"speedup_over_{kind}.png" for kind in ("tokens", "sparsity", "vocabulary")
    }
    assert "whiskers" in notes["end_to_end.png"] and notes["roofline.png"].endswith("medians")


def test_the_copy_is_a_dashed_mark_without_a_band(figures):
    (axis,) = figures["speedup_over_vocabulary.png"][1]
    styles = {line.get_label(): line.get_linestyle() for line in axis.lines}
    assert styles[plot.MARKS["copy"]] == "--" and styles["prunekernels core"] == "-"
    assert len(axis.collections) == 2  # bands of ours and of eager torch


def test_without_rows_or_a_second_point_nothing_is_drawn(folder, tmp_path):
    for name in ("sparse.csv", "metrics.csv", "model.csv"):
        kept = (folder / name).read_text().splitlines()[:2]
        (folder / name).write_text("\n".join(kept) + "\n")
    assert plot.over_tokens(folder) is None and plot.over_vocabulary(folder) is None
    assert plot.over_sparsity(folder) is None
    (tmp_path / "empty").mkdir()
    assert plot.draw(tmp_path / "empty") == []
