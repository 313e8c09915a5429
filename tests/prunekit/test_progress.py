"""Progress: nothing for short work, lines for long work in a log, and what is counted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from prunekit import errors
from prunekit.errors import install
from prunekit.process import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each item takes; the clock moves on with every look at it."""

    def tick(seconds: float) -> None:
        now = iter(range(10_000))
        monkeypatch.setattr(progress.time, "monotonic", lambda: seconds * next(now))

    return tick


def test_long_work_without_a_terminal_says_how_far_it_is(clock, capsys):
    clock(10.0)
    batches = [[1, 2, 3], [4, 5, 6], [7, 8], [9]]
    assert list(progress.track(batches, "scoring", count=len)) == batches
    lines = capsys.readouterr().err.splitlines()
    # 3 are done at 20 s, 6 at 30 s (too soon after the last line), 8 at 40 s, all at 50 s
    assert lines == ["scoring: 3 of 9, about 40 s left", "scoring: 8 of 9, about 5 s left"]


def test_short_work_without_a_terminal_is_silent(clock, capsys):
    clock(0.5)
    assert list(progress.track(range(20), "scoring")) == list(range(20))
    assert capsys.readouterr().err == ""


def test_other_processes_are_silent(clock, capsys, monkeypatch):
    clock(100.0)
    monkeypatch.setattr(progress.distributed, "is_main", lambda: False)
    assert list(progress.track([1, 2, 3], "scoring")) == [1, 2, 3]
    assert list(progress.track([1, 2, 3], "scoring", enabled=False)) == [1, 2, 3]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h")],
)
def test_durations_are_said_as_people_do(seconds, said):
    assert progress.duration(seconds) == said


def test_an_install_hint_names_this_interpreter_and_this_checkout(monkeypatch):
    hint = install("eval")
    assert hint.startswith(f"{sys.executable} -m pip install -e ") and "[eval]" in hint
    assert (Path(shlex.split(hint)[-1].removesuffix("[eval]")) / "pyproject.toml").is_file()
    monkeypatch.setattr(errors, "__file__", "/lib/python3/site-packages/prunekit/errors.py")
    assert install("eval") == f"{sys.executable} -m pip install 'prunekit[eval]'"
