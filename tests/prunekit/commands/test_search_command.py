"""`prunekit search` on the command line: what it writes, going on, refusals in one line."""

from __future__ import annotations

import json

import pytest

import prunekit as pk
from prunekit.cli import main
from prunekit.packed import packed_layers, weight_bytes

WORK = ["--context", "16", "--limit", "8", "--generations", "1", "--offspring", "2", "--quiet"]
MADE = ["--method", "magnitude", "--choices", "2:4, 50%, drop"]


def _run(place, out, *more: str, capsys) -> dict:
    text = ["--text", str(place / "long.txt")]
    given = ["search", str(place / "dense"), *MADE, *WORK, *text, "--output", str(out), *more]
    assert main([*given, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_saved_model_is_the_found_mix_packed(place, tmp_path, capsys):
    out = tmp_path / "out"
    told = _run(place, out, "--bytes", "80%", capsys=capsys)
    assert told["found"]["within"] and told["choices"] == ["dense", "2:4", "50%", "drop"]
    best, _ = pk.load(out / "best")
    assert weight_bytes(best) == told["found"]["bytes"]
    measured = (out / "measured.jsonl").read_text()
    again = _run(place, out, "--bytes", "0.8", capsys=capsys)
    assert again["found"] == told["found"] and (out / "measured.jsonl").read_text() == measured
    other = _run(place, out, "--speed", "1.2x", "--no-pack", capsys=capsys)
    assert other["found"]["speed"] >= 1.2 and other["budget"].startswith("speed")


def test_choices_of_few_bits_are_saved_packed_so(place, tmp_path, capsys):
    text, out = str(place / "long.txt"), tmp_path / "out"
    given = ["search", str(place / "dense"), "--choices", "2:4-int8, 2:4-fp8", "--text", text]
    given += ["--calibration", text, "--samples", "8", "--length", "32", *WORK]
    assert main([*given, "--bytes", "70%", "--output", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["choices"] == ["dense", "2:4-int8", "2:4-fp8"] and told["found"]["within"]
    best, _ = pk.load(out / "best")
    held = {layer.format for _, layer in packed_layers(best)}
    assert held and held <= {"2:4-int8", "2:4-fp8"} and weight_bytes(best) == told["found"]["bytes"]


REFUSED = {
    "dense values": (["--bytes", "50%", "--choices", "int8"], "without zeros they have no packed"),
    "unknown values": (["--bytes", "50%", "--choices", "2:4-int5"], "'2:4-int5' is no choice"),
    "unstructured values": (["--bytes", "50%", "--choices", "50%-int4"], "use pattern 2:4"),
    "no budget": (["--choices", "drop"], "one budget"),
    "a word": (["--bytes", "50%", "--choices", "half"], "'half' is no choice"),
    "a percentage": (["--bytes", "50%", "--choices", "x%"], "'x%' is not a percentage"),
    "a pattern": (["--bytes", "50%", "--choices", "5:4"], "5:4"),
    "a size": (["--bytes", "half"], "'half' is not a number"),
    "a lost copy": (["nowhere/copy", "--bytes", "50%"], "nowhere/copy"),
    "a foreign folder": (["--bytes", "50%", "--output", "full"], "not empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_with_status_2(case, place, tmp_path, capsys, monkeypatch):
    more, message = REFUSED[case]
    monkeypatch.chdir(place)
    text = ["--text", str(place / "long.txt")]
    out = ["--output", str(tmp_path / "out")]
    assert main(["search", *out, str(place / "dense"), *more, *text, *WORK]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert (place / "full" / "precious.txt").read_text() == "keep me"
