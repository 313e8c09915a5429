"""`prunekit kld` on the command line: table, files, page, exit status, going on."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from prunekit.cli import main
from prunekit.divergence import measuring
from prunekit.divergence.rows import states_of

CONTEXT = ["--context", "16", "--quiet"]


@pytest.fixture
def folders(tiny, perturbed, saved):
    base = tiny("llama")
    return (
        saved(base, "base"),
        saved(perturbed(base, 0.02), "near"),
        saved(perturbed(base, 0.1), "far"),
    )


def test_files_and_json(folders, text_file, tmp_path, capsys):
    here, near, far = folders
    out = tmp_path / "out"
    arguments = ["kld", here, far, near, "--text", str(text_file), *CONTEXT]
    assert main([*arguments, "--json", "--output", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["candidates"]] == ["reference in bfloat16", "near", "far"]
    assert told["html"] == str(out / "index.html")
    saved = json.loads((out / "kld.json").read_text())
    assert saved["candidates"] == told["candidates"]
    with (out / "kld.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["candidate"] for line in lines] == [row["name"] for row in told["candidates"]]
    assert float(lines[1]["kl"]) == told["candidates"][1]["means"]["kl"]["mean"]
    with (out / "blocks.csv").open(newline="") as file:
        blocks = list(csv.DictReader(file))
    whole = sum(int(b["positions"]) * float(b["near"]) for b in blocks)
    assert whole / told["plan"]["positions"] == pytest.approx(lines_mean(told, "near"), rel=1e-9)
    assert told["differences"][1]["closer"] == "near" and told["differences"][1]["kl"]["low"] > 0


def lines_mean(told, name: str) -> float:
    return next(r["means"]["kl"]["mean"] for r in told["candidates"] if r["name"] == name)


def test_the_table_and_going_on(folders, text_file, tmp_path, capsys, monkeypatch):
    here, near, far = folders
    out = tmp_path / "out"
    arguments = ["kld", here, near, "--text", str(text_file), "--context", "16"]
    assert main([*arguments, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "KL(base ‖ candidate)",
        "near",
        "reference in bfloat16",
        "PPL ratio",
        "states in ",
    ):
        assert part in shown
    ran = []

    def counted(*rest):
        ran.append(1)
        return states_of(*rest)

    monkeypatch.setattr(measuring, "states_of", counted)
    assert main([*arguments[:3], far, *arguments[3:], "--output", str(out)]) == 0
    assert len(ran) == 1  # the new one alone was run
    assert "far" in capsys.readouterr().out


def test_overwriting_starts_anew(folders, text_file, tmp_path, capsys):
    here, near, _ = folders
    out = str(tmp_path / "out")
    arguments = ["kld", here, near, "--text", str(text_file), "--quiet", "--output", out]
    assert main([*arguments, "--context", "16"]) == 0
    assert main([*arguments, "--context", "8"]) == 2
    assert "another context (16, now 8)" in capsys.readouterr().err
    assert main([*arguments, "--context", "8", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "kld.json").read_text())["plan"]["context"] == 8


def test_a_failure_is_status_2_and_the_others_are_there(folders, text_file, tmp_path, capsys):
    here, near, _ = folders
    out, torn = tmp_path / "out", tmp_path / "torn"
    shutil.copytree(near, torn)
    (torn / "model.safetensors").write_bytes(b"half a file")
    arguments = ["kld", here, near, str(torn), "--text", str(text_file), *CONTEXT]
    assert main([*arguments, "--output", str(out)]) == 2
    said = capsys.readouterr().err
    assert "1 of 3 candidates failed, first torn (" in said and "model.safetensors" in said
    told = json.loads((out / "kld.json").read_text())
    assert [row["error"] is None for row in told["candidates"]] == [True, True, False]
    assert "model.safetensors" in (out / "index.html").read_text()
    # a name that is nowhere is no failure of a candidate: nothing runs
    assert main(["kld", here, str(tmp_path / "gone"), "--output", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "gone doesn't exist" in said and "\n" not in said.strip()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("which reference?", []),
        ("doesn't exist", ["/nowhere/at-all/model"]),
        ("gone.txt' does not exist", ["{here}", "{near}", "--text", "gone.txt"]),
        ("426 tokens has nothing", ["{here}", "--text", "{text}", "--context", "2000"]),
        ("--dataset takes the place", ["{here}", "--dataset", "a/b"]),
        ("holds something else", ["{here}", "--output", "{models}"]),
        ("unknown", ["{here}", "--device", "abacus"]),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, text_file, capsys, message, arguments):
    here, near, _ = folders
    known = {"here": here, "near": near, "models": str(tmp_path / "models"), "text": text_file}
    given = [word.format(**known) for word in arguments]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert main(["kld", *given, *output, "--quiet"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said) and "\n" not in said


def test_the_llama_cpp_file_is_written(folders, text_file, tmp_path, capsys):
    here, near, _ = folders
    out, base = str(tmp_path / "out"), str(tmp_path / "base.dat")
    arguments = ["--text", str(text_file), *CONTEXT]
    assert main(["kld", here, near, *arguments, "--output", out, "--write-base", base]) == 0
    again = ["kld", base, near, "--tokenizer", here, "--output", str(tmp_path / "again"), "--json"]
    assert main([*again, *CONTEXT]) == 0
    told = json.loads(capsys.readouterr().out)
    exact = json.loads((tmp_path / "out" / "kld.json").read_text())
    assert lines_mean(told, "near") == pytest.approx(lines_mean(exact, "near"), abs=2e-4)


class Page(HTMLParser):
    """What a page loads, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.data, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.loads += [told[name] for name in ("src", "href") if name in told]
        self._inside = tag == "script" and told.get("id") == "data"

    def handle_data(self, data):
        if self._inside:
            self.data += data


def test_the_page_is_one_file_with_everything(folders, text_file, tmp_path, capsys):
    here, near, far = folders
    out = tmp_path / "out"
    arguments = ["kld", here, near, far, "--text", str(text_file), *CONTEXT]
    assert main([*arguments, "--output", str(out)]) == 0
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert page.loads == []
    told = json.loads(page.data)
    assert {curve["name"] for curve in told["curves"]} == {"near", "far", "reference in bfloat16"}
    for curve in told["curves"]:
        shares, values = zip(*curve["percentiles"], strict=True)
        assert list(shares) == sorted(shares) and list(values) == sorted(values)
        assert sum(count for *_, count in curve["places"]) == told["plan"]["positions"]
    worst = told["worst"]["far"]
    assert [place["kl"] for place in worst] == sorted((p["kl"] for p in worst), reverse=True)
    row = next(row for row in told["candidates"] if row["name"] == "far")
    assert worst[0]["kl"] == pytest.approx(row["summary"]["kl_max"])
    words = text_file.read_text().split()
    place = worst[0]
    at = 16 * place["window"] + place["index"]
    assert words[at] == place["token"]
    assert place["before"].split() == words[16 * place["window"] : at]
    assert len(place["base"]) == len(place["other"]) == 5
    assert sum(share for _, share in place["base"]) <= 1
