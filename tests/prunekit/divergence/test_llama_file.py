"""llama.cpp's file: its layout, its rounding, and its statistics recomputed as llama.cpp does."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch

import prunekit as pk
from prunekit.divergence.llama_file import LlamaFile, encoded, write
from prunekit.divergence.reference import write_reference
from prunekit.divergence.windows import of_text
from prunekit.errors import PrunekitError

CONTEXT = 16
VOCABULARY = 97  # odd: a row holds one more uint16


def stored(path) -> tuple[int, int, int, np.ndarray, np.ndarray]:
    """n_ctx, n_vocab, n_chunk, tokens and rows of uint16, read without prunekit."""
    raw = path.read_bytes()
    assert raw[:8] == b"_logits_"
    n_ctx, n_vocab, n_chunk = struct.unpack("<iii", raw[8:20])
    tokens = np.frombuffer(raw, "<i4", n_chunk * n_ctx, 20)
    width = 2 * ((n_vocab + 1) // 2) + 4
    rows = np.frombuffer(raw, "<u2", offset=20 + 4 * n_chunk * n_ctx)
    return n_ctx, n_vocab, n_chunk, tokens, rows.reshape(-1, width)


def as_llama_cpp(logits: np.ndarray, row: np.ndarray, token: int) -> tuple[float, ...]:
    """KL, Δp, both NLLs and whether the top is the same, in llama.cpp's own steps and types."""
    logits = logits.astype(np.float32)
    top = logits.max()
    log_sum = np.float32(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    scale, least = row[:4].view("<f4")
    log_p = scale * row[4 : 4 + len(logits)].astype(np.float32) + least
    kept = log_p > np.float32(-16)
    terms = np.exp(log_p[kept]) * (log_p[kept] - logits[kept] + (top + log_sum))
    nll, nll_base = top + log_sum - logits[token], -log_p[token]
    delta = math.exp(-nll) - math.exp(-nll_base)
    same = float(logits.argmax() == log_p.argmax())
    return float(terms.sum(dtype=np.float64)), delta, float(nll_base), float(nll), same


@pytest.fixture
def pair(tiny, perturbed, saved):
    base = tiny("llama")
    other = perturbed(base, 0.02)
    return base, other, saved(base, "base"), saved(other, "other")


@torch.no_grad()
def logits_of(model, plan):
    return [
        model(torch.tensor([ids])).logits[0, first - 1 : -1]
        for ids, first in zip(plan.ids, plan.firsts, strict=True)
    ]


def test_what_is_written_is_llama_cpps_layout(pair, documents, word_tokenizer, tmp_path):
    base, _, _, _ = pair
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    rows = [5 * row for row in logits_of(base, plan)]  # so that some are cut
    path = tmp_path / "base.dat"
    write(path, plan, lambda index: rows[index], VOCABULARY)
    n_ctx, n_vocab, n_chunk, tokens, held = stored(path)
    assert (n_ctx, n_vocab, n_chunk) == (CONTEXT, VOCABULARY, len(plan))
    text = word_tokenizer("\n\n".join(documents))["input_ids"]
    assert tokens.tolist() == text[: len(plan) * CONTEXT]
    assert len(held) == plan.positions == len(plan) * (CONTEXT - 1 - CONTEXT // 2)
    wanted = torch.cat(rows).double().log_softmax(-1)
    read = LlamaFile(path).rows(range(len(plan))).values
    floor = wanted.amax(1, keepdim=True) - 16
    step = (wanted.amax(1) - torch.maximum(wanted.amin(1), floor[:, 0])) / 65535
    error = (read.double() - torch.maximum(wanted, floor)).abs()
    assert (error <= 0.5 * step[:, None] + 4e-6).all()
    assert (wanted < floor).any() and read.amin() >= float(floor.amin()) - 1e-4


def test_flat_rows_and_a_begin_token(tmp_path):
    assert encoded(torch.zeros(2, 5)).shape == (2, 10)
    flat = encoded(torch.full((1, 8), 3.0))
    scale, least = flat[0, :4].view("<f4")
    assert scale == 0 and least == pytest.approx(-math.log(8)) and not flat[0, 4:].any()


@pytest.mark.parametrize("odd", [False, True])
def test_statistics_agree_with_llama_cpps(pair, documents, word_tokenizer, tmp_path, tiny, odd):
    base, other, _, there = pair
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    rows = logits_of(base, plan)
    path = tmp_path / "base.dat"
    write(path, plan, lambda index: rows[index], VOCABULARY)
    told = stored(path)[-1]
    candidate = torch.cat(logits_of(other, plan)).numpy()
    labels = plan.labels(range(len(plan)))
    theirs = np.array([as_llama_cpp(*each) for each in zip(candidate, told, labels, strict=True)]).T
    text = None if odd else documents  # the file says what was read
    found = pk.kld(
        str(path), [there], text, context=CONTEXT, tokenizer=word_tokenizer, floor="none"
    )
    values = dict(found.compared)["other"].values
    # The file's steps of 2.4e-4 leave Σp off 1 by as much, which llama.cpp does not normalise.
    assert values["kl"] == pytest.approx(theirs[0], abs=3e-4)
    assert values["prob_delta"] == pytest.approx(theirs[1], abs=3e-4)
    assert values["nll_base"] == pytest.approx(theirs[2], abs=3e-4)
    assert values["nll_other"] == pytest.approx(theirs[3], abs=2e-5)
    assert (1 - values["flipped"]).mean() == theirs[4].mean()
    assert found["other"]["means"]["kl"]["mean"] == pytest.approx(theirs[0].mean(), abs=1e-4)


def test_reference_and_candidate_by_way_of_files(pair, documents, word_tokenizer, tmp_path):
    _, _, here, there = pair
    exact = pk.kld(here, [there], documents, context=CONTEXT, output=tmp_path / "out")
    write_reference(tmp_path / "base.dat", exact.held)
    swapped = pk.kld(there, [], documents, context=CONTEXT, output=tmp_path / "other")
    write_reference(tmp_path / "other.dat", swapped.held)
    as_candidate = pk.kld(
        here, [str(tmp_path / "other.dat")], documents, context=CONTEXT, floor="none"
    )
    both = pk.kld(
        str(tmp_path / "base.dat"),
        [str(tmp_path / "other.dat"), str(tmp_path / "base.dat")],
        context=CONTEXT,
        tokenizer=word_tokenizer,
    )
    wanted = exact["other"]["means"]["kl"]["mean"]
    assert as_candidate["other.dat"]["means"]["kl"]["mean"] == pytest.approx(wanted, abs=2e-4)
    assert both["other.dat"]["means"]["kl"]["mean"] == pytest.approx(wanted, abs=2e-4)
    assert both["base.dat"]["means"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert both["base.dat"]["dtype"] == "16-bit log-probabilities"
    assert as_candidate["other.dat"]["notes"] == [
        "llama.cpp's file cuts log-probabilities 16 below the largest"
    ]


def test_a_begin_token_starts_each_chunk(tiny, saved, documents, tmp_path, word_tokenizer):
    from tokenizers import processors

    word_tokenizer.add_special_tokens({"bos_token": "w4"})
    word_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w4 $A", special_tokens=[("w4", 4)]
    )
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    assert {ids[0] for ids in plan.ids} == {4} and len(set(plan.starts)) > 5
    here = saved(tiny("llama"), "base")
    made = pk.kld(here, [], documents, context=CONTEXT, output=tmp_path / "out")
    write_reference(tmp_path / "base.dat", made.held)
    assert stored(tmp_path / "base.dat")[3][CONTEXT] == plan.starts[1]
    found = pk.kld(
        str(tmp_path / "base.dat"), [here], context=CONTEXT, tokenizer=word_tokenizer, floor="none"
    )
    assert found.held.windows.ids == plan.ids
    assert found["base"]["means"]["kl"]["mean"] < 1e-4


def test_bad_files_name_the_fix(pair, documents, word_tokenizer, tmp_path):
    base, _, here, _ = pair
    plan = of_text(word_tokenizer, documents, context=CONTEXT)
    rows = logits_of(base, plan)
    path = tmp_path / "base.dat"
    write(path, plan, lambda index: rows[index], VOCABULARY)
    whole = path.read_bytes()
    chunks = len(plan)
    (tmp_path / "cut.dat").write_bytes(whole[:-3000])
    with pytest.raises(PrunekitError, match=rf"cut off: .* {chunks - 3} of {chunks} chunks"):
        LlamaFile(tmp_path / "cut.dat")
    (tmp_path / "other.dat").write_bytes(b"_imatrix" + whole[8:])
    with pytest.raises(PrunekitError, match=r"is no file of llama\.cpp's"):
        LlamaFile(tmp_path / "other.dat")
    (tmp_path / "zero.dat").write_bytes(whole[:8] + struct.pack("<iii", 16, 0, 4) + whole[20:])
    with pytest.raises(PrunekitError, match="4 chunks of 16 tokens with 0 logits"):
        LlamaFile(tmp_path / "zero.dat")
    arguments = {"context": CONTEXT, "floor": "none"}
    for message, changed in (
        ("token 0 of chunk 0 is", {"text": documents[1:] + documents[:1]}),
        ("llama.cpp windows of 16 tokens, the comparison has", {"context": 8}),
        ("llama.cpp windows of 16 tokens, the comparison has", {"windows": "documents"}),
        (f"has {chunks} chunks, the comparison", {"text": documents * 2}),
    ):
        options = {"text": documents, **arguments, **changed}
        found = pk.kld(here, [str(path)], options.pop("text"), **options)
        assert message in found.failed[0].error
    documents_plan = of_text(word_tokenizer, documents, kind="documents", context=CONTEXT)
    with pytest.raises(PrunekitError, match=r"these are documents: use llama\.cpp"):
        write(path, documents_plan, lambda index: rows[index], VOCABULARY)
    assert path.read_bytes() == whole
