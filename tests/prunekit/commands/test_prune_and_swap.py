"""prunekit prune and prunekit swap: what they write and say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import QUICK, tiny_model, tiny_tokenizer, weights_of
from safetensors.torch import load_file

import prunekit as pk
from prunekit import checkpoint, cli


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
    assert facts["checksums"] == "verified" and facts["layers"] == 3 and facts["packed"] == {}
    # 3 attentions × keys and values × 2 heads × 8 numbers × 4 bytes
    assert facts["cache_entries"] == 3 and facts["cache_bytes_per_token"] == 3 * 2 * 2 * 8 * 4

    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "50.00 %" in shown and "2:4" in shown and "safetensors, llama, auto" in shown


def test_prune_reconstructs(here, tmp_path, capsys):
    line = f"prune dense --method magnitude --pattern 2:4 {QUICK} --samples 4 --reconstruct"
    line += f" --reconstruct-steps 5 --output {tmp_path}/fitted"
    assert cli.main(line.split()) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Reconstruction of 3 blocks: relative error of their outputs" in shown
    kept = json.loads((tmp_path / "fitted" / "prunekit.json").read_text())["report"]["prune"]
    assert kept["reconstruct"]["steps"] == 5 and len(kept["blocks"]) == 3
    assert kept["sparsity"] == 0.5
    assert cli.main(["prune", "dense", "--reconstruct-lr", "1e-3", "-o", f"{tmp_path}/no"]) == 2
    assert "--reconstruct-lr needs --reconstruct" in capsys.readouterr().err


def test_prune_takes_the_settings_of_owl(here, tmp_path, capsys):
    line = f"prune dense --method magnitude --budget owl --owl-spread 0.2 {QUICK}"
    assert cli.main([*line.split(), "-o", f"{tmp_path}/owl"]) == 0
    assert re.search(r"0\.\d{4} \(0\.\d\d–0\.\d\d\)", capsys.readouterr().out)
    kept = json.loads((tmp_path / "owl" / "prunekit.json").read_text())["report"]["prune"]
    shares = {matrix["sparsity"] for matrix in kept["matrices"]}
    assert 0.38 < max(shares) - min(shares) < 0.41  # 2λ
    settings = tmp_path / "owl.yaml"
    settings.write_text("budget: {outlier: 7}\n")
    line = f"prune dense --method magnitude --config {settings} --owl-spread 0 {QUICK}"
    assert cli.main([*line.split(), "-o", f"{tmp_path}/no"]) == 2
    assert "OWL outlier 7 and spread 0.0" in capsys.readouterr().err
    assert cli.main(["prune", "dense", "--owl-outlier", "3", "-o", f"{tmp_path}/no"]) == 2
    assert "--owl-outlier needs --budget owl" in capsys.readouterr().err


def test_recover_trains_and_says_what_it_did(here, tmp_path, capsys):
    pruned, folder = tmp_path / "pruned", tmp_path / "recovered"
    line = f"prune dense --method magnitude --pattern 2:4 --quiet --output {pruned}"
    assert cli.main(line.split()) == 0
    line = f"recover {pruned} --teacher dense {QUICK} --samples 6 --steps 4 --tokens 64 --lr 0.02"
    line += f" --kind js --batch-size 2 --output {folder}"
    assert cli.main([*line.split(), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["report"]
    assert err == "" and not list(tmp_path.glob("*.journal"))
    assert found["after"]["js_mean"] < found["before"]["js_mean"]
    assert json.loads((folder / "prunekit.json").read_text())["report"]["recover"] == found
    weights = weights_of(pruned), weights_of(folder)
    for name, before in weights[0].items():
        assert torch.equal(before == 0, weights[1][name] == 0), name
    assert cli.main([*line.split(), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "Jensen–Shannon, nats" in shown and "zeros stayed" in shown


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
    assert patterns["self_attn.k_proj"] == ("2:4", 0.5) and facts["packed"] == {"2:4": 21}
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
    said = capsys.readouterr().out
    assert "21 layers of" in said and "were packed before" in said and "as dense tensors" in said
    assert "Nothing was packed" not in said
    assert "output head" not in said  # the table of what was packed now has nothing to say
    ours, theirs = weights_of(dense), weights_of(pruned)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_inspect_names_values_of_few_bits(tmp_path, capsys):
    model = tiny_model(hidden=64, inner=128)
    pk.prune_(model, pk.Magnitude(pattern="2:4"))
    pk.swap_(model, formats=["2:4-int4"])
    folder = checkpoint.save(model, tiny_tokenizer(), tmp_path / "packed")
    assert cli.main(["inspect", str(folder)]) == 0
    assert "21 layers as 2:4-int4" in capsys.readouterr().out


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
        ("swap dense --output out --format 2:4-int8", "'2:4-int8' is how a weight is packed, not"),
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
