"""The embedded model against copies of itself (minutes: under `make test-all` only)."""

from __future__ import annotations

import pytest
import torch

import prunekit as pk
from bench.kld_copies import make
from prunekit.divergence.rows import states_of
from prunekit.divergence.windows import of_text
from prunekit.evaluation.items import load_heldout

pytestmark = pytest.mark.slow


def test_copies_are_strictly_ordered(tmp_path):
    pytest.importorskip("torchao")
    names = ["int4", "int6", "int8", "Q4_0", "Q5_0", "Q8_0"]
    paths = make(tmp_path / "copies", names)
    found = pk.kld("demo", ["demo", *map(str, paths)], context=256, limit=4)
    assert not found.failed
    itself = dict(found.compared)["SmolLM2-135M-Instruct"].values
    for name in ("kl", "kl_reverse", "js", "total_variation", "one_minus_cos_prob", "prob_delta"):
        assert (itself[name] == 0).all(), name
    for closer, farther in (
        ("SmolLM2-135M-Instruct", "reference in bfloat16"),
        ("int8", "int6"),
        ("int6", "int4"),
        ("Q8_0.gguf", "Q5_0.gguf"),
        ("Q5_0.gguf", "Q4_0.gguf"),
    ):
        assert found.difference(farther, closer)["low"] > 0, (closer, farther)


@torch.inference_mode()
def test_equals_float64_on_a_real_vocabulary(tmp_path):
    """KL to 1e-5 of itself above 1e-4 and to 1e-8 below, of the same float32 logits."""
    found = pk.kld("demo", [], context=128, limit=2)
    base, tokenizer = pk.load("demo")
    other, _ = pk.load("demo", dtype="bfloat16")
    plan = of_text(tokenizer, [load_heldout()], context=128, limit=2)
    # bfloat16 states depend on what shares a batch: batch both as the command does
    states, rounded = (states_of(m, plan.ids, plan.firsts, 1024).float() for m in (base, other))
    log_p = (states @ base.lm_head.weight.t()).double().log_softmax(-1)
    log_q = (rounded @ other.lm_head.weight.float().t()).double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    got = torch.from_numpy(dict(found.compared)["reference in bfloat16"].values["kl"]).double()
    # two float32 products of a row differ by 1e-6 of its logits (tens), and move a KL with them
    room = 1e-8 + torch.where(kl > 1e-4, 1e-5 * kl, 0) + 2e-6 * (2 * kl).sqrt()
    error = (got - kl).abs()
    print(f"KL off by {float(error.max()):.2g}, by {float((error / kl).max()):.2g} of itself")
    assert (error <= room).all(), (error.max(), (error / kl).max())
