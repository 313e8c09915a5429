"""Two processes (gloo, CPU) share the mixes and find what one finds."""

from __future__ import annotations

import json
import sys

import processes as together
import pytest
from command_line import tiny_model, tiny_tokenizer

from prunekit import checkpoint

COMMAND = "import sys; from prunekit.cli import main; sys.exit(main(sys.argv[1:]))"


def run(arguments: list[str], processes: int) -> list[int]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    return together.run(lambda rank: command, processes, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    checkpoint.save(tiny_model(), tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("A plain text about cats and mats. " * 12)
    arguments = ["search", str(tmp_path / "dense"), "--bytes", "80%", "--method", "magnitude"]
    arguments += ["--choices", "2:4,50%,drop", "--text", str(tmp_path / "text.txt"), "--context"]
    arguments += ["32", "--generations", "2", "--offspring", "5", "--quiet", "--output"]
    assert run([*arguments, str(tmp_path / "one")], 1) == [0]
    assert run([*arguments, str(tmp_path / "two")], 2) == [0, 0]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "measured.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert one == two and len(one) > 20  # in the same order, too
    told = [json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two")]
    assert told[0] == told[1]
    saved = [
        (tmp_path / name / "best" / "model.safetensors").read_bytes() for name in ("one", "two")
    ]
    assert saved[0] == saved[1]
