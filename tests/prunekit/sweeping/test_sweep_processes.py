"""Two processes (gloo, CPU) share every copy's questions and find what one finds."""

from __future__ import annotations

import json
import sys

import processes as together
import pytest
from command_line import QUESTIONS, tiny_model, tiny_tokenizer

from prunekit import checkpoint

COMMAND = "import sys; from prunekit.cli import main; sys.exit(main(sys.argv[1:]))"


def run(arguments: list[str], processes: int) -> list[int]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    return together.run(lambda rank: command, processes, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    checkpoint.save(tiny_model(), tiny_tokenizer(), tmp_path / "dense")
    rows = [{"question": f"What is {n} and {n}?", "answer": str(2 * n)} for n in range(1, 8)]
    (tmp_path / "open.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "text.txt").write_text("A plain text about cats and mats. " * 12)
    files = [f"--{k}={tmp_path / v}" for k, v in (
        ("choices", "choices.jsonl"), ("generate", "open.jsonl"), ("text", "text.txt"),
        ("calibration", "text.txt"),
    )]  # fmt: skip
    arguments = ["sweep", str(tmp_path / "dense"), "--drop", "attn", "--counts", "1,2", *files]
    arguments += [
        "--examples",
        "1",
        "--answer-tokens",
        "5",
        "--batch-size",
        "2",
        "--context",
        "64",
        "--samples",
        "2",
    ]
    arguments += ["--length", "16", "--method", "wanda", "--sparsity", "0.5", "--no-speed"]
    assert run([*arguments, "--quiet", "--output", str(tmp_path / "one")], 1) == [0]
    assert run([*arguments, "--quiet", "--output", str(tmp_path / "two")], 2) == [0, 0]
    one, two = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("one", "two"))
    for told in (one, two):
        del told["meta"]["processes"]
        for series in told["series"]:
            for row in series["rows"]:
                del row["seconds"]
    assert one == two
    assert [len(series["rows"]) for series in one["series"]] == [2, 1]
