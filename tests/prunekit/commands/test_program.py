"""The program around the commands: help, interruptions, bugs, and who listens."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from command_line import snapshot

from prunekit import checkpoint, cli
from prunekit.checkpoint import writing
from prunekit.commands import COMMANDS
from prunekit.errors import PrunekitError


@pytest.mark.parametrize("moment", ["pruning", "saving"])
def test_ctrl_c_leaves_the_old_output(moment, here, tmp_path, capfd, monkeypatch):
    old = tmp_path / "old"
    shutil.copytree(here / "dense", old)
    before = snapshot(tmp_path)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    import prunekit.pruning

    if moment == "pruning":
        monkeypatch.setattr(prunekit.pruning, "prune_", interrupt)
    else:
        monkeypatch.setattr(writing, "write_manifest", interrupt)
    line = f"prune dense --method magnitude --overwrite --output {old}"
    assert cli.main(line.split()) == 130
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "interrupted" in err
    assert snapshot(tmp_path) == before


def test_a_bug_is_one_line_too_and_says_how_to_see_more(here, capfd, monkeypatch):
    def fail(*_, **__):
        raise KeyError("oops")

    monkeypatch.setattr(checkpoint, "load", fail)
    assert cli.main(["inspect", "dense"]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "KeyError" in err and "PRUNEKIT_TRACEBACK=1" in err
    monkeypatch.setenv("PRUNEKIT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(["inspect", "dense"])


@pytest.mark.parametrize(
    ("error", "status", "fix"),
    [
        (MemoryError(), 2, "--batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "--batch-size"),
        (OSError(28, "No space left on device", "out/x"), 2, "free some space"),
        (PermissionError(13, "Permission denied", "out/x"), 2, "permissions"),
        (PrunekitError("two\nlines: fix"), 2, "error: two lines: fix"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=repr,
)
def test_what_ends_a_command_is_explained(error, status, fix, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a broken pipe replaces it
    found, line = cli.explain(error)
    assert found == status and fix in line and "\n" not in line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_parses(name, capsys):
    assert cli.main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    example = out.partition("example:\n")[2].strip()
    assert err == "" and example.startswith(f"prunekit {name}")
    assert cli.parse(shlex.split(example)[1:]).command == name


def test_help_of_the_program_shows_runnable_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    examples = [line.strip() for line in out.splitlines() if line.startswith("  prunekit ")]
    commands = [line.partition("   ")[0] for line in examples if "COMMAND" not in line]
    assert len(commands) == 4
    for line in commands:
        assert cli.parse(shlex.split(line)[1:]).command in COMMANDS
    assert cli.main([]) == 0 and "COMMAND" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("prunekit 0.")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['prunekit', 'compare', '--help']\n"
        "from prunekit.cli import main; status = main()\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert status == 0 and not heavy, heavy"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5  # 0.2 s on a quiet machine; importing torch takes 2


def test_a_reader_that_stops_listening_is_no_error(here, capfd, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.main(["doctor", "--json"]) == 141
    assert capfd.readouterr() == ("", "")
