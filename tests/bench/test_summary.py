"""The summary at the end of a run: ratios by hand, absences once, what went wrong."""

from __future__ import annotations

from pathlib import Path

from bench import result_rows, summary


def row(provider: str, shape: str, ms: str, **others: str) -> dict[str, str]:
    blank = dict.fromkeys(result_rows.COLUMNS, "")
    named = {"op": "linear", "mode": "2:4", "provider": provider, "shape": shape, "p50_ms": ms}
    return blank | named | {"status": "ok"} | others


def write(folder: Path) -> None:
    gone = {"status": "absent", "note": "pip install it"}
    rows = [
        row("dense", "M=1", "3.0"),
        row("2:4 auto", "M=1", "1.5"),
        row("peer", "M=1", "", **gone),
        row("other", "M=1", "", **gone),
        row("dense", "M=64", "1.0"),
        row("2:4 auto", "M=64", "2.0"),
        row("peer", "M=64", "", **gone),
        row("dense", "M=128", "1.0"),
        row("2:4 auto", "M=128", "", status="wrong", note="error 3"),
    ]
    result_rows.append_rows(folder / "sparse.csv", rows)
    result_rows.append_rows(folder / "prune.csv", [{"method": "wanda", "seconds": 1}])


def test_ratios_are_within_a_case_and_absences_and_errors_are_said_once(tmp_path):
    write(tmp_path)
    said = summary.lines(tmp_path)
    ratio = next(line.split() for line in said if line.startswith("  linear"))
    assert ratio == ["linear", "2:4", "auto", "dense", "1.25×", "0.50–2.00×", "1", "of", "2"]
    assert [line for line in said if "pip" in line] == ["  absent: peer, other: pip install it"]
    assert said[-1] == "  wrong linear 2:4 auto error 3 (M=128)"
    assert any("sparse.csv" in line and "5 ok, 3 absent, 1 wrong" in line for line in said)
    assert any("prune.csv" in line and "columns of its own" in line for line in said)
