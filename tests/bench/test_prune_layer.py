"""The benchmark of one layer's pruning: what is right is timed, what is careless is not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from prunekernels import nm_mask, rowwise_mask

from bench.bench_prune import arguments
from bench.harness import Session
from bench.prune_layer import MODES, OPS, Layer, run
from prunekit.pruning import importance, sparsegpt

ROOFS = {torch.bfloat16: (1e10, 1e12)}


def measured(folder: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    session = Session(folder / "x.csv", torch.device("cpu"), 1, True, brief=True, _roofs=ROOFS)
    assert run(session, "tiny", None) == 0
    with session.path.open(newline="", encoding="utf-8") as file:
        return {(r["op"], r["mode"], r["provider"]): r for r in csv.DictReader(file)}


def test_every_op_is_right_and_the_research_code_absent_without_a_checkout(tmp_path):
    found = measured(tmp_path)
    for op in OPS:
        for mode in MODES:
            assert found[op, mode, "prunekit"]["status"] == "ok", found[op, mode, "prunekit"]
    absent = [row for (*_, name), row in found.items() if name == "research code"]
    assert len(absent) == 4 and all("--research PATH" in row["note"] for row in absent)
    exact = found["wanda_mask", "0.5", "prunekit"]
    assert exact["note"].startswith("0 of") and float(exact["gb_s"]) > 0


def test_a_careless_choice_or_update_is_not_timed(tmp_path, monkeypatch):
    def unscaled(matrix, mean_square, pattern):
        size = matrix.float().abs()
        if pattern.structured:
            return nm_mask(size, pattern.keep, pattern.of)
        return rowwise_mask(size, pattern.sparsity)

    def without_update(matrices, upper, pattern, block):
        worth = [matrix.float().abs() / upper.diagonal() for matrix in matrices]
        masks = [unscaled(score, None, pattern) for score in worth]
        return [(m.float() * k, k) for m, k in zip(matrices, masks, strict=True)]

    monkeypatch.setattr(importance, "wanda_mask", unscaled)
    monkeypatch.setattr(sparsegpt, "sparsify", without_update)
    found = measured(tmp_path)
    for op in OPS[:2]:
        for mode in MODES:
            assert found[op, mode, "prunekit"]["status"] == "wrong", found[op, mode, "prunekit"]


def test_inputs_are_shared_as_in_a_llama_layer_and_weights_come_back():
    layer = Layer("tiny", torch.device("cpu"))
    assert sorted(len(group.refs) for group in layer.groups) == [1, 1, 2, 3]
    layer.refs[0].matrix.zero_()
    layer.restore()
    assert torch.equal(layer.refs[0].matrix, layer.dense[0]) and layer.dense[0].any()


def test_a_whole_model_needs_a_text(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_prune.py"])
    with pytest.raises(SystemExit, match="2"):
        arguments()
    assert "give --text FILE" in capsys.readouterr().err
