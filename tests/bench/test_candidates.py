"""The draw between old and new kernels: who meets whom, and what a file of times decides."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from bench import bench_candidates
from bench.bench_candidates import DRAWS, draws, plan, verdicts
from bench.harness import Session
from bench.result_rows import COLUMNS

TWO_FOUR = ("linear", "2:4", "bfloat16", "M=64 N=14336 K=4096 sparsity=0.5")


def written(path: Path, *rows: tuple[tuple[str, ...], str, str, str]) -> Path:
    """A result file of (case, provider, status, median in ms)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case, provider, status, ms in rows:
            row = dict.fromkeys(COLUMNS, "") | dict(
                zip(("op", "mode", "dtype", "shape"), case, strict=True)
            )
            writer.writerow(row | {"provider": provider, "status": status, "p50_ms": ms})
    return path


def test_the_new_kernel_stays_only_where_it_beats_the_fastest_old_one(tmp_path):
    slower = (*TWO_FOUR[:3], "M=1 N=4096 K=4096 sparsity=0.5")
    path = written(
        tmp_path / "candidates.csv",
        (TWO_FOUR, "2:4 mma_sp", "ok", "0.048"),
        (TWO_FOUR, "2:4 wgmma_sp", "ok", "0.060"),
        (TWO_FOUR, "2:4 wgmma_tma", "ok", "0.024"),
        (slower, "2:4 mma_sp", "ok", "0.008"),
        (slower, "2:4 wgmma_tma", "ok", "0.016"),
    )
    first, second = verdicts(path)
    assert "2:4 mma_sp 48.0 µs, 2:4 wgmma_tma 24.0 µs (2.00×): 2:4 wgmma_tma stays" in first
    assert "(0.50×): 2:4 mma_sp stays" in second


def test_a_kernel_that_is_wrong_wins_nothing_and_is_named(tmp_path):
    path = written(
        tmp_path / "candidates.csv",
        (TWO_FOUR, "2:4 mma_sp", "ok", "0.048"),
        (TWO_FOUR, "2:4 wgmma_tma", "wrong", ""),
        (TWO_FOUR, "cuSPARSELt best", "absent", ""),
    )
    (line,) = verdicts(path)
    assert line.startswith("2:4 wgmma_tma at M=64") and "wrong" in line


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_every_case_belongs_to_a_draw_and_every_draw_has_a_case(tmp_path, quick):
    import torch

    cases = plan(Session(tmp_path / "x.csv", torch.device("cpu"), quick=quick))
    assert all(draws(case) for case in cases)
    assert {draw for case in cases for draw in draws(case)} == set(DRAWS)


def test_compiling_ahead_measures_nothing(tmp_path, monkeypatch):
    arguments = ["--quick", "--device", "cpu", "--output", str(tmp_path), "--compile", "0/2"]
    monkeypatch.setattr(sys, "argv", ["bench_candidates", *arguments])
    assert bench_candidates.main() == 0
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("share", ["2/2", "0", "a/b"])
def test_a_share_that_does_not_exist_is_refused(share, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_candidates", "--compile", share])
    with pytest.raises(SystemExit) as ended:
        bench_candidates.main()
    assert ended.value.code == 2 and "give 0/13" in capsys.readouterr().err
