"""The embedded model, pruned without structure and swapped: the same logits, the computed size."""

from __future__ import annotations

import copy

import pytest
import torch

import prunekit as pk
from prunekit.packed.modules import MergedPart, packed_layers
from prunekit.packed.sizes import weight_bytes


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
    # q, k and v are one weight: two parts of it; gate and up stay apart, for one kernel
    stacked = sum(isinstance(module, MergedPart) for module in model.modules())
    assert stacked == 30 * 2
    saved, freed = report.dense_bytes - report.bytes, before - weight_bytes(model)
    assert freed == pytest.approx(saved, rel=1e-4)
    weights, values = 0, 0
    for name, layer in packed_layers(model):
        dense = masked.get_submodule(name).weight
        assert torch.equal(layer.weight.to_dense(), dense)
        values += int(dense.count_nonzero())
        weights += dense.numel()
    assert values / weights == pytest.approx(0.5, abs=0.001)
    # values, bits, and what records add: their sizes, filling, columns up to a whole tile
    ideal = 4 * values + weights / 8
    assert ideal < report.bytes <= 1.12 * ideal
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
