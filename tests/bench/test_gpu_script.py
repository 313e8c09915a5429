"""bench/gpu.sh, run for real on whatever machine this is: every part, resuming, bad calls."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import guard, harness

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
PARTS = [
    "tests",
    "candidates",
    "sparse24",
    "metrics",
    "bitmap",
    "model",
    "select",
    "prune",
    "shapes",
]


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
    assert set(tables) == {"candidates", "sparse", "metrics", "model", "select", "prune_layer"}
    for name in tables:
        with tables[name].open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert "ok" in {row["status"] for row in rows}
        assert not [row for row in rows if row["status"] == "wrong"]
        assert all(row["torch"] and row["commit"] for row in rows)
    again = call(str(tmp_path), "--quick")
    assert again.returncode == 0 and "==" in again.stderr and "s left" not in again.stderr


@pytest.mark.slow
def test_one_part_runs_and_is_not_run_again(tmp_path):
    found = call(str(tmp_path), "sparse24", "--quick")
    assert found.returncode == 0, found.stderr[-2000:]
    assert (tmp_path / "parts.txt").read_text().split() == ["sparse24"]
    (table,) = tmp_path.rglob("*.csv")
    before = table.read_bytes()
    assert call(str(tmp_path), "sparse24", "--quick").stderr == ""
    assert table.read_bytes() == before


def test_failing_tests_are_said_and_do_not_come_before_the_measuring_again(tmp_path):
    found = call(str(tmp_path), "tests", "--quick", PYTHON="/nonexistent/python")
    assert found.returncode == 1 and "tests failed" in found.stderr
    assert found.stderr.splitlines()[-1] == "== tests failed with status 1"
    assert (tmp_path / "parts.txt").read_text() == "tests failed\n"
    assert "nonexistent" in (tmp_path / "tests.txt").read_text()
    again = call(str(tmp_path), "tests", "--quick", PYTHON="/nonexistent/python")
    assert again.returncode == 1 and "== tests (" in again.stderr  # asked for by name: once more


BREAKING = """
import pytest, torch
torch.cuda.is_available = lambda: True
broken = []
def finish():
    if broken:
        raise RuntimeError("illegal memory access")
torch.cuda.synchronize = finish
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "in a kernel"])
def test_fails(kind):
    broken.extend(["kernel"] * (kind != "plain"))
    assert kind == "in a kernel", "wrong numbers"
def test_fine():
    finish()
"""


def test_one_exit_status_stands_for_a_broken_gpu():
    conftest = SCRIPT.parents[1] / "tests" / "conftest.py"
    assert f"\nBROKEN={guard.BROKEN}\n" in SCRIPT.read_text(encoding="utf-8")
    assert f"\nBROKEN = {guard.BROKEN} " in conftest.read_text(encoding="utf-8")


def test_tests_after_one_that_breaks_the_gpu_run_in_a_new_process(tmp_path):
    for name in ("bench/gpu.sh", "tests/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(SCRIPT.parents[1] / name, tmp_path / name)
    (tmp_path / "tests" / "test_breaking.py").write_text(BREAKING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    found = subprocess.run(
        ["bash", str(tmp_path / "bench" / "gpu.sh"), str(tmp_path / "out"), "tests"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    log = (tmp_path / "out" / "tests.txt").read_text()
    assert found.returncode == 1 and "1 failed, 1 passed, 1 deselected" in found.stderr
    assert "ERROR tests/test_breaking.py::test_fails[in a kernel]" in found.stderr
    assert log.count("broke the GPU") == 1 and "illegal memory access" in log


STUB = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
[[ "$*" == *bench_metrics* && ! -e "$LOG.broken" ]] && touch "$LOG.broken" && exit 76
[[ "$*" == *"-m pytest"* ]] && echo "FAILED tests/x.py::test_y - why" && exit 1
[[ "$*" == *bench_select* ]] && exit 1
exit 0
"""


def test_a_broken_gpu_starts_its_part_again_and_failures_do_not_stop_the_others(tmp_path):
    stub, log, out = tmp_path / "python", tmp_path / "log", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    bundle = tmp_path / "bundle.tar.gz"
    settings = {"PYTHON": str(stub), "LOG": str(log), "BUNDLE": str(bundle)}
    found = call(str(out), "next", **settings)
    assert found.returncode == 1 and "2 of 9 parts failed" in found.stderr
    assert "FAILED tests/x.py::test_y - why" in found.stderr
    assert log.read_text().count("bench.bench_metrics") == 2
    assert "--brief" in log.read_text() and "bench.bench_prune --output" in log.read_text()
    finished = [part for part in PARTS if part not in ("tests", "select")]
    assert (out / "parts.txt").read_text().split("\n")[:-1] == ["tests failed", *finished]
    # another machine goes on from the bundle: only what failed as a benchmark is tried again
    log.write_text("")
    other = tmp_path / "other"
    assert call(str(other), "next", **settings).returncode == 1
    runs = [line.split()[1] for line in log.read_text().splitlines()]
    assert runs == ["bench.bench_select", "bench.summary"]
    assert (other / "parts.txt").read_text() == (out / "parts.txt").read_text()


UNFINISHED_ONCE = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
[[ "$*" == *bench_candidates* && ! -e "$LOG.once" ]] && touch "$LOG.once" && exit 75
exit 0
"""


def test_a_part_that_overruns_its_box_lets_the_others_run_and_goes_on_afterwards(tmp_path):
    stub, log, out = tmp_path / "python", tmp_path / "log", tmp_path / "out"
    stub.write_text(UNFINISHED_ONCE)
    stub.chmod(0o755)
    found = call(str(out), "next", PYTHON=str(stub), LOG=str(log))
    assert found.returncode == 0, found.stderr
    order = (out / "parts.txt").read_text().split()
    assert order == [*(part for part in PARTS if part != "candidates"), "candidates"]


def test_a_profile_says_what_it_lacks(tmp_path):
    found = call(str(tmp_path), "profile", PATH="/usr/bin:/bin")
    assert found.returncode == 1 and "ncu is not installed" in found.stderr
