"""bench/gpu.sh, run for real on whatever machine this is: every part, resuming, bad calls."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
PARTS = ["tests", "sparse24", "metrics", "model", "bitmap", "select"]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def test_a_bad_call_shows_how_to_call_it(tmp_path):
    for arguments in ((), (str(tmp_path), "nonsense"), (str(tmp_path), "model", "more")):
        found = call(*arguments)
        assert found.returncode == 2 and "bench/gpu.sh OUT PART" in found.stderr
    assert not list(tmp_path.iterdir())


def test_without_time_nothing_begins_and_more_is_left(tmp_path):
    found = call(str(tmp_path), "next", "--quick", MINUTES="0")
    assert found.returncode == harness.UNFINISHED and "call again" in found.stderr
    assert not (tmp_path / "parts.txt").exists()


@pytest.mark.slow
def test_every_part_runs_leaves_results_and_is_not_run_again(tmp_path):
    found = call(str(tmp_path), "--quick")
    assert found.returncode == 0, found.stderr[-2000:]
    assert (tmp_path / "parts.txt").read_text().split() == PARTS
    tables = {path.stem: path for path in tmp_path.rglob("*.csv")}
    assert set(tables) == {"sparse", "metrics", "model", "select"}
    for name in tables:
        with tables[name].open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert "ok" in {row["status"] for row in rows}
        assert not [row for row in rows if row["status"] == "wrong"]
        assert all(row["torch"] and row["commit"] for row in rows)
    again = call(str(tmp_path), "--quick")
    assert again.returncode == 0 and "==" in again.stderr and "s left" not in again.stderr


def test_one_part_runs_and_is_not_run_again(tmp_path):
    found = call(str(tmp_path), "sparse24", "--quick")
    assert found.returncode == 0, found.stderr[-2000:]
    assert (tmp_path / "parts.txt").read_text().split() == ["sparse24"]
    (table,) = tmp_path.rglob("*.csv")
    before = table.read_bytes()
    assert call(str(tmp_path), "sparse24", "--quick").stderr == ""
    assert table.read_bytes() == before


def test_a_failing_part_is_said_and_not_finished(tmp_path):
    found = call(str(tmp_path), "tests", "--quick", PYTHON="/nonexistent/python")
    assert found.returncode == 1 and "tests failed" in found.stderr
    assert not (tmp_path / "parts.txt").exists()
