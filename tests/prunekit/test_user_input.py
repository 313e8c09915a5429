"""The edges of what users give: ids, texts, chat templates, encodings, types and objects.

Each is refused with a PrunekitError that names the fix, or read right; none is an error from inside
of torch, tokenizers or jinja.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import prunekit as pk
from prunekit import PrunekitError, cli
from prunekit.data.text_files import read_file
from prunekit.divergence.two_models import kl_report
from prunekit.evaluation.items import Choice, load_choices, load_prompts
from prunekit.evaluation.likelihood import option_logliks, perplexity
from prunekit.files.texts import clean
from prunekit.models.generation import encode, generate

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
QUIET = {"progress": False}


def known_but_not_embedded():
    """A tokenizer with one token more than the model's embedding has rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer, len(tokenizer) - 1


def test_token_ids_that_the_embedding_lacks_are_named(tmp_path):
    tokenizer, rows = known_but_not_embedded()
    model, text = tiny_model(vocabulary=rows), "hi <|end|> you"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for _ in range(99)))
    question = Choice("1", text, ("one", "two"), 0)
    for run in (
        lambda: perplexity(model, tokenizer, text),
        lambda: option_logliks(model, tokenizer, [question], **QUIET),
        lambda: option_logliks(model, tokenizer, [question], share_context=False, **QUIET),
        lambda: pk.compare(model, model, [text], tokenizer=tokenizer, **QUIET),
        lambda: pk.drop_(
            model, pk.Drop("attn", 1), pk.Calibration(path, 2, 16), tokenizer=tokenizer, **QUIET
        ),
        lambda: generate(model, encode(tokenizer, [text]), max_new_tokens=1),
        lambda: pk.prune_(model, pk.Wanda(0.5), IDS + rows, **QUIET),
    ):
        with pytest.raises(PrunekitError, match=rf"token id \d+, .* {rows} rows .* use the token"):
            run()


@pytest.mark.parametrize("wrong", [-1, 264, [2, 999]])
def test_special_tokens_that_do_not_exist_are_named(wrong):
    model = tiny_model()
    model.config.bos_token_id = wrong if isinstance(wrong, int) else wrong[1]
    with pytest.raises(PrunekitError, match=r"bos_token_id is .*264 rows.*config\.json"):
        pk.prune_(model, pk.Wanda(0.5), pk.Calibration(samples=2, length=8), **QUIET)
    model.generation_config.eos_token_id = wrong
    with pytest.raises(PrunekitError, match=r"eos_token_id is .*264 rows.*config\.json"):
        generate(model, [[5, 6]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("é 语 😀", "é 语 😀"),
        ("a\ud83db", "a\ufffdb"),
        ("a\udc00", "a\ufffd"),
        ("\ud83d\ude00!", "😀!"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
    ],
)
def test_half_surrogates_are_replaced_and_pairs_joined(text, expected):
    assert clean(text) == expected
    tokenizer = tiny_tokenizer()
    assert encode(tokenizer, [f"x{text}"]) == encode(tokenizer, [f"x{expected}"])


def test_half_surrogates_in_files_are_replaced(tmp_path):
    half, fine = r"broken \ud83d emoji", "broken \ufffd emoji"
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "{half}", "prompt": "{half}"}}')
    assert read_file(path) == [fine]
    assert load_prompts(path)[0].prompt == fine
    path.write_text(f'{{"question": "{half}", "options": ["{half}", "b"], "answer": 0}}')
    question = load_choices(path)[0]
    assert (question.question, question.options[0]) == (fine, fine)
    scores = option_logliks(tiny_model(), tiny_tokenizer(), [question], **QUIET)
    assert torch.tensor(scores.logliks).isfinite().all()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("some text".encode("utf-16"), "begins as UTF-16"),
        ("some text".encode("utf-16-le"), "NUL"),
        ("some text".encode("utf-16-be"), "NUL"),
        ("déjà vu".encode("latin-1"), "byte 1"),
        ("日本".encode("shift-jis"), "byte 0"),
    ],
)
def test_files_in_other_encodings_are_named(tmp_path, content, what):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    for read in (read_file, load_prompts):
        with pytest.raises(PrunekitError, match=f"words.txt.*{what}.*save it as UTF-8"):
            read(path)


NAMED = {"tool_use": "{{ messages[0].content }}", "rag": "{{ messages[0].content }}"}
TEMPLATES = {
    "named": (NAMED, "templates: tool_use, rag"),
    "does not compile": ("{% for m in messages %}", "chat='never'"),
    "wants a system turn": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}",
        "system first",
    ),
    "adds nothing to text": ("{{ missing + messages[0].content }}", "missing"),
    "wants parts": ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}!", "out"),
    "forgets the user": ("Hello, how can I help?", "leaves out"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_that_cannot_be_applied_are_refused(name):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, said = TEMPLATES[name]
    for run in (
        lambda: encode(tokenizer, ["Count to three."]),
        lambda: pk.compare(tiny_model(), tiny_model(), ["a"], tokenizer=tokenizer, **QUIET),
    ):
        with pytest.raises(PrunekitError, match=f"chat template.*{said}"):
            run()
    assert encode(tokenizer, ["hi"], chat="never") == [tokenizer("hi")["input_ids"]]


def test_a_template_may_change_the_text_and_a_default_is_chosen():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {**NAMED, "default": "<{{ messages[0].content | upper }}>"}
    (ids,) = encode(tokenizer, ["hi"])
    assert tokenizer.decode(ids) == "<HI>"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bool", "complex64", "uint8"])
def test_types_that_do_not_compute_are_refused(dtype, tmp_path):
    folder = pk.save(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(PrunekitError, match=r"not compute in dtype.*use float32, bfloat16"):
        pk.load(folder, dtype=dtype)
    with pytest.raises(PrunekitError, match=r"not compute in dtype.*use float32, bfloat16"):
        pk.load(folder, dtype=getattr(torch, dtype))


def test_a_model_or_checkpoint_in_float8_is_refused(tmp_path):
    model = tiny_model().to(torch.float8_e4m3fn)
    for run in (
        lambda: pk.prune_(model, pk.Magnitude(0.5), **QUIET),
        lambda: pk.swap_(model),
        lambda: pk.compare(model, model, ["a"], tokenizer=tiny_tokenizer(), **QUIET),
    ):
        with pytest.raises(PrunekitError, match=r"float8_e4m3fn, in which .* use float32"):
            run()
    folder = pk.save(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float8_e4m3fn"}))
    with pytest.raises(PrunekitError, match=r"float8_e4m3fn.*use float32"):
        pk.load(folder)
    assert pk.load(folder, dtype="float32")[0].dtype == torch.float32


def test_the_metrics_say_that_they_do_not_read_float64():
    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    for run in (
        lambda: pk.compare(model, model, ["a"], tokenizer=tokenizer, **QUIET),
        lambda: kl_report(model, model, tokenizer, "some text", **QUIET),
    ):
        with pytest.raises(PrunekitError, match=r"float64: use model\.float"):
            run()


@pytest.mark.parametrize("wrong", ["one text", [5], [None], [b"bytes"]])
def test_what_is_no_list_of_texts_or_tokens_is_named(wrong):
    with pytest.raises(PrunekitError, match="not a list of texts"):
        pk.compare(tiny_model(), tiny_model(), wrong, tokenizer=tiny_tokenizer(), **QUIET)
    with pytest.raises(PrunekitError, match=r"no token tensors.*Calibration"):
        pk.prune_(tiny_model(), pk.Wanda(0.5), wrong, **QUIET)


def without_special_tokens():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġ{letter}" for letter in "ABCD")]
    merges = [("Ġ", letter) for letter in "ABCD"]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_tokenizer_without_special_tokens_does(tmp_path):
    tokenizer, model = without_special_tokens(), tiny_model()
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, field, None)
        setattr(model.generation_config, field, None)
    path = tmp_path / "words.txt"
    path.write_text("some words to read " * 20)
    pk.prune_(model, pk.Wanda(0.5), pk.Calibration(path, 2, 16), tokenizer=tokenizer, **QUIET)
    questions = [Choice("1", "Which?", ("one", "two"), 0)]
    options = {"choices": questions, "max_new_tokens": 2, "layerwise_steps": 1}
    study = pk.compare(model, model, ["hi", "longer"], tokenizer=tokenizer, **options, **QUIET)
    assert [g.first_divergence for g in study.decoding.generations] == [None, None]


class Wrapper(nn.Module):
    """Holds a model in an attribute, as the wrappers of trainers and adapters do."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        setattr(self, attribute, tiny_model())
        self.config = getattr(self, attribute).config


class Adapted(Wrapper):
    """As a model of PEFT."""

    def merge_and_unload(self) -> nn.Module:
        return self.base_model


def encoder_decoder():
    sizes = {"vocab_size": 264, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, num_heads=2))


OBJECTS = {
    "base model": (lambda: AutoModel.from_config(tiny_model().config), "load it"),
    "DataParallel": (lambda: nn.DataParallel(tiny_model()), "model.module"),
    "adapters": (lambda: Adapted("base_model"), "merge_and_unload"),
    "value head": (lambda: Wrapper("pretrained_model"), "model.pretrained_model"),
    "compiled": (lambda: torch.compile(tiny_model()), "model._orig_mod"),
    "encoder-decoder": (encoder_decoder, "'t5' is not supported"),
    "a pipeline": (lambda: SimpleNamespace(model=tiny_model()), r"\.model"),
    "a name": (lambda: "demo", "load it first"),
    "a path": (lambda: Path("out/model"), "load it first"),
    "what load returns": (lambda: (tiny_model(), tiny_tokenizer()), "two things"),
    "nothing": (lambda: None, "NoneType is no transformers"),
    "a linear layer": (lambda: nn.Linear(2, 2), "Linear is no transformers"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_that_are_no_causal_model_are_named(name, tmp_path):
    make, fix = OBJECTS[name]
    wrong, tokenizer = make(), tiny_tokenizer()
    for run in (
        lambda: pk.prune_(wrong, pk.Magnitude(0.5), **QUIET),
        lambda: pk.drop_(wrong, pk.Drop("attn", 1), IDS, **QUIET),
        lambda: pk.swap_(wrong),
        lambda: pk.compare(tiny_model(), wrong, ["a"], tokenizer=tokenizer, **QUIET),
        lambda: pk.save(wrong, tokenizer, tmp_path / "out"),
    ):
        with pytest.raises(PrunekitError, match=fix):
            run()
    assert not (tmp_path / "out").exists()


def test_a_classifier_cannot_be_compared_or_saved(tmp_path):
    wrong = AutoModelForSequenceClassification.from_config(tiny_model().config).eval()
    with pytest.raises(PrunekitError, match="load it as LlamaForCausalLM"):
        pk.save(wrong, tiny_tokenizer(), tmp_path / "out")
    with pytest.raises(PrunekitError, match="no output head"):
        pk.compare(tiny_model(), wrong, ["a"], tokenizer=tiny_tokenizer(), **QUIET)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (None, "tokenizer"),
        ("demo", "from_pretrained"),
        (tiny_tokenizer().backend_tokenizer, "PreTrainedTokenizerFast"),
    ],
)
def test_what_is_no_tokenizer_is_named(wrong, fix, tmp_path):
    with pytest.raises(PrunekitError, match=fix):
        pk.compare(tiny_model(), tiny_model(), ["a"], tokenizer=wrong, **QUIET)
    with pytest.raises(PrunekitError, match="pass a transformers tokenizer"):
        pk.save(tiny_model(), wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_fails_on_a_text_is_named():
    words = Tokenizer(models.WordLevel({"only": 0, "these": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(PrunekitError, match=r"can't encode the text .*use the tokenizer"):
        perplexity(tiny_model(), tokenizer, "other words")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_any_output_encoding_shows_what_it_can(encoding, tmp_path, monkeypatch):
    folder = pk.save(tiny_model(), tiny_tokenizer(), tmp_path / "mødel-语")
    for words in (["--help"], ["inspect", str(folder)], ["inspect", str(folder), "--json"]):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        try:
            status = cli.main(words)
        finally:
            monkeypatch.undo()
        out.flush()
        err.flush()
        assert (status, err.buffer.getvalue()) == (0, b"")
        written = out.buffer.getvalue().decode(encoding)
        assert len(written) > 100
        if "--json" in words:  # nothing is replaced in data
            assert "mødel-语" in json.dumps(json.loads(written), ensure_ascii=False)


def test_an_error_with_a_name_that_the_terminal_lacks_is_one_line(monkeypatch):
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", err)
    status = cli.main(["inspect", "./语/\udcff"])
    monkeypatch.undo()
    err.flush()
    line = err.buffer.getvalue().decode("ascii")
    assert status == 2 and line.count("\n") == 1 and "doesn't exist" in line


def test_an_operation_that_a_device_lacks_is_bad_input():
    status, line = cli.explain(RuntimeError("\"addmm\" not implemented for 'Half'"))
    assert status == 2 and "--dtype float32" in line
