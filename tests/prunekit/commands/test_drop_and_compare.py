"""prunekit drop, compare, inspect and demo: what they write and say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from command_line import QUESTIONS, QUICK, snapshot, tiny_model, tiny_tokenizer

from prunekit import checkpoint, cli


def test_drop_compare_inspect(here, tmp_path, capsys):
    dropped, study = tmp_path / "dropped", tmp_path / "study"
    line = f"drop dense --unit attn --count 2 {QUICK} --output {dropped}"
    assert cli.main([*line.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    gone = found["report"]["dropped_attn"]
    assert len(gone) == 2 and len(found["report"]["scores"]["attn"]) == 3
    assert found["cache_before"]["entries"] == 3 and found["cache_after"]["entries"] == 1
    before, after = (found["report"][f"parameters_{when}"] for when in ("before", "after"))
    assert before - after == 2 * (32 * 32 * 2 + 2 * 32 * 16 + 32)  # q, o; k, v; the norm
    assert cli.main([*line.split(), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  dropped") == 2 and "3 → 1 entries" in shown and f"{before:,}" in shown

    assert cli.main(["inspect", str(dropped)]) == 0
    shown = capsys.readouterr().out
    assert f"attn {gone}" in shown and "prunekit_llama" in shown and "1 entries" in shown

    line = (
        f"compare dense {dropped} --prompts prompts.txt --choices choices.jsonl --max-new-tokens 6 "
        f"--layerwise-prompts 1 --layerwise-steps 2 --output {study}"
    )
    assert cli.main([*line.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["html"] == str(study / "index.html") and Path(found["html"]).is_file()
    assert found["summary"]["kl_dense_pruned"]["mean"] > 0
    assert found["summary"]["dense_accuracy"]["n"] == len(QUESTIONS)
    saved = json.loads((study / "study.json").read_text())
    assert saved["meta"]["names"] == {"dense": "dense", "pruned": "dropped"}
    assert len(saved["decoding"]["generations"]) == 2
    old = snapshot(study)
    assert cli.main(line.split()) == 2  # not empty, and no --overwrite
    assert snapshot(study) == old
    capsys.readouterr()
    assert cli.main([*line.split(), "--overwrite", "--no-choices", "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "KL(dense‖pruned)" in shown and str(study / "index.html") in shown
    assert len(json.loads((study / "study.json").read_text())["decoding"]["generations"]) == 1


def test_zeroed_format_is_stock_and_says_that_it_saves_nothing(here, tmp_path, capsys):
    folder = tmp_path / "zeroed"
    line = f"drop dense --unit mlp --count 1 --format zeroed {QUICK} --output {folder}"
    assert cli.main(line.split()) == 0
    assert "Not smaller and not faster" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_demo_compares_two_models_with_one_dense(tmp_path, capsys, monkeypatch):
    from prunekit.commands import demo
    from prunekit.report import png

    # drawing is test_report.py's, and slow
    monkeypatch.setattr(png, "draw", lambda figure, path: path.touch())
    checkpoint.save(tiny_model(layers=6), tiny_tokenizer(), tmp_path / "model")
    monkeypatch.setattr(
        demo, "FULL", replace(demo.QUICK, tokens=4, sweep=(1, 2), questions=6, examples=1)
    )
    out = tmp_path / "demo"
    line = ["demo", str(tmp_path / "model"), "--output", str(out), "--json", "--quiet"]
    assert cli.main(line) == 0
    shown, err = capsys.readouterr()
    found = json.loads(shown)
    assert err == "" and set(found["html"]) == {"attention-drop", "wanda-2-4", "sweep"}
    for page in found["html"].values():
        assert Path(page).is_file()
    saved = {name: json.loads((out / name / "study.json").read_text()) for name in found["summary"]}
    dropped = saved["attention-drop"]["meta"]["models"]["pruned"]["dropped"]
    assert len(dropped["attn"]) == demo.FULL.dropped and saved["attention-drop"]["removal"]
    assert saved["wanda-2-4"]["meta"]["models"]["pruned"]["dropped"] == {"attn": [], "mlp": []}
    (series,) = found["sweep"]["series"]
    assert [row["label"] for row in series["rows"]] == ["1 attention", "2 attentions"]
    ranked = series["rows"][1]["facts"]["dropped"]["attn"]
    assert set(ranked) <= set(dropped["attn"]) and len(ranked) == 2
    assert found["sweep"]["meta"]["questions"] == 6
    assert (out / "sweep" / "sweep.csv").is_file()
    old = snapshot(out)
    assert cli.main(line) == 2 and "--overwrite" in capsys.readouterr().err
    assert snapshot(out) == old

    plain = [*line[:-2], "--overwrite", "--quick"]
    assert cli.main(plain) == 0
    shown, err = capsys.readouterr()
    assert "4 attentions dropped" in shown and "Wanda 2:4" in shown and "estimates valid" in shown
    questions, prompts = demo.QUICK.choices, demo.QUICK.prompts
    assert f"The {questions} questions and {prompts} prompts are prunekit's own" in shown
    assert f"({questions} questions) against generative ({prompts} prompts)" in shown
    assert (
        "On the same" in shown
        and "first difference after" in shown
        and str(out / "wanda-2-4" / "index.html") in shown
    )
    assert "prunekit: loading the dense model" in err


def test_kl_report(here, capsys):
    line = "compare dense dense --kl-report --text long.txt --context 16 --batch-size 2"
    before = snapshot(here)
    assert cli.main([*line.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dense"] == "dense (dense)" and found["pruned"] == "dense (pruned)"
    assert found["context"] == 16
    assert found["rows"] > 16 and found["kl_max"] == 0 and found["same_top"] == 1
    assert cli.main(line.split()) == 0
    assert "KL(dense (dense) ‖ dense (pruned))" in capsys.readouterr().out
    assert snapshot(here) == before  # nothing is written


def test_a_kl_report_states_the_windows_that_it_used(here, capsys):
    line = "compare dense dense --kl-report --json --text long.txt"

    def report(more: str) -> dict[str, float]:
        assert cli.main([*line.split(), *more.split()]) == 0
        return json.loads(capsys.readouterr().out)

    one, two = report("--context 16 --limit 1"), report("--context 16 --limit 2")
    assert one["rows"] == 15 and two["rows"] == 30
    wide = report("--context 100000")
    assert wide["context"] < 100000 and wide["rows"] >= wide["context"] - 1
    # one position has no spread: its errors are null, not 0
    single = report("--context 2 --limit 1")
    assert single["rows"] == 1
    assert single["kl_mean_stderr"] is None and single["same_top_stderr"] is None
    assert cli.main([*line.replace("--json ", "").split(), "--context", "2", "--limit", "1"]) == 0
    assert "nan" not in capsys.readouterr().out


def test_names_of_a_pair_are_short_and_differ():
    from prunekit.commands.compare import _names

    assert _names("demo", "out/a") == ("SmolLM2-135M-Instruct", "a")
    assert _names("one/model", "two/model") == ("one/model", "two/model")
    assert _names("x/model", "x/model") == ("model (dense)", "model (pruned)")


def test_the_models_of_the_paper(tmp_path, capsys):
    checkpoint.save(tiny_model(layers=10), tiny_tokenizer(), tmp_path / "model")
    checkpoint.save(tiny_model(layers=8), tiny_tokenizer(), tmp_path / "shallow")
    text = tmp_path / "long.txt"
    text.write_text("some words to read, and some more of them. " * 20, encoding="utf-8")
    out = tmp_path / "paper"
    rest = f"--preset paper --samples 2 --length 16 --calibration {text} --output {out}"
    assert cli.main(f"drop {tmp_path / 'model'} {rest} --json".split()) == 0
    told = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in told["models"]]
    assert names == ["attn-4", "attn-8", "mlp-4", "mlp-8", "block-4", "block-8"]
    gone = {row["name"]: row["report"] for row in told["models"]}
    assert len(gone["attn-8"]["dropped_attn"]) == 8 and len(gone["mlp-4"]["dropped_mlp"]) == 4
    assert set(gone["attn-4"]["dropped_attn"]) < set(gone["attn-8"]["dropped_attn"])
    assert len(checkpoint.load(out / "block-8")[0].model.layers) == 2
    # as each count alone drops them
    alone = tmp_path / "alone"
    line = rest.replace("--preset paper", "--unit mlp --count 4").replace(str(out), str(alone))
    assert cli.main(f"drop {tmp_path / 'model'} {line} --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["report"] == gone["mlp-4"]
    for words, message in (
        (f"{tmp_path / 'model'} {rest}", "add --overwrite"),
        (f"{tmp_path / 'model'} {rest} --count 2", "exclude one another"),
        (f"{tmp_path / 'model'} {rest.replace('paper', 'papers', 1)}", "use paper"),
        (f"{tmp_path / 'shallow'} {rest} --overwrite", "has 8 layers"),
    ):
        assert cli.main(["drop", *words.split()]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
