"""Models with quantised 2:4 layers: swapped when asked for by name, saved, loaded, taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prunekernels.sparse import FORMATS
from torch import Tensor

import prunekit as pk
from prunekit.packed.modules import FusedGatedMLP, MergedLinear, PackedLinear, packed_layers

QUANTISED = [name for name, kind in FORMATS.items() if not kind.exact]


@pytest.mark.parametrize("name", QUANTISED)
def test_a_model_is_swapped_saved_and_loaded_bit_for_bit(
    name: str, tiny: Any, tmp_path: Any, token_ids: Tensor, word_tokenizer: Any
) -> None:
    model = tiny("llama")
    pk.prune_(model, pk.Magnitude(pattern="2:4"))
    report = pk.swap_(model, formats=[name])
    assert {module.format for module in report.swapped} == {name} and "Smaller" in report.verdict
    assert any(isinstance(module, MergedLinear) for module in model.modules())
    assert any(isinstance(module, FusedGatedMLP) for module in model.modules())
    with torch.no_grad():
        want = model(input_ids=token_ids).logits
    pk.save(model, word_tokenizer, tmp_path / "saved")
    loaded, _ = pk.load(tmp_path / "saved")
    for (path, layer), (_, mine) in zip(packed_layers(loaded), packed_layers(model), strict=True):
        assert layer.format == name
        for tensor in layer.tensor_names:
            assert torch.equal(getattr(layer, tensor), getattr(mine, tensor)), path
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=token_ids).logits, want)
    pk.unswap_(model)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=token_ids).logits, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_was_unpacked_is_packed_as_it_was(name: str, kind: str, tiny: Any) -> None:
    model = tiny(kind).bfloat16()
    pk.prune_(model, pk.Magnitude(pattern="2:4"))
    pk.swap_(model, formats=[name])
    before = {path: layer.weight.state_dict() for path, layer in packed_layers(model)}
    pk.unswap_(model)
    model.float().bfloat16()
    report = pk.swap_(model, min_speedup=0.0)  # asks for no format
    assert before and {module.format for module in report.swapped} == {name}
    for path, layer in packed_layers(model):
        for key, tensor in layer.weight.state_dict().items():
            assert torch.equal(tensor, before[path][key]), (path, key)
    pk.unswap_(model)
    for path in before:
        weight = model.get_submodule(path).weight
        with torch.no_grad():
            weight[weight == weight.max()] *= 2
    report = pk.swap_(model, min_speedup=0.0)  # they are other values now
    assert {module.format for module in report.swapped} <= {"2:4", "bitmap"} and report.swapped


def test_nothing_is_rounded_unasked(tiny: Any) -> None:
    model = tiny("llama")
    pk.prune_(model, pk.Magnitude(pattern="2:4"))
    # however much faster they must be: no format that rounds is tried
    report = pk.swap_(model, min_speedup=100.0)
    assert not report.swapped and "int" not in report.left_dense[0].reason


def test_layers_change_type_and_keep_their_integers() -> None:
    layer = PackedLinear(FORMATS["2:4-int4"].pack(torch.eye(64)[:32] * 3), None, "2:4-int4")
    words = layer.packed.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float32):
        layer.to(dtype)
        assert torch.equal(layer.packed, words) and layer.dtype == dtype
    assert torch.equal(layer.weight.to_dense(), torch.eye(64)[:32] * 3)


def test_layers_packed_otherwise_stay_apart(tiny: Any) -> None:
    from prunekernels import quantized24_round

    from prunekit.swap import merge_

    model = tiny("llama")
    pk.prune_(model, pk.Magnitude(pattern="2:4"))
    mlp = model.model.layers[0].mlp
    for name, group in (("gate_proj", 0), ("up_proj", 64)):
        dense = getattr(mlp, name)
        weight = quantized24_round(dense.weight, "2:4-int4", group=group, symmetric=group > 0)
        setattr(mlp, name, PackedLinear(weight, None, "2:4-int4"))
    merge_(model)
    assert not isinstance(model.model.layers[0].mlp, FusedGatedMLP)
