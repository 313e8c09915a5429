"""Nothing of a GGUF file is left unread, and nothing of a model is made up."""

from __future__ import annotations

import pytest
import torch
from gguf_files import VOCABULARY, write_gguf

from prunekit import checkpoint
from prunekit.checkpoint.gguf_accounts import check_accounts
from prunekit.errors import PrunekitError

# "smollm" is read by prunekit, "gpt-2" through transformers.
READERS = pytest.mark.parametrize("pre", ["smollm", "gpt-2"])


@pytest.fixture
def source(tiny):
    return tiny("llama", vocab_size=len(VOCABULARY), intermediate_size=64)


@READERS
@pytest.mark.parametrize(
    "skip", ["blk.3.", "blk.1.attn_q", "output_norm", "blk.0.ffn_norm", "token_embd"]
)
def test_what_is_missing_is_named(source, tmp_path, pre, skip):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, source, pre=pre, skip=(skip,))
    with pytest.raises(PrunekitError, match=r"tiny\.gguf") as caught:
        checkpoint.load(path)
    part = {"blk.3.": "layers.3", "blk.1.attn_q": "q_proj", "token_embd": "embed"}.get(skip, "norm")
    assert part in str(caught.value)


@READERS
@pytest.mark.parametrize(
    "extra",
    [
        {"blk.0.attn_v.bias": torch.full((16,), 5.0)},
        {"blk.2.attn_q_norm.weight": torch.full((8,), 2.0)},
        {"blk.4.attn_norm.weight": torch.ones(32)},  # a block past the last
        {"blk.1.post_attention_norm.weight": torch.ones(32)},
        {"rope_freqs.weight": torch.tensor([1.0, 2.0, 4.0, 8.0])},
        {"rope_factors_long.weight": torch.full((4,), 3.0)},
        {"blk.0.attn_output.scale": torch.ones(1)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_nothing_reads_is_named(source, tmp_path, pre, extra):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, source, pre=pre, extra=extra)
    with pytest.raises(PrunekitError, match="load the original checkpoint instead") as caught:
        checkpoint.load(path)
    assert next(iter(extra)) in str(caught.value)


@READERS
def test_factors_of_one_are_harmless(source, tmp_path, pre, token_ids):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, source, pre=pre, extra={"rope_freqs.weight": torch.ones(4)})
    assert torch.equal(checkpoint.load(path)[0](token_ids).logits, source(token_ids).logits)


def test_factors_that_the_model_follows_are_accepted(tiny, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny("llama", rope_parameters=scaling)
    plain = tiny("llama").model.rotary_emb.inv_freq
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.max() > 1

    class Held:
        n_elements = factors.numel()
        data = factors.numpy()

    class Whole:
        n_elements = sum(parameter.numel() for parameter in model.parameters())

    tensors = {"rope_freqs.weight": Held, "all": Whole}
    check_accounts(tmp_path / "x.gguf", model, [], tensors, {})
    Held.data = (factors * 1.1).numpy()
    with pytest.raises(PrunekitError, match=r"rope_freqs\.weight"):
        check_accounts(tmp_path / "x.gguf", model, [], tensors, {})


@READERS
@pytest.mark.parametrize("given", [0, 1, -1])
def test_split_files_are_read_whole_or_refused(source, tmp_path, pre, given, token_ids):
    write_gguf(tmp_path / "tiny.gguf", source, pre=pre, shard_tensors=10)
    parts = sorted(tmp_path.glob("tiny-*-of-*.gguf"))
    assert len(parts) == 4
    if pre == "smollm":
        found = checkpoint.load(parts[0])[0](token_ids).logits
        assert torch.equal(found, source(token_ids).logits)
        parts[2].unlink()
        with pytest.raises(PrunekitError, match=r"tiny-00003-of-00004\.gguf is missing"):
            checkpoint.load(parts[0])
    else:
        with pytest.raises(PrunekitError, match="llama-gguf-split --merge"):
            checkpoint.load(parts[given])


def test_a_part_without_its_number_is_refused(source, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", source, shard_tensors=10)
    part = min(tmp_path.glob("tiny-*.gguf"))
    with pytest.raises(PrunekitError, match=r"one of 4 parts.*give it the name"):
        checkpoint.load(part.rename(tmp_path / "model.gguf"))
