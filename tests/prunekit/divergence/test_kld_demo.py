"""The embedded model against copies of itself (minutes: under `make test-all` only)."""

from __future__ import annotations

import pytest
import torch
from prunekernels.metrics.eager import logit_blocks
from prunekernels.metrics.options import OutputHead

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
def test_equals_float64_on_a_real_vocabulary():
    """KL to 1e-5 of itself above 1e-4 and to 1e-8 below, of the float32 logits there are.

    Of exact logits it is off by what the rounding e of float32 logits makes of it: to first order
    Σ p (ln p/q − KL) e_a + Σ (q − p) e_b, at most 2·√(2·KL)·max|e|.
    """
    found = pk.kld("demo", [], context=128, limit=2)
    got = torch.from_numpy(dict(found.compared)["reference in bfloat16"].values["kl"]).double()
    base, tokenizer = pk.load("demo")
    other, _ = pk.load("demo", dtype="bfloat16")
    plan = of_text(tokenizer, [load_heldout()], context=128, limit=2)
    # bfloat16 states depend on what shares a batch: batch both as the command does
    states = [states_of(m, plan.ids, plan.firsts, 1024).float() for m in (base, other)]
    heads = [m.lm_head.weight for m in (base, other)]

    def kl_of(logits):
        log_p, log_q = (each.double().log_softmax(-1) for each in logits)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    (block,) = logit_blocks((states[0], states[1]), OutputHead(*heads))
    rounded = block[1:]
    exact = [each.double() @ head.double().t() for each, head in zip(states, heads, strict=True)]
    of_rounded, of_exact = kl_of(rounded), kl_of(exact)
    room = 1e-8 + torch.where(of_rounded > 1e-4, 1e-5 * of_rounded, 0)
    assert ((got - of_rounded).abs() <= room).all(), (got - of_rounded).abs().max()
    slips = [(a - b).abs().amax(-1) for a, b in zip(rounded, exact, strict=True)]
    room += 2 * (2 * of_exact).sqrt() * torch.maximum(*slips)
    assert ((got - of_exact).abs() <= room).all(), (got - of_exact).abs().max()
