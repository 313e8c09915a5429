"""Every tensor of a folder is accounted for, and what is refused is told with a fix that helps."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prunekit as pk
from prunekit.errors import PrunekitError


@pytest.fixture
def folder(tiny, word_tokenizer, tmp_path, request):
    """A tiny model in a folder, without a manifest that would notice changes."""
    made = tiny(getattr(request, "param", "llama"))
    path = pk.save(made, word_tokenizer, tmp_path / "saved")
    (path / "prunekit.json").unlink()
    return path


def edit(folder, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def add(folder, **tensors) -> None:
    edit(folder, lambda state: {**state, **tensors})


@torch.inference_mode()
def logits(folder, ids):
    return pk.load(folder)[0](ids).logits


CAUSAL = torch.ones(8, 8).tril().view(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("folder", "name", "tensor"),
    [
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("gpt2", "transformer.h.1.attn.bias", CAUSAL),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", CAUSAL.bool()),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", torch.tensor(-1e9)),
        ("llama", "model.layers.0.self_attn.rotary_emb.cos_cached", torch.ones(1, 1, 8, 8)),
        ("llama", "model.embeddings.position_ids", torch.arange(8)),
        ("opt", "model.decoder.version", torch.tensor([3.0])),
    ],
    indirect=["folder"],
)
def test_constants_of_older_files_are_dropped(folder, name, tensor, token_ids):
    want = logits(folder, token_ids)
    add(folder, **{name: tensor})
    assert torch.equal(logits(folder, token_ids), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_frequencies_must_be_the_models(folder, token_ids, dtype):
    own = pk.load(folder)[0].model.rotary_emb.inv_freq
    want = logits(folder, token_ids)
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    add(folder, **{name: own.to(dtype)})
    assert torch.equal(logits(folder, token_ids), want)
    add(folder, **{name: (own ** (5 / 4)).to(dtype)})  # another theta
    with pytest.raises(PrunekitError, match=r"layers\.2.*inv_freq.*correct rope_theta"):
        pk.load(folder)


REFUSED = {
    "v_head.summary.weight": "value or classification head",
    "score.weight": "value or classification head",
    "model.layers.4.input_layernorm.weight": "a layer past the 4",
    "model.mtp.0.eh_proj.weight": "predict further tokens",
    "medusa_head.0.weight": "predict further tokens",
    "model.layers.0.self_attn.v_proj.bias": "which the model has not",
    "transformer.h.0.attn.bias": "which the model has not",  # a real bias has one dimension
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_leftovers_are_refused_with_a_fix_that_helps(folder, tmp_path, token_ids, name):
    want = logits(folder, token_ids)
    add(folder, **{name: torch.ones(32)})
    with pytest.raises(PrunekitError, match=REFUSED[name]) as caught:
        pk.load(folder)
    assert name in str(caught.value)
    follow(str(caught.value), folder, tmp_path / "new")
    assert torch.equal(logits(tmp_path / "new", token_ids), want)


def follow(message, folder, new) -> None:
    """Do what a message advises."""
    advised = re.search(r"AutoModelForCausalLM.*save_pretrained\(NEW\)", message)[0]
    eval(advised, {"AutoModelForCausalLM": AutoModelForCausalLM, "NEW": new})
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, new)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_of_wrappers_are_refused_with_a_fix_that_helps(folder, token_ids, prefix):
    want = logits(folder, token_ids)
    edit(folder, lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()})
    with pytest.raises(PrunekitError, match=re.escape(f"hold '{prefix}'")) as caught:
        pk.load(folder)
    advised = re.search(r"save_file\(.*$", str(caught.value))[0]
    known = {"save_file": save_file, "load_file": load_file, "F": folder / "model.safetensors"}
    eval(advised, known)
    assert torch.equal(logits(folder, token_ids), want)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale", "parts of quantised weights"),
        ("model.layers.0.mlp.up_proj.qzeros", "parts of quantised weights"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", r"merge_and_unload\(\)"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", r"merge_and_unload\(\)"),
    ],
)
@pytest.mark.parametrize("lacking", [True, False])
def test_a_telling_leftover_comes_before_what_is_missing(folder, extra, said, lacking):
    def change(state):
        if lacking:
            del state[re.sub(r"\.(lora_A|base_layer)?\.?\w+$", ".weight", extra)]
        return {**state, extra: torch.ones(4)}

    edit(folder, change)
    with pytest.raises(PrunekitError, match=said) as caught:
        pk.load(folder)
    assert extra in str(caught.value)


@pytest.fixture
def sharded(folder):
    """The model in three files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def edit_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_shards_are_read_whole(sharded, token_ids):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    assert logits(sharded, token_ids).isfinite().all()
    index = sharded / "model.safetensors.index.json"
    saved = index.read_text()
    name = next(iter(json.loads(saved)["weight_map"]))
    edit_index(sharded, lambda held: held.pop(name))
    with pytest.raises(PrunekitError, match=f"puts {name} into no file"):
        pk.load(sharded)
    index.write_text(saved)
    edit_index(sharded, lambda held: held.update({"model.new.weight": first.name}))
    with pytest.raises(PrunekitError, match=r"model\.new\.weight.*in none"):
        pk.load(sharded)
    index.write_text(saved)
    shutil.copy(first, sharded / "model-00009-of-00009.safetensors")
    with pytest.raises(PrunekitError, match=r"does not list model-00009-of-00009"):
        pk.load(sharded)
    (sharded / "model-00009-of-00009.safetensors").unlink()
    save_file({**load_file(second), name: torch.ones(1)}, second, {"format": "pt"})
    with pytest.raises(PrunekitError, match=f"{name} is in {first.name} and in {second.name}"):
        pk.load(sharded)
    second.unlink()
    with pytest.raises(PrunekitError, match=f"{second.name} is missing"):
        pk.load(sharded)
