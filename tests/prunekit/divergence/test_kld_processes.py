"""Two processes (gloo, CPU) share the windows and find what one finds, bit for bit."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import processes as together
from safetensors.numpy import load_file

COMMAND = "import sys; from prunekit.cli import main; sys.exit(main(sys.argv[1:]))"
# small groups, so that both processes have some
SMALL = "import prunekit.divergence.windows as w; g = w.Windows.groups; "
SMALL += "w.Windows.groups = lambda self, positions=30: g(self, positions); "


def run(arguments: list[str], processes: int) -> list[int]:
    command = [sys.executable, "-c", SMALL + COMMAND, *arguments]
    return together.run(lambda rank: command, processes, OMP_NUM_THREADS="1")


def test_two_processes_find_what_one_does(tiny, perturbed, saved, text_file, tmp_path):
    base = tiny("llama")
    here, near = saved(base, "base"), saved(perturbed(base, 0.02), "near")
    torn = tmp_path / "torn"
    shutil.copytree(near, torn)
    (torn / "model.safetensors").write_bytes(b"half a file")
    arguments = ["kld", here, near, str(torn), "--text", str(text_file), "--context", "16"]
    arguments += ["--floor", "none", "--quiet", "--output"]
    assert run([*arguments, str(tmp_path / "one")], 1) == [2]  # one candidate can't be read
    assert run([*arguments, str(tmp_path / "two")], 2) == [2, 2]
    one, two = (json.loads((tmp_path / name / "kld.json").read_text()) for name in ("one", "two"))
    assert one == two and len(one["candidates"]) == 2 and one["candidates"][0]["error"] is None
    rows = sorted((tmp_path / "one" / "candidates").glob("near-*/rows-*.safetensors"))
    assert len(rows) > 4
    for path in rows:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        mine, theirs = load_file(path), load_file(other)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
