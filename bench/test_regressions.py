"""Times to compare between commits: `pytest bench --benchmark-only --benchmark-autosave`.

Small shapes, on a GPU if there is one; `--benchmark-compare` says what became slower. Results for
publication come from the bench_*.py scripts, which check, rotate operands and measure roofs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prunekernels
import pytest
import torch

from bench import bench_metrics, bench_model, bench_select, bench_sparse, harness, peers
from bench.harness import Case
from prunekit.speed import decoding as speed
from prunekit.speed import timing
from prunekit.speed.variants import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any) -> Callable[[Callable[[], Any]], Any]:
    """Times a function, the GPU's work included, and returns its last result."""

    def run(function: Callable[[], Any]) -> Any:
        def whole() -> Any:
            found = function()
            timing.synchronize(DEVICE)
            return found

        whole()  # compile
        with torch.no_grad():
            return benchmark.pedantic(whole, rounds=5, iterations=3, warmup_rounds=1)

    return run


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(
    ("pattern", "name"),
    [("2:4", "dense"), ("2:4", "2:4 auto"), ("unstructured", "bitmap auto")],
)
def test_linear(timed, pattern, name, tokens):
    torch.manual_seed(0)
    case = Case("linear", pattern, "bfloat16", {"M": tokens, "N": 512, "K": 512, "sparsity": 0.5})
    weights = bench_sparse.Weights(case, torch.bfloat16, DEVICE, lambda held: 1)
    peer = next(peer for peer in peers.LINEAR if peer.name == name)
    try:
        layer = weights.layers(peer, tokens)[0]
    except harness.Absent as absent:
        pytest.skip(str(absent))
    x = torch.randn(tokens, 512, device=DEVICE).bfloat16()
    found = timed(lambda: layer.apply(x))
    assert bench_sparse.check(layer, weights.copies[0], x)(found).right


@pytest.mark.parametrize("level", ["core", "precise", "full"])
def test_pair_stats(timed, level):
    torch.manual_seed(0)
    inputs = bench_metrics.logits(8, 32000, torch.float32, DEVICE)
    found = timed(lambda: prunekernels.pair_stats(inputs.base, inputs.other, level=level))
    assert found.kl_base_other.isfinite().all()


def test_head_pair_stats(timed):
    torch.manual_seed(0)
    inputs = bench_metrics.hidden(8, 256, 16000, torch.float32, DEVICE)
    found = timed(lambda: prunekernels.head_pair_stats(inputs.base, inputs.other, inputs.head))
    assert found.kl_base_other.isfinite().all()


def test_vector_stats(timed):
    base = torch.randn(512, 576, device=DEVICE)
    found = timed(lambda: prunekernels.vector_stats(base, base + 0.1))
    assert (found.cosine > 0.9).all()


@pytest.mark.parametrize("name", ["nm_mask", "rowwise_mask"])
def test_masks(timed, name):
    scores = torch.rand(1024, 1024, device=DEVICE)
    select = getattr(prunekernels, name)
    found = timed(lambda: select(scores, *((2, 4) if name == "nm_mask" else (0.5,))))
    assert int(found.sum()) == scores.numel() // 2


@pytest.mark.parametrize("mode", ["mask", "2:4"])
def test_sparsegpt_update(timed, mode):
    torch.manual_seed(0)
    (block,) = bench_select.blocks(960, 128, 1, mode == "mask", DEVICE)
    groups = {} if mode == "mask" else {"keep": 2, "of": 4}
    found = timed(lambda: prunekernels.sparsegpt_update(*block, **groups))
    if mode == "mask":
        assert torch.equal(found.mask, block.mask)
    else:
        assert int(found.mask.sum()) == found.mask.numel() // 2
    assert not found.pruned[~found.mask].any() and found.errors[~found.mask].all()


@pytest.mark.parametrize("variant", ["dense", "dropped", "2:4"])
def test_decoding(timed, variant):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    made = build(bench_model.load("tiny", DEVICE, dtype), variant)
    prompts = speed.random_prompts(made.model, 2, 16)
    continuation = speed.Continuation(made.model, prompts, 5, "static")
    assert timed(continuation.decode) > 0
