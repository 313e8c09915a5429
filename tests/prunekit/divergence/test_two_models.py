"""The --kl-report numbers, against a plain float64 evaluation of every window's logits."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

import prunekit as pk
from prunekit.divergence.two_models import kl_report
from prunekit.errors import PrunekitError
from prunekit.report.divergence import kl_table

CONTEXT = 8
IDS = torch.randint(3, 97, (3 * CONTEXT + 3,), generator=torch.Generator().manual_seed(11)).tolist()


@torch.no_grad()
def plain(dense, pruned) -> dict[str, torch.Tensor]:
    """KL, agreement, Δp and NLLs of every scored position, one window at a time."""
    rows: dict[str, list[torch.Tensor]] = {"kl": [], "same": [], "delta": [], "p": [], "q": []}
    for start in range(0, len(IDS), CONTEXT):
        window = torch.tensor([IDS[start : start + CONTEXT]])
        logits = [model(window).logits[0, :-1].double() for model in (dense, pruned)]
        log_p, log_q = (row.log_softmax(-1) for row in logits)
        follows = window[0, 1:, None]
        nll_p, nll_q = (-row.gather(-1, follows)[:, 0] for row in (log_p, log_q))
        rows["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
        rows["same"].append((log_p.argmax(-1) == log_q.argmax(-1)).double())
        rows["delta"].append(torch.exp(-nll_q) - torch.exp(-nll_p))
        rows["p"].append(nll_p)
        rows["q"].append(nll_q)
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equals_plain_evaluation(tiny, perturbed, name):
    dense = tiny(name)
    pruned = perturbed(dense)
    found = kl_report(dense, pruned, None, IDS, context=CONTEXT, batch_size=2, progress=False)
    rows = plain(dense, pruned)
    kl, delta, same = rows["kl"], rows["delta"], rows["same"]
    count = len(IDS) - 4  # the first token of each of the four windows is not scored
    assert found["rows"] == count == len(kl) and found["rows_nan"] == 0
    ratio = float((rows["q"] - rows["p"]).mean())
    expected = {
        "kl_mean": float(kl.mean()),
        "kl_mean_stderr": float(kl.std()) / math.sqrt(count),
        "kl_median": float(kl.median()) if count % 2 else float(kl.quantile(0.5)),
        "kl_max": float(kl.max()),
        "kl_p90": float(kl.quantile(0.9)),
        "kl_p0.1": float(kl.quantile(0.001)),
        "same_top": float(same.mean()),
        "same_top_stderr": float(same.std()) / math.sqrt(count),
        "prob_delta_mean": float(delta.mean()),
        "prob_delta_mean_stderr": float(delta.std()) / math.sqrt(count),
        "prob_delta_rms": float(delta.square().mean().sqrt()),
        "prob_delta_p5": float(delta.quantile(0.05)),
        "ln_ppl_base": float(rows["p"].mean()),
        "ln_ppl_ratio": ratio,
        "ln_ppl_ratio_stderr": float((rows["q"] - rows["p"]).std()) / math.sqrt(count),
        "ppl_ratio": math.exp(ratio),
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=2e-6), key
    spread = float(delta.square().std()) / math.sqrt(count)
    assert found["prob_delta_rms_stderr"] == pytest.approx(
        spread / (2 * expected["prob_delta_rms"]), rel=1e-3
    )
    alone = kl_report(dense, pruned, None, IDS, context=CONTEXT, batch_size=1, progress=False)
    for key, value in found.items():
        assert alone[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_table_shows_what_llama_cpp_prints(tiny, perturbed, word_tokenizer):
    dense = tiny("llama")
    text = " ".join(f"w{token}" for token in IDS if token < 93)
    found = kl_report(dense, perturbed(dense), word_tokenizer, text, progress=False)
    page = io.StringIO()
    Console(width=120, file=page).print(kl_table(found, ("dense", "pruned")))
    shown = page.getvalue()
    assert "KL(dense ‖ pruned)" in shown and "ln(PPL ratio)" in shown and "RMS" in shown
    for part in ("99.9 %", "0.1 %", "median", "maximum", "same top token"):
        assert part in shown
    assert f"{found['kl_mean']:.6f} ± {found['kl_mean_stderr']:.6f}" in shown
    assert f"{100 * found['prob_delta_p95']:.6f} %" in shown


def test_equals_kld_over_strided_windows(tiny, perturbed, word_tokenizer):
    dense = tiny("llama")
    pruned = perturbed(dense)
    text = " ".join(f"w{token}" for token in IDS if token < 93)
    both = kl_report(dense, pruned, word_tokenizer, text, context=CONTEXT, progress=False)
    alone = pk.kld(
        dense,
        {"pruned": pruned},
        [text],
        context=CONTEXT,
        windows="strided",
        tokenizer=word_tokenizer,
        floor="none",
    )
    summary = alone["pruned"]["summary"]
    for name, value in summary.items():
        assert value == pytest.approx(both[name], rel=1e-6, abs=1e-9), name
    assert set(both) - set(summary) == {"estimate_valid", "context"} and both["context"] == CONTEXT


def test_a_model_and_itself(tiny):
    model = tiny("qwen2")
    found = kl_report(model, model, None, IDS, context=CONTEXT, progress=False)
    assert found["kl_max"] == found["prob_delta_rms"] == found["ln_ppl_ratio"] == 0.0
    assert found["same_top"] == found["ppl_ratio"] == 1.0


def test_bad_input_names_the_fix(tiny):
    model = tiny("llama")
    with pytest.raises(PrunekitError, match=r"context 1 .* use 2 or more"):
        kl_report(model, model, None, IDS, context=1)
    with pytest.raises(PrunekitError, match="1 tokens has nothing to predict"):
        kl_report(model, model, None, IDS[:1])
    with pytest.raises(PrunekitError, match="needs a tokenizer"):
        kl_report(model, model, None, "words")
    with pytest.raises(PrunekitError, match="vocabulary size"):
        kl_report(model, tiny("llama", vocab_size=101), None, IDS)
