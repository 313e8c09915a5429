"""The embedded model, pruned without structure and swapped: the same logits, the computed size."""

from __future__ import annotations

import copy

import pytest
import torch

import prunekit as pk
from prunekit.packed.modules import MergedPart, packed_layers, weight_bytes


def logits(model, token_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids).logits


@pytest.mark.slow
def test_the_embedded_model_at_half_its_weights(tmp_path):
    model, tokenizer = pk.load("demo")
    calibration = pk.Calibration(samples=4, length=32)
    pk.prune_(model, pk.Wanda(sparsity=0.5), calibration, tokenizer=tokenizer)
    masked = copy.deepcopy(model)
    text = "The capital of France is Paris, and the largest city of Germany is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    want, before = logits(masked, ids), weight_bytes(model)
    report = pk.swap_(model)
    assert [decision.format for decision in report.swapped] == ["bitmap"] * 210
    # the same float32 products of the same values: only their order may differ
    assert (logits(model, ids) - want).abs().max() <= 1e-4
    # of merged weights, only the last keeps a `starts` that says where it ends
    stacked = sum(isinstance(module, MergedPart) for module in model.modules())
    assert stacked == 30 * 3
    assert before - weight_bytes(model) == report.dense_bytes - report.bytes + 4 * stacked
    weights, values, computed = 0, 0, 0.0
    for name, layer in packed_layers(model):
        dense = masked.get_submodule(name).weight
        assert torch.equal(layer.weight.to_dense(), dense)
        rows, columns = dense.shape
        tiles = -(-rows // 16) * -(-columns // 64)
        values += int(dense.count_nonzero())
        weights += dense.numel()
        # values, bits and starts; half of a tile's 0 to 7 filling values
        computed += 4 * int(dense.count_nonzero()) + 132 * tiles + 14 * tiles
    assert values / weights == pytest.approx(0.5, abs=0.001)
    assert report.bytes == pytest.approx(computed, rel=0.001)
    folder = pk.save(model, tokenizer, tmp_path / "saved")
    loaded, _ = pk.load(folder)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    # as 16-bit values: within 12 % of 2·(1 − s) + 1/8 bytes per weight
    model.to(torch.bfloat16)
    held = sum(layer.weight.nbytes for _, layer in packed_layers(model)) / weights
    print(f"{held:.4f} bytes per weight, {2 * values / weights + 1 / 8:.4f} ideal")
    assert held <= 1.12 * (2 * values / weights + 1 / 8)
    exact = logits(copy.deepcopy(masked).to(torch.bfloat16).double(), ids)
    eager = (logits(masked.to(torch.bfloat16), ids).double() - exact).abs().max()
    assert (logits(model, ids).double() - exact).abs().max() <= 2 * eager
