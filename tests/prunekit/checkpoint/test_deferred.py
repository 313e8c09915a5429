"""Weights that take another type while they are loaded: values, and what is mapped meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunekit import checkpoint
from prunekit.checkpoint import deferred


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_converted_weights_are_those_of_transformers(
    architecture, dtype, tiny, word_tokenizer, tmp_path
):
    model = tiny(architecture)
    model.generation_config.max_new_tokens = 37
    checkpoint.save(model, word_tokenizer, tmp_path / "saved")
    ours, _ = checkpoint.load(tmp_path / "saved", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert type(ours) is type(theirs) and ours.dtype is dtype
    assert ours.generation_config.max_new_tokens == 37
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    found = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_mapped_only_while_a_tensor_is_converted(
    tiny, word_tokenizer, tmp_path, monkeypatch
):
    checkpoint.save(tiny("llama", num_hidden_layers=8), word_tokenizer, tmp_path / "saved")
    usual, held = deferred._mapped, []

    def counted(file: Path, name: str) -> torch.Tensor:
        tensor = usual(file, name)
        held.append(Path("/proc/self/maps").read_text().count(str(file)))
        return tensor

    monkeypatch.setattr(deferred, "_mapped", counted)
    checkpoint.load(tmp_path / "saved")
    assert not held  # in their own type they stay mapped, all at once
    checkpoint.load(tmp_path / "saved", dtype="bfloat16")
    assert len(held) > 60 and 1 <= max(held) <= 8  # four threads read ahead
