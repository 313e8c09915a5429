"""What other engines write: logits or states, read back as candidate and as reference."""

from __future__ import annotations

import pytest
import torch

import prunekit as pk
from prunekit.divergence.capture import Capture, CaptureWriter
from prunekit.divergence.windows import of_text
from prunekit.errors import PrunekitError

CONTEXT = 16


@pytest.fixture
def pair(tiny, perturbed, saved):
    base = tiny("gemma2")
    other = perturbed(base, 0.02)
    return other, saved(base, "base"), saved(other, "other")


@torch.no_grad()
def write(folder, model, plan, kind):
    """What an engine of the user's would write, one window at a time."""
    facts = {"name": "mine", "bytes_on_disk": 12345, "dtype": "int3"}
    options = {}
    if kind == "states":
        cap = model.config.final_logit_softcapping
        options = {"head": model.lm_head.weight, "softcap": cap}
    writer = CaptureWriter(folder, plan, kind, facts=facts, **options)
    for index, (ids, first) in enumerate(zip(plan.ids, plan.firsts, strict=True)):
        window = torch.tensor([ids])
        if kind == "logits":
            rows = model(window).logits[0, first - 1 : -1]
        else:
            rows = model.model(window).last_hidden_state[0, first - 1 : -1]
        writer.add(index, rows)


@pytest.mark.parametrize("kind", ["logits", "states"])
def test_a_capture_equals_the_model(pair, documents, word_tokenizer, tmp_path, kind):
    other, here, there = pair
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    write(tmp_path / "mine", other, plan, kind)
    live = pk.kld(here, [there], documents, context=CONTEXT, floor="none")
    read = pk.kld(here, [str(tmp_path / "mine")], documents, context=CONTEXT, floor="none")
    wanted, found = (dict(each.compared) for each in (live, read))
    for name, values in wanted["other"].values.items():
        assert found["mine"].values[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert read["mine"]["size"] == 12345 and read["mine"]["dtype"] == "int3"
    # and the other way round: what the engine computed is the reference
    turned = pk.kld(
        str(tmp_path / "mine"), [here], documents, context=CONTEXT, tokenizer=word_tokenizer
    )
    values = dict(turned.compared)["base"].values
    assert values["kl_reverse"] == pytest.approx(wanted["other"].values["kl"], rel=1e-4, abs=1e-6)


def test_a_writer_goes_on_and_refuses_what_does_not_fit(pair, documents, word_tokenizer, tmp_path):
    _, here, _ = pair
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    rows = torch.randn(7, 97)
    writer = CaptureWriter(tmp_path / "mine", plan, "logits")
    writer.add(range(0, 2), torch.cat([rows, rows]))
    again = CaptureWriter(tmp_path / "mine", plan, "logits")
    assert not again.missing(range(0, 2)) and again.missing(range(2, 3))
    with pytest.raises(PrunekitError, match=r"2 to 2 score 7 positions, the rows have .*\(6, 97\)"):
        again.add(2, rows[:6])
    with pytest.raises(PrunekitError, match=r"lacks the rows of 24 of 26 windows, first of wind"):
        Capture(tmp_path / "mine")
    shorter = of_text(word_tokenizer, documents, context=8)
    with pytest.raises(PrunekitError, match=r"another context \(16, now 8\)"):
        CaptureWriter(tmp_path / "mine", shorter, "logits")
    with pytest.raises(PrunekitError, match="capture of states needs a head"):
        CaptureWriter(tmp_path / "new", plan, "states")
    with pytest.raises(PrunekitError, match="unknown kind of capture 'probabilities'"):
        CaptureWriter(tmp_path / "new", plan, "probabilities")
    for index in range(2, len(plan)):
        again.add(index, rows)
    damaged = tmp_path / "mine" / "rows-000005-000006.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:40])
    found = pk.kld(here, [str(tmp_path / "mine")], documents, context=CONTEXT, floor="none")
    assert f"{damaged} is missing or damaged" in found.failed[0].error
    other_text = pk.kld(
        here, [str(tmp_path / "mine")], documents[::-1], context=CONTEXT, floor="none"
    )
    assert "another text" in other_text.failed[0].error


def test_half_precision_logits_and_nan(pair, documents, word_tokenizer, tmp_path):
    _, here, _ = pair
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    writer = CaptureWriter(tmp_path / "mine", plan, "logits")
    for index in range(len(plan)):
        rows = torch.randn(7, 97, dtype=torch.bfloat16)
        if index == 11:
            rows[3, 5] = float("nan")
        writer.add(index, rows)
    found = pk.kld(here, [str(tmp_path / "mine")], documents, context=CONTEXT, floor="none")
    assert "not finite at 1 positions, first at token 12 of window 11" in found.failed[0].error


def test_a_head_is_recognised_by_every_bit(word_tokenizer, documents, tmp_path):
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    head = torch.randn(5_000_000 // 600, 600)  # more than one look's rows
    CaptureWriter(tmp_path / "c", plan, "states", head=head)
    for index, (ids, first) in enumerate(zip(plan.ids, plan.firsts, strict=True)):
        CaptureWriter(tmp_path / "c", plan, "states", head=head).add(
            index, torch.zeros(len(ids) - first, 600)
        )
    kept = Capture(tmp_path / "c")
    assert kept.has_head(head) and not kept.has_head(head[:-1])
    assert not kept.has_head(head.double()) and not kept.has_head(head.t())
    other = head.clone()
    other[-1, -1] += 1e-6
    assert not kept.has_head(other)
