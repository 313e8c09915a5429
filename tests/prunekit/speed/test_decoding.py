"""Timed decoding computes what uncached decoding does, with every cache and dropped part."""

from __future__ import annotations

import pytest
import torch
from recorded_graph import record_on_cpu
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit.errors import PrunekitError
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.speed import decoding as speed


def tiny(layers: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def greedy(model: LlamaForCausalLM, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """The next tokens without any cache."""
    ids = prompts
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompts.shape[1] :]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dropped", ["nothing", "attn", "mlp", "block", "every attn"])
@torch.no_grad()
def test_cached_steps_equal_uncached_ones(cache, dropped):
    model = tiny()
    if dropped == "block":
        drop_blocks_(model, [0, 2])
    elif dropped != "nothing":
        layers = range(4) if "every" in dropped else (0, 2)
        drop_sublayers_(model, **{dropped.split()[-1]: layers})
    prompts = speed.random_prompts(model, 3, 9)
    assert speed.check_cached(model, prompts, cache) < 1e-4
    # again, from the same emptied cache
    continuation = speed.Continuation(model, prompts, 6, cache)
    following = greedy(model, prompts, 5)
    first = continuation.logits(following)
    assert torch.equal(first.argmax(-1)[:, :-1], following[:, 1:])
    assert torch.equal(continuation.logits(following), first)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_timed_decoding_writes_the_models_own_greedy_tokens(cache):
    model = tiny()
    prompts = speed.random_prompts(model, 2, 7)
    continuation = speed.Continuation(model, prompts, 4, cache)
    assert continuation.prefill() > 0
    assert torch.equal(continuation._token[:, 0], greedy(model, prompts, 1)[:, 0])
    assert continuation.decode() > 0
    assert torch.equal(continuation._token[:, 0], greedy(model, prompts, 4)[:, -1])


def test_a_broken_position_is_noticed(monkeypatch):
    model = tiny()
    prompts = speed.random_prompts(model, 2, 9)
    step = speed.Continuation._step
    monkeypatch.setattr(
        speed.Continuation,
        "_step",
        lambda self, ids: step(self, ids[:, :-1] if len(ids[0]) > 1 else ids),
    )
    assert speed.check_cached(model, prompts, "dynamic") > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": "paged"}, "cache 'paged' is unknown"),
        ({"cache": "graph"}, "needs an NVIDIA GPU"),
        ({"new_tokens": 60}, "exceed the model's context of 64"),
        ({"new_tokens": 0}, "must not be empty"),
    ],
    ids=str,
)
def test_bad_requests_name_the_fix(change, message):
    model = tiny()
    given = {"new_tokens": 4, "cache": "dynamic", **change}
    with pytest.raises(PrunekitError, match=message):
        speed.Continuation(model, speed.random_prompts(model, 1, 9), **given)


@torch.no_grad()
def test_a_graph_decodes_what_uncached_steps_do_on_every_use(monkeypatch):
    graphs = record_on_cpu(monkeypatch)
    model = tiny()
    prompts = speed.random_prompts(model, 3, 9)
    continuation = speed.Continuation(model, prompts, 6, "static")
    continuation.kind = "graph"  # asked for by name it needs a GPU
    following = greedy(model, prompts, 5)
    first = continuation.logits(following)
    assert len(graphs) == 1 and graphs[0].calls
    whole = model(torch.cat([prompts, following], 1), use_cache=False).logits[:, -5:]
    assert (first - whole).abs().max() < 1e-4 * whole.std()
    assert torch.equal(continuation.logits(following), first)
    assert continuation.decode() > 0
    assert torch.equal(continuation._token[:, 0], greedy(model, prompts, 6)[:, -1])
    assert torch.equal(continuation.logits(following), first)
    assert len(graphs) == 1


def test_a_recorded_graph_refuses_what_a_capture_refuses(monkeypatch):
    record_on_cpu(monkeypatch)
    values = torch.arange(4.0)
    for read in (
        lambda: values.sum().item(),
        lambda: values[values > 1],
        lambda: values + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    ):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="needs the host"), torch.cuda.graph(graph):
            read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_decode_what_uncached_steps_do():
    model = tiny().cuda()
    prompts = speed.random_prompts(model, 3, 9)
    assert speed.check_cached(model, prompts, "graph") < 1e-2
    continuation = speed.Continuation(model, prompts, 6, "graph")
    following = greedy(model, prompts.cuda(), 5)
    first = continuation.logits(following)
    assert torch.equal(first.argmax(-1)[:, :-1], following[:, 1:])
    assert torch.equal(continuation.logits(following), first)
    assert continuation.decode() > 0
