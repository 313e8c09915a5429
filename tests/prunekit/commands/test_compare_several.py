"""prunekit compare with several copies: one page, and each copy's study below it."""

from __future__ import annotations

import csv
import json

import pytest
from command_line import QUESTIONS, QUICK, snapshot, tiny_model, tiny_tokenizer

import prunekit as pk
from bench.kld_copies import integers
from prunekit import checkpoint, cli
from prunekit.models.dropped import drop_sublayers_
from prunekit.report import overview, png

SMALL = (
    "--prompts prompts.txt --choices choices.jsonl --max-new-tokens 6 --layerwise-prompts 1 "
    "--layerwise-steps 2"
)


@pytest.fixture(scope="module")
def copies(place, tmp_path_factory):
    """A drop of one and of two attentions of the tiny model, and the command's output."""
    root = tmp_path_factory.mktemp("copies")
    calibration = QUICK.replace("long.txt", str(place / "long.txt"))
    for count in (1, 2):
        line = f"drop {place / 'dense'} --unit attn --count {count} {calibration} --quiet"
        assert cli.main([*line.split(), "--output", str(root / f"drop{count}")]) == 0
    return root


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    monkeypatch.setattr(
        png, "draw", lambda figure, path: path.touch()
    )  # slow, and tested elsewhere


def test_copies_are_ranked_on_one_page(here, copies, tmp_path, capsys):
    out = tmp_path / "several"
    line = f"compare dense {copies / 'drop2'} {copies / 'drop1'} dense {SMALL} --output {out}"
    assert cli.main([*line.split(), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["copies"]] == ["dense", "drop1", "drop2"]
    same, one, two = told["copies"]
    assert same["scores"]["kl_dense_pruned"]["mean"] == 0
    assert 0 < one["scores"]["kl_dense_pruned"]["mean"] < two["scores"]["kl_dense_pruned"]["mean"]
    assert same["bytes_in_memory"] > one["bytes_in_memory"] > two["bytes_in_memory"]
    assert all(row["needed"] > len(QUESTIONS) for row in told["copies"])
    assert same["lost"] == same["gained"] == 0 and same["mcnemar_p"] == 1
    assert same["scores"]["accuracy_difference"]["n"] == len(QUESTIONS)
    assert all(row["speed"]["decode"] > 0 and row["speed"]["speedup"] > 0 for row in (one, two))
    assert two["bits_per_weight"] < 32 * 1.1
    for row in told["copies"]:
        assert pk.Study.load(out / row["folder"]).meta["names"]["pruned"] == row["name"]
    pairs = {(pair["first"], pair["second"]): pair for pair in told["pairs"]}
    assert len(pairs) == 3
    difference = pairs["drop1", "drop2"]["kl"]["mean"]
    means = [row["scores"]["kl_dense_pruned"]["mean"] for row in (one, two)]
    assert difference == pytest.approx(means[1] - means[0], rel=1e-9)

    with (out / "comparison.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["copy"] for row in rows] == ["dense", "drop1", "drop2"]
    assert float(rows[1]["kl_dense_pruned"]) == pytest.approx(means[0])
    with (out / "steps.csv").open(newline="", encoding="utf-8") as file:
        lines = [row for row in csv.DictReader(file) if row["copy"] == "drop1"]
    grid = pk.Study.load(out / "drop1").decoding.teacher_forced
    assert [int(row["step"]) for row in lines] == grid.labels["step"] and (
        out / "steps.png"
    ).exists()
    for metric in ("z_delta_rms", "uniform_variance", "h_cosine"):
        for row, mean in zip(lines, grid.mean(metric, keep=("step",)), strict=True):
            assert float(row[metric]) == pytest.approx(mean, rel=1e-4)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Which copies can be told apart?" in page and "://" not in page
    old = snapshot(out)
    assert cli.main(line.split()) == 2 and snapshot(out) == old


def test_a_point_of_several_equals_a_comparison_alone(here, copies, tmp_path, capsys):
    one, several = tmp_path / "one", tmp_path / "several"
    drop = copies / "drop1"
    assert cli.main(f"compare dense {drop} {SMALL} --quiet --output {one}".split()) == 0
    line = f"compare dense {drop} {copies / 'drop2'} {SMALL} --no-speed --output {several}"
    assert cli.main(line.split()) == 0
    shown = capsys.readouterr().out
    assert (
        "drop1" in shown
        and "drop2" in shown
        and "× dense" not in shown.replace("× dense speed", "")
    )
    alone, among = pk.Study.load(one), pk.Study.load(several / "drop1")
    meta = [{**study.meta, "seconds": 0} for study in (alone, among)]
    assert meta[0] == meta[1]
    assert {**alone.to_dict(), "meta": 0} == {**among.to_dict(), "meta": 0}


def test_answers_to_open_questions_are_ranked_too(here, copies, tmp_path, capsys):
    items = [{"question": f"{n} cats and {n} cats", "answer": str(2 * n)} for n in range(6)]
    questions = tmp_path / "open.jsonl"
    questions.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    out = tmp_path / "several"
    line = f"compare dense dense {copies / 'drop2'} {SMALL} --no-speed --output {out}"
    asked = f"--generate {questions} --examples 2 --answer-tokens 4"
    assert cli.main([*line.split(), *asked.split(), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    for row in told["copies"]:
        study = pk.Study.load(out / row["folder"])
        change = study.answer_change()
        assert row["scores"]["exact_match_difference"]["mean"] == change.difference.mean
        assert row["scores"]["pruned_exact_match"]["n"] == 4
    assert told["copies"][0]["scores"]["pruned_same_answer"]["mean"] == 1
    shown = overview.remarks(told)
    assert not any("Speed" in said for said in shown)
    needed = {row["needed"] for row in told["copies"]}
    assert any(" to ".join(map(str, sorted(needed))) + " such" in said for said in shown)
    cells = [overview._cells(row) for row in told["copies"]]
    assert cells[0]["same answer"] == "100 %" and "exact match" in cells[0]


def test_one_that_cannot_be_compared_leaves_the_others(here, copies, tmp_path, capsys):
    out = tmp_path / "several"
    line = f"compare dense {copies / 'drop1'} other-vocabulary {SMALL} --no-speed --output {out}"
    assert cli.main(line.split()) == 2
    shown, err = capsys.readouterr()
    assert "drop1" in shown and "failed" in shown
    assert err.strip().startswith("prunekit: error: 1 of 2 copies failed, first other-vocabulary")
    told = json.loads((out / "comparison.json").read_text())
    assert [row["error"] is None for row in told["copies"]] == [True, False]
    assert "vocabulary" in told["copies"][1]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dense", "which pruned model?"),
        ("dense dense dense --kl-report", "rank them with prunekit kld"),
        ("dense other-vocabulary other-architecture", "differ"),
        ("dense dense nowhere", "nowhere"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(here, tmp_path, capsys, words, message):
    line = f"compare {words} {SMALL} --output {tmp_path / 'out'}"
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_configuration_file_lists_copies(tmp_path):
    config = tmp_path / "several.yaml"
    config.write_text("dense: dense\npruned: [one, two]\nno-speed: true\n")
    read = cli.parse(["compare", "--config", str(config)])
    assert (read.dense, read.pruned, read.no_speed) == ("dense", ["one", "two"], True)
    config.write_text("model: demo\ncheckpoints: out/one\n")  # one is a list of one
    assert cli.parse(["bench", "--config", str(config)]).checkpoints == ["out/one"]


@pytest.mark.slow
def test_a_quantised_copy_beside_a_dropped_one(tmp_path, capsys):
    pytest.importorskip("torchao")
    dense = tiny_model(hidden=64, inner=64)  # rows that groups of 32 divide
    checkpoint.save(dense, tiny_tokenizer(), tmp_path / "dense")
    integers(str(tmp_path / "dense"), tmp_path / "int8", 8)
    drop_sublayers_(dense, mlp=[1])
    checkpoint.save(dense, tiny_tokenizer(), tmp_path / "drop")
    names = " ".join(str(tmp_path / name) for name in ("dense", "drop", "int8"))
    line = f"compare {names} --limit 4 --max-new-tokens 6 --layerwise-steps 1 --json"
    assert cli.main([*line.split(), "--output", str(tmp_path / "out")]) == 0
    eight, drop = json.loads(capsys.readouterr().out)["copies"]
    assert (eight["name"], drop["name"]) == ("int8", "drop")
    assert eight["bytes_in_memory"] < drop["bytes_in_memory"] and drop["beaten_by"] == ["int8"]
    assert 0 < eight["scores"]["kl_dense_pruned"]["mean"] < 0.1
    assert eight["notes"] == ["quantised by torchao"] and eight["speed"]["decode"] > 0
    # alone, too, and timed by bench
    line = f"compare {tmp_path / 'dense'} {tmp_path / 'int8'} --limit 2 --max-new-tokens 4 --quiet"
    assert cli.main([*line.split(), "--output", str(tmp_path / "one")]) == 0
    line = f"bench {tmp_path / 'dense'} {tmp_path / 'int8'} --variants dense --prompt 8 --new 3"
    assert cli.main([*line.split(), "--rounds", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [row["variant"] for row in rows] == ["dense", "int8"] and rows[1]["size"] < 0.6
