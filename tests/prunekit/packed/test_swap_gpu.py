"""A swapped model on a real NVIDIA GPU: logits, cached decoding, CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from prunekernels import nm_mask
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import prunekit as pk
from prunekit.models.architectures import Architecture
from prunekit.packed.modules import packed_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture
def pair():
    """A 2:4 bfloat16 model and its packed twin, with matrices that kernels have to tile."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval().requires_grad_(False)
    arch = Architecture(dense)
    for index in range(2):
        for ref in arch.weights(index):
            ref.matrix.mul_(nm_mask(ref.matrix.abs(), keep=2, of=4))
    dense = dense.to("cuda", torch.bfloat16)
    swapped = copy.deepcopy(dense)
    report = pk.swap_(swapped)
    assert len(report.swapped) == 14 and report.faster, report.table(verbose=True)
    return dense, swapped


@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
def test_logits_err_no_more_than_eager(pair, tokens):
    dense, swapped = pair
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    with torch.inference_mode():
        got, eager = swapped(ids).logits.double(), dense(ids).logits.double()
        exact = copy.deepcopy(dense).double()(ids).logits
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6
        assert torch.equal(swapped(ids).logits.double(), got)


@pytest.mark.parametrize("static", [False, True])
def test_generation_repeats_itself(pair, static):
    _, swapped = pair
    ids = torch.randint(0, 1000, (2, 9), device="cuda")
    options = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)
    if static:
        options["cache_implementation"] = "static"
    first = swapped.generate(ids, **options)
    assert first.shape == (2, 33)
    assert torch.equal(swapped.generate(ids, **options), first)


def test_decoding_in_cuda_graphs(pair):
    _, swapped = pair
    ids = torch.randint(0, 1000, (1, 12), device="cuda")
    step = torch.compile(swapped.forward, fullgraph=True, mode="reduce-overhead")
    results = []
    for call in (swapped.forward, step):
        cache = StaticCache(config=swapped.config, max_cache_len=32)
        outs = []
        with torch.inference_mode():
            for i in range(12):
                found = call(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                outs.append(found.logits.clone())
        results.append(torch.cat(outs, 1).double())
    eager, graphs = results
    # the compiler rounds norms and rotations elsewhere
    assert (graphs - eager).abs().max() <= 0.02 * eager.abs().max()


def test_the_first_call_of_a_process_may_be_in_cuda_graphs(pair, monkeypatch):
    from prunekernels.sparse import launching

    _, swapped = pair
    ids = torch.randint(0, 1000, (1, 1), device="cuda")
    with torch.inference_mode():
        want = swapped(ids, use_cache=False).logits
        # what a first call allocates for good must not come from the graphs' memory
        monkeypatch.setattr(launching, "_arenas", {})
        monkeypatch.setattr(launching, "_by_stream", {})
        monkeypatch.setattr(launching, "_rooms", {})
        torch._dynamo.reset()
        step = torch.compile(swapped.forward, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            got = step(input_ids=ids, use_cache=False).logits.clone()
            assert (got - want).abs().max() <= 0.02 * want.abs().max()


def test_packed_checkpoints_load_onto_the_gpu(pair, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    dense, swapped = pair
    words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    folder = pk.save(swapped, PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "saved")
    loaded, _ = pk.load(folder, device="cuda")
    # The weights come back bit for bit. Products need not: the loaded layers may be merged
    # otherwise, so that their columns are split otherwise. One model repeats itself exactly.
    saved = dict(packed_layers(swapped))
    for name, layer in packed_layers(loaded):
        assert torch.equal(layer.weight.to_dense(), saved[name].weight.to_dense())
    ids = torch.randint(0, 1000, (1, 5), device="cuda")
    with torch.inference_mode():
        got, eager = loaded(ids).logits.double(), dense(ids).logits.double()
        exact = copy.deepcopy(dense).double()(ids).logits
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6
        assert torch.equal(loaded(ids).logits.double(), got)
