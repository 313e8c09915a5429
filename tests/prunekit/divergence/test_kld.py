"""`pk.kld` against a float64 evaluation of materialised logits, and what it does with bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from allocations import cpu_peak
from safetensors import SafetensorError

import prunekit as pk
from prunekit.divergence import measuring, reference
from prunekit.divergence.windows import Windows, of_text
from prunekit.errors import PrunekitError

CONTEXT = 16


@torch.no_grad()
def plain(base, other, plan) -> dict[str, np.ndarray]:
    """Every statistic of every scored position, in float64, from whole logits."""
    rows: dict[str, list[torch.Tensor]] = {}
    for ids, first in zip(plan.ids, plan.firsts, strict=True):
        window = torch.tensor([ids])
        a, b = (m(window).logits[0, first - 1 : -1].double() for m in (base, other))
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        mixed = (0.5 * (p + q)).log()
        label = window[0, first:, None]
        nll_p, nll_q = (-each.gather(-1, label)[:, 0] for each in (log_p, log_q))
        tops = [set(row.tolist()) for row in a.topk(10).indices]
        held = zip(tops, b.topk(10).indices, strict=True)
        found = {
            "kl": (p * (log_p - log_q)).sum(-1),
            "kl_reverse": (q * (log_q - log_p)).sum(-1),
            "js": 0.5 * (p * (log_p - mixed) + q * (log_q - mixed)).sum(-1),
            "total_variation": 0.5 * (p - q).abs().sum(-1),
            "one_minus_cos_prob": 1 - torch.cosine_similarity(p, q, dim=-1),
            "nll_base": nll_p,
            "nll_other": nll_q,
            "prob_delta": torch.exp(-nll_q) - torch.exp(-nll_p),
            "entropy_base": -(p * log_p).sum(-1),
            "entropy_other": -(q * log_q).sum(-1),
            "flipped": (p.argmax(-1) != q.argmax(-1)).double(),
            "overlap": torch.tensor(
                [len(top & set(row.tolist())) / 10 for top, row in held], dtype=torch.float64
            ),
        }
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


def check_rows(values, expected):
    kl, found = expected["kl"], values["kl"].astype(np.float64)
    # The models here print logits of tens; float32 ones are off by 1e-6 of them, which moves a KL
    # by √(2·KL) times that.
    room = 1e-8 + np.where(kl > 1e-4, 1e-5 * kl, 0) + 2e-6 * np.sqrt(2 * kl)
    assert (np.abs(found - kl) <= room).all(), np.abs(found - kl).max()
    for name, wanted in expected.items():
        assert values[name] == pytest.approx(wanted, rel=2e-4, abs=3e-6), name


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", ["llama.cpp", "documents"])
def test_equals_float64_evaluation(tiny, perturbed, saved, documents, word_tokenizer, name, kind):
    base = tiny(name)
    other = perturbed(base, 0.02)
    here, there = saved(base, "base"), saved(other, "other")
    found = pk.kld(here, [there], documents, context=CONTEXT, windows=kind, floor="none")
    plan = of_text(word_tokenizer, documents, kind=kind, context=CONTEXT)
    expected = plain(base, other, plan)
    ((_, compared),) = found.compared
    check_rows(compared.values, expected)
    means = found["other"]["means"]
    assert means["ppl_other"]["mean"] == pytest.approx(
        math.exp(expected["nll_other"].mean()), rel=1e-5
    )
    assert means["prob_delta_rms"]["mean"] == pytest.approx(
        np.sqrt(np.square(expected["prob_delta"]).mean()), rel=1e-4
    )
    assert found["other"]["summary"]["kl_p99.9"] == pytest.approx(
        np.quantile(expected["kl"], 0.999), rel=1e-4
    )


def test_itself_is_at_exactly_0_and_bfloat16_is_the_floor(tiny, perturbed, saved, documents):
    base = tiny("llama")
    here, noisy = saved(base, "base"), saved(perturbed(base, 0.02), "noisy")
    found = pk.kld(here, [noisy, here], documents, context=CONTEXT)
    assert [row.name for row in found.rows] == ["base", "reference in bfloat16", "noisy"]
    itself = dict(found.compared)["base"].values
    for name in ("kl", "kl_reverse", "js", "total_variation", "one_minus_cos_prob", "prob_delta"):
        assert (itself[name] == 0).all(), name
    assert (itself["overlap"] == 1).all() and not itself["flipped"].any()
    floor = found["reference in bfloat16"]
    assert 0 < floor["means"]["kl"]["mean"] < 0.1 * found["noisy"]["means"]["kl"]["mean"]
    assert floor["dtype"] == "bfloat16" and floor["bytes_on_disk"] is None
    apart = found.difference("noisy", "base")
    assert apart["low"] > 0 and apart == found["noisy"]["means"]["kl"]


def test_what_is_done_is_not_done_again(tiny, perturbed, saved, documents, tmp_path, monkeypatch):
    base = tiny("llama")
    here, noisy = saved(base, "base"), saved(perturbed(base, 0.02), "noisy")
    arguments = {"context": CONTEXT, "output": tmp_path / "out", "floor": "none"}
    first = pk.kld(here, [noisy], documents, **arguments)
    monkeypatch.setattr(
        "prunekit.divergence.candidates.load_any", lambda *a, **k: pytest.fail("loaded")
    )
    again = pk.kld(here, [noisy], documents, **arguments)
    assert again.to_dict() == first.to_dict()
    told = json.loads((tmp_path / "out" / "kld.json").read_text())
    assert told == first.to_dict()


def test_a_killed_run_goes_on(tiny, perturbed, saved, documents, tmp_path, monkeypatch):
    base = tiny("llama")
    here, noisy = saved(base, "base"), saved(perturbed(base, 0.02), "noisy")
    arguments = {"context": CONTEXT, "floor": "none"}
    whole = pk.kld(here, [noisy], documents, output=tmp_path / "whole", **arguments)
    monkeypatch.setattr("prunekit.divergence.windows.GROUP_POSITIONS", 14)
    groups = type(whole.held.windows).groups

    def small(self, positions=14):
        return groups(self, positions)

    monkeypatch.setattr("prunekit.divergence.windows.Windows.groups", small)
    ran: list[int] = []

    def stopping(states_of, after):
        def run(*rest):
            ran.append(1)
            if len(ran) > after:
                raise KeyboardInterrupt
            return states_of(*rest)

        return run

    for module, after in ((reference, 3), (measuring, 4)):
        ran.clear()
        with monkeypatch.context() as patched:
            patched.setattr(module, "states_of", stopping(module.states_of, after))
            with pytest.raises(KeyboardInterrupt):
                pk.kld(here, [noisy], documents, output=tmp_path / "cut", **arguments)
    ran.clear()
    monkeypatch.setattr(measuring, "states_of", stopping(measuring.states_of, 1000))
    monkeypatch.setattr(reference, "states_of", lambda *rest: pytest.fail("the cache was whole"))
    found = pk.kld(here, [noisy], documents, output=tmp_path / "cut", **arguments)
    groups_in_all = len(found.held.windows.groups())
    assert len(ran) == groups_in_all - 4 > 3
    cut, uncut = (dict(each.compared)["noisy"].values for each in (found, whole))
    for name in uncut:
        assert cut[name] == pytest.approx(uncut[name], rel=1e-5, abs=1e-7), name


def test_the_cache_is_shared_and_guarded(tiny, perturbed, saved, documents, tmp_path):
    base = tiny("llama")
    here, noisy = saved(base, "base"), saved(perturbed(base, 0.02), "noisy")
    cache = tmp_path / "cache"
    arguments = {"context": CONTEXT, "reference_cache": cache, "floor": "none"}
    first = pk.kld(here, [noisy], documents, **arguments)
    rows = sum(file.stat().st_size for file in cache.glob("rows-*.safetensors"))
    states = first.plan["positions"] * base.config.hidden_size * 4
    assert states < rows < states + 200 * len(list(cache.glob("rows-*.safetensors")))
    again = pk.kld(here, [noisy], documents, output=tmp_path / "out", **arguments)
    assert again.to_dict() == first.to_dict()
    for message, changed in (
        ("another context \\(16, now 8\\)", {"context": 8}),
        ("another windows \\(llama.cpp, now documents\\)", {"windows": "documents"}),
        ("another count", {"limit": 3}),
    ):
        with pytest.raises(PrunekitError, match=message):
            pk.kld(here, [noisy], documents, **{**arguments, **changed})
    with pytest.raises(PrunekitError, match="another text"):
        pk.kld(here, [noisy], documents[::-1], **arguments)
    with pytest.raises(PrunekitError, match="another model"):
        pk.kld(noisy, [here], documents, **arguments)
    facts = cache / "capture.json"
    facts.write_text(facts.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(PrunekitError, match="is version 7 of prunekit-capture"):
        pk.kld(here, [noisy], documents, **arguments)


def test_one_failure_marks_its_row_and_the_others_go_on(
    tiny, perturbed, saved, documents, tmp_path, word_tokenizer
):
    base = tiny("llama")
    here, noisy = saved(base, "base"), saved(perturbed(base, 0.02), "noisy")
    ruined = perturbed(base, 0.02)
    ruined.lm_head.weight.data[40] = math.nan
    words = word_tokenizer.get_vocab()
    swapped = saved(perturbed(base, 0.02), "swapped")
    told = json.loads((tmp_path / "models/swapped/tokenizer.json").read_text())
    told["model"]["vocab"] |= {"w10": words["w11"], "w11": words["w10"]}
    (tmp_path / "models/swapped/tokenizer.json").write_text(json.dumps(told))
    short = saved(tiny("llama", max_position_embeddings=8), "short")
    few = saved(tiny("llama", vocab_size=50), "few")
    candidates = [saved(ruined, "ruined"), noisy, swapped, short, few, str(tmp_path / "nowhere")]
    found = pk.kld(here, candidates, documents, context=CONTEXT, floor="none")
    assert found.rows[0].name == "noisy" and len(found.failed) == 5
    errors = {row.name: row.error for row in found.failed}
    assert (
        "candidate's logits are not finite at 182 positions, first at token 9 of window 0"
        in (errors["ruined"])
    )
    assert (
        "2 ids stand for other tokens, first 10 ('w10' in the reference, 'w11' here)"
        in (errors["swapped"])
    )
    assert "windows of 15 tokens exceed its context of 8" in errors["short"]
    assert "its vocabulary ends at 49" in errors["few"]
    assert "doesn't exist" in errors["nowhere"]
    assert found["ruined"] == {"name": "ruined", "error": errors["ruined"]}


def test_padded_heads_are_compared_over_what_both_have(tiny, saved, documents):
    base = tiny("llama")
    padded = tiny("llama", vocab_size=104)
    state = base.state_dict()
    for name, tensor in padded.state_dict().items():
        tensor[: len(state[name])].copy_(state[name])
    found = pk.kld(saved(base, "base"), [saved(padded, "padded")], documents, context=CONTEXT)
    row = found["padded"]
    assert row["notes"] == [
        "heads of 97 (reference) and 104 tokens: compared over the first 97",
    ]
    assert row["means"]["kl"]["mean"] < 1e-10  # products of other shapes may round otherwise


def test_another_architecture_and_width(tiny, saved, documents, word_tokenizer):
    base, other = tiny("llama"), tiny("gpt2", hidden_size=48, num_attention_heads=4)
    found = pk.kld(
        saved(base, "base"), [saved(other, "other")], documents, context=CONTEXT, floor="none"
    )
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    check_rows(dict(found.compared)["other"].values, plain(base, other, plan))


def test_models_in_memory_and_types(tiny, perturbed, saved, documents, word_tokenizer):
    base = tiny("llama")
    noisy = perturbed(base, 0.02)
    held = pk.kld(
        base, {"mine": noisy}, documents, context=CONTEXT, tokenizer=word_tokenizer, floor="none"
    )
    here, there = saved(base, "base"), saved(noisy, "noisy")
    read = pk.kld(here, {"mine": there}, documents, context=CONTEXT, floor="none")
    assert held["mine"]["means"] == read["mine"]["means"]
    half = pk.kld(here, [f"{here}@float16"], documents, context=CONTEXT, floor="none")
    assert [row.name for row in half.rows] == ["base in float16"]
    weights = sum(parameter.nbytes for parameter in base.parameters())
    assert held.reference["bytes_in_memory"] - half["base in float16"]["bytes_in_memory"] == (
        weights // 2  # rotary frequencies stay in float32
    )


def test_logits_never_exist_as_a_whole(tiny, saved, documents):
    vocabulary = 49152
    base = tiny("llama", vocab_size=vocabulary, max_position_embeddings=256)
    other = tiny("llama", vocab_size=vocabulary, max_position_embeddings=256)
    other.lm_head.weight.data.mul_(1.01)
    here, there = saved(base, "base"), saved(other, "other")
    model = sum(p.nbytes for p in base.parameters())
    found = []

    def run():
        found.append(pk.kld(here, [there], documents * 2, context=128, floor="none", topk=3))

    peak = cpu_peak(run)
    assert not found[0].failed
    positions = found[0].plan["positions"]
    allowed = 1.15 * (model + 64e6)
    assert 4 * positions * vocabulary > 0.5 * allowed  # one side's logits alone, beside the model
    assert peak <= allowed


def test_a_reference_of_nan_is_named(tiny, saved, documents):
    base = tiny("llama")
    base.model.norm.weight.data[0] = math.nan
    with pytest.raises(PrunekitError, match="reference's states are not finite at token 9 of win"):
        pk.kld(saved(base, "base"), [], documents, context=CONTEXT)


def test_bad_calls_name_the_fix(tiny, saved, documents):
    here = saved(tiny("llama"), "base")
    for message, arguments in (
        ("--limit", {"dataset": "a/b"}),
        ("topk is -1", {"text": documents, "topk": -1}),
        ("30 tokens has nothing .* need 64", {"text": documents[:1], "context": 64}),
        ("exceed the reference's context of 64", {"text": documents, "context": 80}),
    ):
        with pytest.raises(PrunekitError, match=message):
            pk.kld(here, [here], **arguments)
    with pytest.raises(PrunekitError, match="nothing to compare"):
        pk.kld(here, [], documents, floor="none")


def test_a_failure_of_any_kind_half_way_is_a_row(
    tiny, perturbed, saved, documents, tmp_path, monkeypatch
):
    base = tiny("llama")
    here, noisy = saved(base, "base"), saved(perturbed(base, 0.02), "noisy")
    groups = Windows.groups
    monkeypatch.setattr(Windows, "groups", lambda self, positions=14: groups(self, positions))
    ran, real = [], measuring.states_of

    def failing(*rest):
        ran.append(1)
        if len(ran) == 5:
            raise KeyError("a layer of the model's own code")
        return real(*rest)

    monkeypatch.setattr(measuring, "states_of", failing)
    arguments = {"context": CONTEXT, "output": tmp_path / "out", "floor": "none"}
    found = pk.kld(here, [noisy, here], documents, **arguments)
    assert [row.name for row in found.rows] == ["base", "noisy"]
    assert found.failed[0].error == 'KeyError: "a layer of the model\'s own code"'
    ran.append(1)
    again = pk.kld(here, [noisy, here], documents, **arguments)
    count = len(again.held.windows.groups())
    assert not again.failed and len(ran) == 5 + count + 1 + (count - 4)


def test_one_writer_at_a_time(tiny, saved, documents, tmp_path):
    here = saved(tiny("llama"), "base")
    command = "import sys; from prunekit.files.locks import locked\n"
    command += f"with locked({str(tmp_path / 'out')!r}): print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", command], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(PrunekitError, match="another run is writing"):
            pk.kld(here, [here], documents, context=CONTEXT, output=tmp_path / "out")
        other.communicate("\n")
    assert not pk.kld(here, [here], documents, context=CONTEXT, output=tmp_path / "out").failed


def test_a_full_disk_loses_nothing(tiny, perturbed, saved, documents, tmp_path, monkeypatch):
    base = tiny("llama")
    here, noisy = saved(base, "base"), saved(perturbed(base, 0.02), "noisy")
    arguments = {"context": CONTEXT, "output": tmp_path / "out", "floor": "none"}
    from prunekit.divergence import capture

    real, room = capture.save_file, [3]

    def filling(tensors, path, metadata):
        room[0] -= 1
        if room[0] < 0:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(capture, "save_file", filling)
    found = pk.kld(here, [noisy], documents, **arguments)  # head, plan and states fit, no rows
    assert "No space left on device" in found.failed[0].error
    room[0] = 1
    assert not pk.kld(here, [noisy], documents, **arguments).failed
    assert not list((tmp_path / "out").rglob("*.new"))
    with pytest.raises(PrunekitError, match=r"No space left .* run again to go on"):
        pk.kld(here, [noisy], documents, **{**arguments, "output": tmp_path / "other"})


def test_a_cache_that_does_not_fit_is_refused_early(tiny, saved, documents, monkeypatch):
    here = saved(tiny("llama"), "base")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(PrunekitError, match=r"head take 35\d\d\d bytes, 1000 are free"):
        pk.kld(here, [here], documents, context=CONTEXT)
