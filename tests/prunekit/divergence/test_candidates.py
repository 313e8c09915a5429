"""Every kind of candidate: quantised folders, GGUF types, pruned, packed, adapters, other types."""

from __future__ import annotations

import importlib.util
import json

import gguf
import pytest
import torch
from gguf_files import VOCABULARY, write_gguf

import prunekit as pk
from prunekit import checkpoint
from prunekit.divergence.loading import PACKAGES, bytes_in_memory, fingerprint_of, load_any
from prunekit.divergence.rows import Readout
from prunekit.errors import PrunekitError

CONTEXT = 16
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture
def quantised(tiny, saved, tmp_path, word_tokenizer):
    """`quantised(bits)` saves the base model with torchao's integer weights, (base, copies)."""
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    here = saved(tiny("llama", **SIZES), "base")

    def make(bits: int) -> str:
        weights = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32))
        model = AutoModelForCausalLM.from_pretrained(
            here, dtype=torch.float32, quantization_config=TorchAoConfig(weights)
        )
        folder = tmp_path / f"int{bits}"
        model.save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
        return str(folder)

    return here, make


def test_fewer_bits_are_farther_and_smaller(quantised, documents):
    here, make = quantised
    found = pk.kld(here, [make(bits) for bits in (4, 8, 6)], documents, context=CONTEXT)
    assert not found.failed
    order = [row.name for row in found.rows]
    assert [name for name in order if name.startswith("int")] == ["int8", "int6", "int4"]
    for name in ("int8", "int6", "int4"):
        row = found[name]
        assert row["notes"] == ["quantised by torchao"] and row["dtype"] == "float32"
        assert 0 < row["means"]["kl"]["low"] < row["means"]["kl"]["high"]
    steps = [found.difference(far, near) for near, far in (("int8", "int6"), ("int6", "int4"))]
    assert all(step["low"] > 0 for step in steps)
    model = load_any(make(8)).model
    outside = sum(p.nbytes for n, p in model.named_parameters() if "layers" not in n)
    assert found["int8"]["bytes_in_memory"] == bytes_in_memory(model) > outside
    assert found["int8"]["bytes_in_memory"] < 0.6 * found.reference["bytes_in_memory"]


def test_a_quantised_reference_is_read_through_its_module(quantised, documents):
    here, make = quantised
    eight = make(8)
    found = pk.kld(eight, [eight, here], documents, context=CONTEXT, floor="none")
    assert (dict(found.compared)["int8"].values["kl"] == 0).all()
    back = pk.kld(here, [eight], documents, context=CONTEXT, floor="none")
    forward, reverse = (dict(each.compared) for each in (found, back))
    assert forward["base"].values["kl"] == pytest.approx(
        reverse["int8"].values["kl_reverse"], rel=1e-4, abs=1e-7
    )


@pytest.mark.parametrize("mode", [True, False])
def test_a_quantised_copy_is_looked_at_in_any_mode(quantised, mode):
    _, make = quantised
    with torch.inference_mode(mode):
        model = load_any(make(8), dtype="bfloat16").model
    for other in (True, False):
        with torch.inference_mode(other):
            assert bytes_in_memory(model) > 0 and fingerprint_of(model)


@torch.inference_mode()
def test_a_quantised_copy_runs_in_another_type(quantised):
    here, make = quantised
    eight = make(8)
    ids = torch.arange(12)[None]

    def logits(source, dtype):
        model = load_any(source, dtype=dtype).model
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        return model(input_ids=ids).logits.double()

    dense, in_8_bits = (logits(source, "float32") for source in (here, eight))
    rounding = (logits(here, "bfloat16") - dense).norm()
    assert 0 < (logits(eight, "bfloat16") - in_8_bits).norm() < 2 * rounding
    assert (in_8_bits - dense).norm() > 0  # integers were loaded at all


@torch.inference_mode()
def test_a_head_that_is_no_matrix(tiny):
    model = tiny("llama")
    states = torch.randn(5, 32)
    plain = Readout.of(model)
    module = Readout(None, None, plain.softcap, plain.scale, 97, model.lm_head)
    assert torch.allclose(module.logits(states, 97), plain.logits(states, 97), atol=1e-5)
    assert torch.allclose(module.plain().logits(states, 60), plain.logits(states, 60), atol=1e-5)


@pytest.mark.parametrize("method", ["torchao", "quanto", "gptq"])
def test_a_missing_package_is_named(tiny, saved, documents, tmp_path, monkeypatch, method):
    here, there = saved(tiny("llama"), "base"), saved(tiny("llama"), "quantised")
    path = tmp_path / "models/quantised/config.json"
    told = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(told))
    module, package = PACKAGES[method]
    find = importlib.util.find_spec

    def hidden(name, *rest):
        return None if name == module else find(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", hidden)
    found = pk.kld(here, [there], documents, context=CONTEXT, floor="none")
    assert found.failed[0].error.endswith(f"is quantised by {method}: run `pip install {package}`")


def test_gguf_types_are_ordered(tiny, tmp_path):
    model = tiny("llama", vocab_size=len(VOCABULARY), **SIZES)
    # one token per character and none for a blank
    draw = torch.Generator().manual_seed(1)
    text = "".join(VOCABULARY[n] for n in torch.randint(36, 90, (300,), generator=draw).tolist())
    paths = {}
    for name in ("F32", "Q8_0", "Q5_0", "Q4_0"):
        paths[name] = tmp_path / f"{name}.gguf"
        write_gguf(paths[name], model, kind=gguf.GGMLQuantizationType[name])
    candidates = [str(paths[name]) for name in ("Q4_0", "Q5_0", "F32", "Q8_0")]
    found = pk.kld(str(paths["F32"]), candidates, [text], context=CONTEXT, floor="none")
    names = [row.name for row in found.rows]
    assert names == ["F32.gguf", "Q8_0.gguf", "Q5_0.gguf", "Q4_0.gguf"]
    assert found["F32.gguf"]["means"]["kl"] == {"mean": 0, "low": 0, "high": 0}
    bits = [found[name]["bits_per_weight"] for name in names]
    assert bits == sorted(bits, reverse=True)
    assert found["Q4_0.gguf"]["bytes_on_disk"] == paths["Q4_0"].stat().st_size


def test_pruned_dropped_and_packed(tiny_24, word_tokenizer, documents, tmp_path):
    base = tiny_24("llama")
    for name in ("base", "dropped", "packed"):
        model = tiny_24("llama")
        if name == "dropped":
            ids = torch.randint(3, 93, (2, 12), generator=torch.Generator().manual_seed(1))
            pk.drop_(model, pk.Drop("attn", 1), ids, progress=False)
        if name == "packed":
            pk.swap_(model)
        pk.save(model, word_tokenizer, tmp_path / name)
    here, dropped, packed = (str(tmp_path / name) for name in ("base", "dropped", "packed"))
    found = pk.kld(here, [dropped, packed], documents, context=CONTEXT)
    assert not found.failed
    assert found["packed"]["means"]["kl"]["mean"] < 1e-9  # the same weights
    assert found["packed"]["bytes_in_memory"] < found.reference["bytes_in_memory"]
    assert found["dropped"]["means"]["kl"]["mean"] > 0.01
    assert bytes_in_memory(base) == found.reference["bytes_in_memory"]


def test_an_adapter_goes_on_the_reference(tiny, saved, documents, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    here = saved(base, "base")
    adapter = tmp_path / "adapter"
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(4)
    adapted = peft.get_peft_model(tiny("llama"), config).eval()
    adapted.save_pretrained(adapter)
    found = pk.kld(here, [str(adapter)], documents, context=CONTEXT, floor="none")
    row = found["adapter"]
    assert row["error"] is None and row["notes"][0].endswith(f"on {here}")
    merged = adapted.merge_and_unload()
    same = pk.kld(here, {"merged": saved(merged, "merged")}, documents, context=CONTEXT)
    assert row["means"]["kl"]["mean"] == pytest.approx(
        same["merged"]["means"]["kl"]["mean"], rel=1e-4
    )
    assert row["bytes_on_disk"] > found.reference["bytes_on_disk"]


def test_what_prunekit_itself_cannot_prune_is_measured(tiny, saved, documents, word_tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    config = AutoConfig.for_model(
        "cohere",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    cohere = AutoModelForCausalLM.from_config(config).eval()
    found = pk.kld(saved(cohere, "cohere"), [], documents, context=CONTEXT)
    assert found["reference in bfloat16"]["means"]["kl"]["mean"] > 0
    assert found.held.held.readout.scale == 0.25
    with pytest.raises(PrunekitError, match="not supported"):
        checkpoint.load(str(found.held.source))


def test_a_model_spread_over_devices(tiny, perturbed, saved, documents):
    base = tiny("llama")
    here, there = saved(base, "base"), saved(perturbed(base, 0.02), "other")
    spread = pk.kld(here, [there], documents, context=CONTEXT, device="auto", floor="none")
    whole = pk.kld(here, [there], documents, context=CONTEXT, floor="none")
    assert spread["other"]["means"]["kl"]["mean"] == pytest.approx(
        whole["other"]["means"]["kl"]["mean"], rel=1e-5
    )


def test_pickled_weights_are_never_opened(tiny, saved, documents, tmp_path):
    here, there = saved(tiny("llama"), "base"), saved(tiny("llama"), "pickled")
    folder = tmp_path / "models/pickled"
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    found = pk.kld(here, [there], documents, context=CONTEXT, floor="none")
    assert "only pickled weights" in found.failed[0].error
