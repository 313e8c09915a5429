"""The command line: what it prints and writes, and one line that helps for every bad input."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from prunekit import checkpoint, cli
from prunekit.checkpoint import writing
from prunekit.commands import COMMANDS
from prunekit.errors import PrunekitError

CONTEXT = 512
QUESTIONS = [
    {"question": f"Which is {n}?", "options": ["one", "two", "six", "ten"], "answer": n % 4}
    for n in range(3)
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    # " A" … must be one token each, as the option letters of multiple choice are
    vocabulary |= {f"Ġ{letter}": len(vocabulary) + i for i, letter in enumerate("ABCD")}
    bytewise = Tokenizer(models.BPE(vocabulary, [("Ġ", letter) for letter in "ABCD"]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, **special)


def tiny_model(
    kind: type = LlamaForCausalLM,
    vocabulary: int = 264,
    layers: int = 3,
    hidden: int = 32,
    inner: int = 48,
):
    config = {LlamaForCausalLM: LlamaConfig, Qwen2: Qwen2Config}[kind](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, broken and foreign ones, and data files."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    for name, model in (
        ("dense", tiny_model()),
        ("other-vocabulary", tiny_model(vocabulary=270)),
        ("other-architecture", tiny_model(Qwen2)),
    ):
        checkpoint.save(model, tokenizer, root / name)

    def broken(name: str) -> Path:
        shutil.copytree(root / "dense", root / name)
        (root / name / "prunekit.json").unlink()
        return root / name

    weights = load_file(root / "dense" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(weights, broken("nan") / "model.safetensors", {"format": "pt"})
    whole = (root / "dense" / "model.safetensors").read_bytes()
    (broken("truncated") / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((root / "dense" / "config.json").read_text())
    unknown = {**config, "model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (broken("unknown-architecture") / "config.json").write_text(json.dumps(unknown))
    (root / "foreign").mkdir()
    (root / "foreign" / "photo.txt").write_text("not a model")
    (root / "full").mkdir()
    (root / "full" / "precious.txt").write_text("keep me")

    for name, text in {
        "empty.txt": "",
        "blank.txt": "\n \n",
        "short.txt": "too short",
        "long.txt": "A plain text about cats and mats. " * 200,
        "broken.jsonl": '{"text": "fine"}\n{"text": ',
        "prompts.txt": "Count to three.\nName a colour.\n",
        "long-prompt.txt": "word " * 200,
        "broken.yaml": "pattern: [2:4",
        "list.yaml": "- pattern",
        "unknown.yaml": "patern: 2:4\n",
        "rules.yaml": 'rules:\n  "*.nothing": {method: magnitude}\n',
    }.items():
        (root / name).write_text(text)
    (root / "choices.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (root / "bad-choices.jsonl").write_text(json.dumps({**QUESTIONS[0], "answer": 7}))
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below `folder` with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.stat()
        changed = 0 if path.is_dir() else facts.st_mtime_ns
        found[str(path.relative_to(folder))] = (0 if path.is_dir() else facts.st_size, changed)
    return found


QUICK = "--samples 2 --length 16 --calibration long.txt"
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
)
def test_what_ends_a_command_is_explained(error, status, fix, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a broken pipe replaces it
    found, line = cli.explain(error)
    assert found == status and fix in line and "\n" not in line


def test_prune_saves_and_reports(here, tmp_path, capsys):
    folder = tmp_path / "pruned"
    line = f"prune dense --pattern 2:4 --ignore *.q_proj {QUICK} --calibration-dtype bfloat16"
    line += f" --json --output {folder}"
    assert cli.main(line.split()) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    report = found["report"]
    assert report["calibration_dtype"] == "bfloat16"
    assert report["sparsity"] == 0.5 and report["recipe"]["rules"]["*"]["method"] == "wanda"
    assert sorted(report["left_dense"]) == [
        f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)
    ]
    manifest = json.loads((folder / "prunekit.json").read_text())
    assert manifest["report"]["prune"] == report
    assert found["folder_bytes"] == sum(f.stat().st_size for f in folder.iterdir())
    weight = load_file(folder / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    assert ((weight != 0).reshape(-1, 4).sum(1) == 2).all()

    assert cli.main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    patterns = {row["kind"]: (row["pattern"], row["sparsity"]) for row in facts["matrices"]}
    assert patterns["self_attn.q_proj"] == ("", 0) and patterns["mlp.up_proj"] == ("2:4", 0.5)
    assert facts["checksums"] == "verified" and facts["layers"] == 3
    # 3 attentions × keys and values × 2 heads × 8 numbers × 4 bytes
    assert facts["cache_entries"] == 3 and facts["cache_bytes_per_token"] == 3 * 2 * 2 * 8 * 4

    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "50.00 %" in shown and "2:4" in shown and "safetensors, llama, auto" in shown


@pytest.fixture(scope="module")
def wide(place):
    """A dense model in `place` whose matrices packing makes smaller."""
    model = tiny_model(hidden=64, inner=128)
    return str(checkpoint.save(model, tiny_tokenizer(), place / "wide"))


def test_swap_packs_and_turns_back(wide, tmp_path, capsys):
    pruned, packed, dense = (str(tmp_path / name) for name in ("pruned", "packed", "dense"))
    line = f"prune {wide} --method magnitude --pattern 2:4 --output"
    assert cli.main([*line.split(), pruned]) == 0
    assert f"prunekit swap {pruned} --output DIR" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["swap", pruned, "--output", packed, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    report = found["report"]
    assert report["packed"] == 21 and not report["faster"] and report["device"] == "cpu"
    assert report["bytes"] < 0.6 * report["dense_bytes"]
    assert "not faster on this machine" in report["verdict"]
    kept = {m["name"]: m["reason"] for m in report["modules"] if not m["format"]}
    assert kept == {"lm_head": "output head"}
    manifest = json.loads((Path(packed) / "prunekit.json").read_text())
    assert manifest["report"]["swap"] == report and manifest["packed"] == ["2:4"]
    assert found["folder_bytes"] < sum(f.stat().st_size for f in Path(pruned).iterdir())

    assert cli.main(["inspect", packed, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    patterns = {row["kind"]: (row["pattern"], row["sparsity"]) for row in facts["matrices"]}
    assert patterns["self_attn.k_proj"] == ("2:4", 0.5)
    assert facts["parameter_bytes"] == found["parameters_bytes"]
    assert facts["parameters"] == sum(t.numel() for t in weights_of(pruned).values())

    prune = f"prune {packed} --method magnitude --output {dense}"
    assert cli.main(prune.split()) == 2
    assert "is packed: make the model dense first" in capsys.readouterr().err
    line = f"compare {wide} {packed} --no-choices --limit 1 --max-new-tokens 3 --layerwise-steps 1"
    assert cli.main([*line.split(), "--output", str(tmp_path / "study"), "--quiet"]) == 0
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    counts = [study["meta"]["models"][name]["parameters"] for name in ("dense", "pruned")]
    assert counts[0] == counts[1]
    capsys.readouterr()

    assert cli.main(["swap", packed, "--format", "dense", "--output", dense]) == 0
    shown = capsys.readouterr().out
    assert "output head" in shown
    ours, theirs = weights_of(dense), weights_of(pruned)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_prune_can_pack_at_once(wide, tmp_path, capsys):
    folder = str(tmp_path / "out")
    line = f"prune {wide} --method magnitude --pattern 2:4 --swap --output {folder}"
    assert cli.main([*line.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["swap"]["packed"] == 21 and found["report"]["sparsity"] == 0.5
    manifest = json.loads((Path(folder) / "prunekit.json").read_text())
    assert set(manifest["report"]) == {"prune", "swap"}
    assert cli.main([*line.split(), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "not faster on this machine" in " ".join(shown.split())
    assert "Not smaller" not in shown
    assert cli.main([*line.split(), "--overwrite", "--min-speedup", "1", "--json"]) == 0
    refused = json.loads(capsys.readouterr().out)
    assert refused["swap"]["packed"] == 0 and "see the reasons" in refused["swap"]["verdict"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("swap dense --output out", "nothing of dense was packed (first layer: "),
        ("swap dense --output out --format gguf", "unknown format 'gguf': use one of auto, dense"),
        ("swap dense", "where to? give --output DIR"),
        ("swap --output out", "which model?"),
        ("swap dense --output out --tokens 0", "'0' is not a whole number from 1"),
        ("swap missing --output out", "missing"),
    ],
)
def test_swap_refuses_in_one_line(here, line, message, capsys):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not Path("out").exists()


def test_prune_says_that_zeros_alone_save_nothing(here, tmp_path, capsys):
    line = f"prune dense --method magnitude --sparsity 0.25 --output {tmp_path / 'out'}"
    assert cli.main(line.split()) == 0
    shown = capsys.readouterr().out
    assert "Not smaller and not faster" in shown and "(25.00 %)" in shown
    assert "self_attn.k_proj" in shown and "layers.0.self_attn" not in shown
    assert cli.main([*line.split(), "--overwrite", "--verbose"]) == 0
    assert "layers.0.self_attn.k_proj" in capsys.readouterr().out
    assert cli.main([*line.split(), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


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
    monkeypatch.setattr(demo, "FULL", replace(demo.QUICK, tokens=4, sweep=(0, 2), sweep_prompts=2))
    out = tmp_path / "demo"
    line = ["demo", str(tmp_path / "model"), "--output", str(out), "--json", "--quiet"]
    assert cli.main(line) == 0
    shown, err = capsys.readouterr()
    found = json.loads(shown)
    assert err == "" and set(found["html"]) == {"attention-drop", "wanda-2-4"}
    for page in found["html"].values():
        assert Path(page).is_file()
    saved = {name: json.loads((out / name / "study.json").read_text()) for name in found["summary"]}
    dropped = saved["attention-drop"]["meta"]["models"]["pruned"]["dropped"]
    assert len(dropped["attn"]) == demo.FULL.dropped and saved["attention-drop"]["removal"]
    assert saved["wanda-2-4"]["meta"]["models"]["pruned"]["dropped"] == {"attn": [], "mlp": []}
    rows = {row["count"]: row["scores"] for row in found["sweep"]}
    assert set(rows) == {0, 2} and rows[0]["identical"]["mean"] == 1
    assert (out / "attention-drop" / "sweep.csv").is_file()
    old = snapshot(out)
    assert cli.main(line) == 2 and "--overwrite" in capsys.readouterr().err
    assert snapshot(out) == old

    plain = [*line[:-2], "--overwrite", "--quick"]
    assert cli.main(plain) == 0
    shown, err = capsys.readouterr()
    assert "4 attentions dropped" in shown and "Wanda 2:4" in shown and "estimates valid" in shown
    assert "first difference after" in shown and str(out / "wanda-2-4" / "index.html") in shown
    assert "prunekit: loading the dense model" in err


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert {"op", "impl", "reason"} <= set(found["ops"][0])
    ops = {row["op"] for row in found["ops"]}
    assert {"head_pair_stats", "pair_stats", "vector_stats", "nm_mask", "rowwise_mask"} <= ops
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "head_pair_stats" in shown and "datasets" in shown


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


def test_names_of_a_pair_are_short_and_differ():
    from prunekit.commands.compare import _names

    assert _names("demo", "out/a") == ("SmolLM2-135M-Instruct", "a")
    assert _names("one/model", "two/model") == ("one/model", "two/model")
    assert _names("x/model", "x/model") == ("model (dense)", "model (pruned)")


@pytest.mark.parametrize("report", ["", "--kl-report"])
def test_a_wrong_second_model_is_found_before_the_first_is_loaded(
    report, here, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("loaded the first"))
    line = f"compare dense ./no/such/model --output new {report}"
    assert cli.main(line.split()) == 2
    assert "./no/such/model doesn't exist" in capsys.readouterr().err


def test_doctor_compiles_kernels(monkeypatch, capsys):
    pytest.importorskip("triton")
    from prunekernels import compilation
    from prunekernels.metrics import vector_triton

    cases = vector_triton.compile_cases()
    monkeypatch.setattr(compilation, "discover", lambda: cases)
    assert cli.main(["doctor", "--kernels", "--arch", "80,sm_90", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["versions"]) == {"torch", "triton"}
    rows = {(row["name"], row["arch"]): row for row in found["kernels"]}
    assert set(rows) == {(case.name, arch) for case in cases for arch in (80, 90)}
    row = rows["vector_stats/bf16", 90]
    assert row["dtype"] == "bf16" and row["spills"] == 0 and row["fault"] is None
    assert 16 < row["registers"] <= 255 and 1 < row["instructions_per_element"] < 30
    assert row["tensor_core"] == {}
    broken = [replace(cases[0], opcodes=("HMMA",))]
    monkeypatch.setattr(compilation, "discover", lambda: broken)
    assert cli.main(["doctor", "--kernels", "--arch", "90"]) == 0
    assert "no HMMA" in capsys.readouterr().out
    assert cli.main(["doctor", "--kernels", "--arch", "70"]) == 2
    assert "choose from 80, 89, 90, gfx942" in capsys.readouterr().err
    monkeypatch.setattr("prunekernels.runtime.triton_installed", lambda: False)
    assert cli.main(["doctor", "--kernels"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


def test_config_gives_options_and_flags_win(here, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: dense\nmethod: magnitude\npattern: 2:4\nverbose: true\nquiet: false\n"
        f"batch-size: 3\nsparsity:\nignore: ['*.q_proj', '*.k_proj']\noutput: {tmp_path / 'a'}\n"
    )
    args = cli.parse(["prune", "--config", str(config)])
    assert (args.model, args.method, args.pattern, args.verbose) == (
        "dense",
        "magnitude",
        "2:4",  # which YAML 1.1 reads as the number 124
        True,
    )
    assert args.batch_size == 3 and args.ignore == ["*.q_proj", "*.k_proj"] and not args.quiet
    flags = ["--pattern", "4:8", "--ignore", "*.v_proj", "--batch-size=5"]
    args = cli.parse(["prune", "other", *flags, "--config", str(config)])
    assert (args.model, args.pattern, args.batch_size) == ("other", "4:8", 5)
    assert args.ignore == ["*.v_proj"] and args.method == "magnitude"
    assert (
        cli.main(["prune", "--config", str(config), "--json", "--output", str(tmp_path / "b")]) == 0
    )
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["recipe"]["rules"]["*"]["pattern"] == "2:4" and len(report["left_dense"]) == 6
    assert not (tmp_path / "a").exists()


def test_config_rules(here, tmp_path, capsys):
    config = tmp_path / "rules.yaml"
    config.write_text(
        'rules:\n  "*.mlp.*": {method: magnitude, pattern: 1:4}\n'
        '  "*.o_proj": {method: magnitude, sparsity: 0.25}\n'
    )
    line = f"prune dense --config {config} --json --output {tmp_path / 'out'}"
    assert cli.main(line.split()) == 0
    matrices = json.loads(capsys.readouterr().out)["report"]["matrices"]
    found = {m["name"].rpartition(".")[2]: m["sparsity"] for m in matrices}
    assert found == {"up_proj": 0.75, "gate_proj": 0.75, "down_proj": 0.75, "o_proj": 0.25}


@pytest.mark.parametrize("value", ["count: true", "count: [1, 2]", "count: {a: 1}", "json: 3"])
def test_config_values_are_checked(value, here, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(value)
    line = f"drop dense --config {config} --output {tmp_path / 'out'}"
    if value == "count: [1, 2]":  # repeated like a repeated flag: the last one counts
        assert cli.parse(line.split()).count == 2
        return
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and value.partition(":")[0] in err


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
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(json, "dump", gone)
    assert cli.main(["doctor", "--json"]) == 141
    assert capfd.readouterr() == ("", "")
