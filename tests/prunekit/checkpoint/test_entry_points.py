"""transformers' own entry points open prunekit's folders, or say why not."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    pipeline,
)

import prunekit as pk
from prunekit.errors import PrunekitError
from prunekit.models.dropped import drop_sublayers_
from prunekit.models.quantizer import PackedConfig
from prunekit.packed.modules import PackedLinear, packed_layers


@pytest.fixture
def folder(tiny_24, word_tokenizer, tmp_path, request):
    """A packed, a dropped, or a packed and dropped Llama in a folder."""
    model = tiny_24("llama")
    if "dropped" in request.param:
        drop_sublayers_(model, attn=[1], mlp=[2])
    if "packed" in request.param:
        pk.swap_(model, formats=["bitmap"] if "bitmap" in request.param else None)
    return pk.save(model, word_tokenizer, tmp_path / "saved")


KINDS = ("packed", "packed bitmap", "dropped", "packed and dropped")
OPENERS = {
    "auto": AutoModelForCausalLM.from_pretrained,
    "stock class": LlamaForCausalLM.from_pretrained,
    "pipeline": lambda folder, **kwargs: pipeline("text-generation", str(folder), **kwargs).model,
}


def run(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("folder", KINDS, indirect=True)
@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_entry_point_gives_the_model(folder, opener, dtype, token_ids, tmp_path):
    want, _ = pk.load(folder, dtype=dtype)
    model = OPENERS[opener](folder, dtype=dtype)
    held = {tensor.dtype for tensor in model.parameters()}
    assert held | {layer.dtype for _, layer in packed_layers(model)} == {dtype}
    scale = 1e-5 if dtype.itemsize >= 4 else 1e-2
    exact = run(want, token_ids)
    assert (run(model, token_ids) - exact).abs().max() <= scale * exact.abs().max()
    assert type(model) is type(want) and not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    model.half()  # which transformers refuses for what it takes for quantised
    pk.unswap_(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], held) for name, held in model.state_dict().items())


@pytest.mark.parametrize("folder", ["packed", "dropped"], indirect=True)
def test_other_classes_are_refused(folder):
    with pytest.raises(ValueError, match="PrunekitLlamaConfig"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(PrunekitError, match="is a LlamaForCausalLM, and not a LlamaForSeq"):
        LlamaForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("folder", ["packed", "packed and dropped"], indirect=True)
def test_folders_of_the_first_version_open_as_well(folder, token_ids):
    want = run(pk.load(folder)[0], token_ids)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("quantization_config") == {"quant_method": "prunekit"}
    path.write_text(json.dumps(config))
    assert torch.equal(run(pk.load(folder)[0], token_ids), want)
    auto = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(run(auto, token_ids), want, rtol=1e-5, atol=1e-5)


def test_packing_while_loading_is_refused(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(PrunekitError, match=r"load it, then prunekit\.swap_"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PackedConfig())
