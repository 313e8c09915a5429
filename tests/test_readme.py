"""The README's measured tables are what the files under bench/results say."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECK = [sys.executable, "-m", "bench.readme", "--check"]


def test_tables_come_from_the_result_files():
    found = subprocess.run(CHECK, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_changed_number_is_noticed(tmp_path):
    (tmp_path / "bench").mkdir()
    for path in (ROOT / "bench").rglob("*"):
        if path.suffix in (".py", ".csv", ".json"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, marker, block = text.partition("<!-- measured: quality -->")
    changed = before + marker + block.replace(".", ".9", 1)
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        CHECK, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1 and "differs" in found.stderr


def test_statistics_were_five_times_as_fast_as_the_research_code():
    # its function takes one row at a time; both saw the same 64 rows in turns
    with (ROOT / "bench/results/cpu/metrics.csv").open(newline="", encoding="utf-8") as file:
        times = {
            row["provider"]: float(row["p50_ms"])
            for row in csv.DictReader(file)
            if row["op"] == "pair_stats" and row["shape"] == "N=64 V=49152" and row["p50_ms"]
        }
    assert times["research code"] > 5 * times["prunekernels core"]


def test_the_readme_counts_what_the_demo_asks():
    from prunekit.commands.demo import FULL

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"the {FULL.choices} questions can hardly" in text
    assert f"hardly one of {FULL.prompts}\ngreedy texts" in text
    assert f"{FULL.choices} questions to choose and {FULL.questions} to write" in text
    block = text.partition("<!-- measured: demo -->")[2].partition("<!-- end -->")[0]
    for line in block.strip().splitlines()[2:]:
        n = f"{FULL.choices} questions" if "single-step" in line else f"{FULL.prompts} prompts"
        assert line.endswith(f"| {n} |"), line
