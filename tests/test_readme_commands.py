"""What README prints runs as printed, in a folder of its own, with the environment activated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Commands of the table, in its order: later ones read what earlier ones wrote.
COMMANDS = re.findall(r"^\| `(prunekit [^`]+)` \|", README, flags=re.MULTILINE)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
#: Commands that need a package which `make test` does not install.
NEEDS = {"prunekit eval": "lm_eval"}


def run(command: list[str] | str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        shell=isinstance(command, str),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_readme_has_commands_and_snippets():
    assert len(COMMANDS) >= 10 and len(SNIPPETS) >= 2
    assert "source .venv/bin/activate" in README


@pytest.mark.slow
def test_every_command_of_the_table_runs_as_printed(tmp_path):
    for command in COMMANDS:
        needed = next((NEEDS[start] for start in NEEDS if command.startswith(start)), None)
        found = run(command, tmp_path)
        if needed is not None and found.returncode == 2:
            assert "is not installed: run " in found.stderr, found.stderr
            continue
        assert found.returncode == 0, f"{command}: {found.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_every_python_snippet_runs_as_printed(tmp_path, index):
    found = run([sys.executable, "-c", SNIPPETS[index]], tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
