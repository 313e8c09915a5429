"""`prunekit sweep` on a tiny model: one command, resumed, its best copy saved, and refusals."""

from __future__ import annotations

import json

import pytest
from command_line import QUICK, snapshot, tiny_tokenizer
from tokenizers import normalizers

from prunekit import checkpoint, cli, load
from prunekit.evaluation.items import load_choices
from prunekit.evaluation.likelihood import encode_choices
from prunekit.report import png

ASKED = "--choices choices.jsonl --generate open.jsonl --examples 1 --answer-tokens 4"
FEW = f"--text text.txt --context 64 --no-speed --batch-size 4 {QUICK}"


@pytest.fixture
def folder(here, monkeypatch):
    """The commands' folder, with open questions in it."""
    monkeypatch.setattr(png, "draw", lambda figure, path: path.touch())
    rows = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(1, 6)]
    (here / "open.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (here / "fields.jsonl").write_text(json.dumps({"ask": "How many?", "gold": "3"}))
    (here / "text.txt").write_text("A plain text about cats and mats. " * 8)
    return here


def test_the_command(folder, capsys, tmp_path):
    out, best = tmp_path / "out", tmp_path / "best"
    line = f"sweep dense dense --drop attn,mlp --counts 1 {ASKED} {FEW} --output {out} --budget 99"
    assert cli.main([*line.split(), "--json", "--quiet", "--save-best", str(best)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["series"]] == [
        "attentions dropped",
        "MLPs dropped",
        "dense",
    ]
    assert found["meta"]["choices"] == 3 and found["meta"]["questions"] == 4
    assert found["series"][2]["rows"][0]["kl"]["kl"]["mean"] == 0
    assert (out / "index.html").is_file() and (out / "figures").is_dir()
    model, _ = checkpoint.load(str(best))
    assert found["saved"] in ("1 attention", "1 MLP")
    sizes = {row["label"]: row["parameters"] for one in found["series"] for row in one["rows"]}
    assert (
        sum(p.numel() for p in model.parameters()) == sizes[found["saved"]] == min(sizes.values())
    )
    # a table the second time, from what is recorded
    before = snapshot(out / "points")
    assert cli.main(line.split()) == 0
    shown, _ = capsys.readouterr()
    assert "1 attention" in shown and "exact match" in shown and str(out / "index.html") in shown
    assert snapshot(out / "points") == before
    assert cli.main([*line.split(), "--seed", "1"]) == 2
    assert "another calibration" in capsys.readouterr().err
    assert cli.main([*line.split(), "--limit", "1"]) == 2
    assert "other multiple-choice questions (--choices, --limit)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--drop attn --counts 9", "counts 9 of attn: this model can lose 1 to 3"),
        (
            "--drop attn --counts one",
            "--counts one is no list of numbers: write numbers with commas",
        ),
        ("--drop knee", "unit 'knee' is unknown"),
        ("--method magic", "method 'magic' is unknown"),
        ("--sparsity 0.5", "--sparsity and --pattern say how a --method prunes"),
        ("--method wanda --sparsity 1.5", "sparsity 1.5"),
        ("--generate fields.jsonl", "fields ask, gold; name them with --question-field"),
        ("--generate open.jsonl --examples 5", "5 examples of 5 questions leave none"),
        ("--choices none --generate none", "nothing to ask"),
        ("--choices bad-choices.jsonl", "'answer' is 7"),
        ("--text long.txt --no-kl", "leave --no-kl out"),
        ("--output full", "holds something else"),
        ("--save-best full", "not empty"),
        ("--budget 0", "not a number above 0"),
    ],
)
def test_refusals(folder, capsys, tmp_path, flags, message):
    line = f"sweep dense --output {tmp_path / 'out'} --quiet --answer-tokens 4 {QUICK} {flags}"
    before = snapshot(folder)
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "command",
    [
        f"sweep {{0}} --generate none --output {{1}} {QUICK}",
        "compare {0} {0} --prompts prompts.txt --output {1}",
    ],
)
def test_options_that_are_the_same_tokens(folder, capsys, tmp_path, command):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    model, _ = checkpoint.load("dense")
    checkpoint.save(model, tokenizer, tmp_path / "lower")
    out, choices = tmp_path / "out", tmp_path / "alike.jsonl"
    items = [("one", ["no", "No way"]), ("two", ["Rome", "Paris", "paris"])]
    rows = [{"id": n, "question": "Where?", "options": o, "answer": 0} for n, o in items]
    choices.write_text("\n".join(map(json.dumps, rows)))
    line = f"{command.format(tmp_path / 'lower', out)} --choices {choices} --quiet"
    assert cli.main(line.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "item 'two': the options 'Paris' and 'paris' are the same tokens" in said
    assert not list(out.rglob("*.safetensors"))  # before anything is calibrated
    # to a tokenizer that tells them apart they are two options
    checkpoint.save(model, tiny_tokenizer(), tmp_path / "cased")
    assert encode_choices(load(tmp_path / "cased")[1], load_choices(choices))
