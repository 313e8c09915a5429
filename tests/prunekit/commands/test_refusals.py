"""Bad input and full disks: one line names the fix, before any work, and nothing is changed."""

from __future__ import annotations

import errno
import re
import shlex
import tempfile
from pathlib import Path

import pytest
from command_line import CONTEXT, QUICK, snapshot

from prunekit import checkpoint, cli

BAD_INPUT = {
    "no model": ("prune --output new", "which model", "folder"),
    "unknown model": ("prune ./no/such --output new", "no/such", ""),
    "unknown architecture": (f"prune unknown-architecture {QUICK} --output new", "bloom", "use"),
    "unknown method": ("prune dense --method wander --output new", "wander", "wanda"),
    "pattern 5:4": ("prune dense --pattern 5:4 --output new", "5:4", "2:4"),
    "pattern 0:4": ("prune dense --pattern 0:4 --output new", "0:4", "2:4"),
    "pattern 2-4": ("prune dense --pattern 2-4 --output new", "2-4", "2:4"),
    "sparsity 0": ("prune dense --sparsity 0 --output new", "outside (0, 1)", "0.5"),
    "sparsity 1": ("prune dense --sparsity 1 --output new", "outside (0, 1)", "0.5"),
    "sparsity text": ("prune dense --sparsity half --output new", "--sparsity", "number"),
    "sparsity contradicts": ("prune dense --pattern 2:4 --sparsity 0.7 --output new", "2:4", "out"),
    "setting of another method": ("prune dense --method wanda --block 4 --output new", "block", ""),
    "count too large": (f"drop dense --count 9 {QUICK} --output new", "9", "count <= 3"),
    "blocks too many": (f"drop dense --unit block --count 3 {QUICK} --output new", "3", "<= 2"),
    "count 0": ("drop dense --count 0 --output new", "count 0", "at least 1"),
    "no count": ("drop dense --output new", "how many", "--count 8"),
    "unknown unit": ("drop dense --unit atn --count 1 --output new", "atn", "attn"),
    "unknown strategy": ("drop dense --strategy best --count 1 --output new", "best", "discrete"),
    "unknown format": ("drop dense --count 1 --format zip --output new", "zip", "zeroed"),
    "no teacher": ("recover dense --output new", "which dense model", "--teacher demo"),
    "teacher itself": ("recover dense --teacher dense --output new", "both 'dense'", "pruned copy"),
    "unknown teacher": ("recover dense --teacher ./no/such --output new", "no/such", ""),
    "teacher of another vocabulary": (
        f"recover dense --teacher other-vocabulary {QUICK} --output new",
        "vocabulary of 270 tokens, the model one of 264",
        "pruned from",
    ),
    "unknown loss": ("recover dense --teacher dense --kind mse --output new", "mse", "reverse_kl"),
    "too few to hold out": (
        "recover dense --teacher ./dense --samples 1 --length 16 --calibration long.txt "
        "--output new",
        "at least 2 samples",
        "",
    ),
    "missing calibration": ("prune dense --calibration a.txt --output new", "a.txt", "self"),
    "empty calibration": ("prune dense --calibration empty.txt --output new", "empty.txt", ""),
    "no text": ("prune dense --calibration blank.txt --output new", "blank.txt", ""),
    "broken rows": ("prune dense --calibration broken.jsonl --output new", "broken.jsonl", "2"),
    "too few tokens": ("prune dense --calibration short.txt --length 64 --output new", "64", ""),
    "too long": (f"prune dense --calibration long.txt --length {CONTEXT + 1} --output new", "", ""),
    "NaN weights": (f"prune nan {QUICK} --output new", "up_proj", ""),
    "NaN compared": ("compare dense nan --no-choices --output new", "up_proj", "again"),
    "no tasks": ("eval dense", "which tasks", "--tasks"),
    "commas for tasks": ("eval ./no/such --tasks , ", "which tasks", "--tasks"),
    "NaN inspected": ("inspect nan", "up_proj", "again"),
    "truncated": ("inspect truncated", "truncated", "again"),
    "foreign": ("inspect foreign", "foreign", "folder"),
    "vocabularies": ("compare dense other-vocabulary --output new", "264 and 270", "checkpoint"),
    "architectures": ("compare dense other-architecture --output new", "llama and qwen2", "copy"),
    "no pruned model": ("compare dense --output new", "pruned model", "folder"),
    "long prompt": (
        "compare dense dense --prompts long-prompt.txt --choices choices.jsonl --output new",
        str(CONTEXT),
        "shorten",
    ),
    "text without a report": ("compare dense dense --text long.txt --output new", "--text", "add"),
    "short text": ("compare dense dense --kl-report --text empty.txt", "empty.txt", ""),
    "missing prompts": ("compare dense dense --prompts none.txt --output new", "none.txt", "path"),
    "empty prompts": ("compare dense dense --prompts empty.txt --output new", "empty.txt", "add"),
    "bad choices": ("compare dense dense --choices bad-choices.jsonl --output new", "line 1", "0"),
    "a number of answers": (
        "compare dense dense --generate 8 --output new",
        "--generate 8",
        "'builtin' or 'none'; how many are asked is --limit",
    ),
    "temperature": (
        "compare dense dense --prompts prompts.txt --no-choices --temperature 0 --output new",
        "temperature",
        "above 0",
    ),
    "infinite temperature": ("compare dense dense --temperature inf", "'inf'", "above 0"),
    "chat": ("compare dense dense --chat allways --output new", "allways", "'always'"),
    "lens": (
        "compare dense dense --prompts prompts.txt --no-choices --lens rawr --output new",
        "rawr",
        "raw",
    ),
    "no output": ("prune dense", "--output", "DIR"),
    "output not empty": ("prune dense --output full", "not empty", "--overwrite"),
    "output foreign": ("prune dense --output full --overwrite", "won't be overwritten", "another"),
    "study over model": ("compare dense dense --output dense --overwrite", "study.json", "another"),
    "demo over files": ("demo --output full", "not empty", "--overwrite"),
    "output is a file": ("prune dense --output long.txt", "is a file", "folder"),
    "output below a file": ("prune dense --output long.txt/out", "is a file", "another"),
    "device": ("inspect dense --device tpu", "tpu", "cpu"),
    "no such GPU": ("inspect dense --device cuda:97", "cuda:97", "use cpu"),
    "dtype": ("inspect dense --dtype int3", "int3", "float32"),
    "unknown command": ("prun dense", "prun", "did you mean prune?"),
    "unknown option": ("prune dense --sparsty 0.5", "--sparsty", "did you mean --sparsity?"),
    "option like no other": ("prune dense --bogus", "option --bogus (see", "--help"),
    "stray argument": ("inspect dense twice", "twice", "--help"),
    "not a number": ("drop dense --count many", "--count", "whole number"),
    "negative seed": ("prune dense --seed -1 --output new", "--seed", "whole number"),
    "config missing": ("prune dense --config none.yaml --output new", "none.yaml", "check"),
    "config broken": ("prune dense --config broken.yaml --output new", "broken.yaml", "line 1"),
    "config no mapping": ("prune dense --config list.yaml --output new", "mapping", "pattern"),
    "config key": ("prune dense --config unknown.yaml --output new", "patern", "'pattern'"),
    "config nothing": ("prune dense --output new --config", "--config", "FILE.yaml"),
    "rule without effect": ("prune dense --config rules.yaml --output new", "*.nothing", "q_proj"),
    "rules and method": (
        "prune dense --config rules.yaml --method wanda --output new",
        "--method",
        "rule",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_names_the_fix(case, here, capfd):
    line, problem, fix = BAD_INPUT[case]
    before = snapshot(here)
    assert cli.main(shlex.split(line)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("prunekit: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert problem in err and fix in err
    assert "Traceback" not in err
    assert snapshot(here) == before


@pytest.mark.parametrize(
    "line", ["prune dense", "drop dense --count 1", "swap dense", "compare dense dense"]
)
@pytest.mark.parametrize("where", ["a full disk", "/proc"])
def test_unwritable_output_is_found_before_any_work(line, where, here, capfd, monkeypatch):
    folder = Path("new")
    if where == "/proc":  # where nobody creates a folder, root included
        if not Path(where).is_dir():
            pytest.skip("no /proc here")
        folder = Path(where) / "new" / "below"
    else:

        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded the model"))
    before = snapshot(here)
    assert cli.main([*line.split(), "--output", str(folder)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert re.search(r"can't be written \(No .*\): choose another folder", err)
    assert snapshot(here) == before


def test_output_is_checked_before_the_model_is_loaded(here, capfd, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded the model"))
    for line in ("prune dense", "drop dense --count 1", "compare dense dense", "demo"):
        assert cli.main([*line.split(), "--output", "full"]) == 2
        assert "not empty" in capfd.readouterr().err


@pytest.mark.parametrize("report", ["", "--kl-report"])
def test_a_wrong_second_model_is_found_before_the_first_is_loaded(
    report, here, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("loaded the first"))
    line = f"compare dense ./no/such/model --output new {report}"
    assert cli.main(line.split()) == 2
    assert "./no/such/model doesn't exist" in capsys.readouterr().err
