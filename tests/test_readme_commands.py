"""What README prints as commands is what the command line understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from prunekit import cli
from prunekit.commands import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PRINTED = re.findall(r"^\| `(prunekit [^`]+)` \|", README, flags=re.MULTILINE)


def test_the_readme_has_commands_and_the_line_that_finds_them():
    assert len(PRINTED) >= 10
    assert "source .venv/bin/activate" in README


@pytest.mark.parametrize("line", PRINTED)
def test_every_command_of_the_table_is_understood(line):
    name, *arguments = shlex.split(line)[1:]
    parser = cli.Parser(prog=f"prunekit {name}")
    COMMANDS[name].add_arguments(parser)
    parser.parse_args(arguments)
