"""Calibration tokens: sampled from the model, read from files, or given."""

from __future__ import annotations

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import torch

from prunekit.data import calibration, text_files
from prunekit.data.calibration import Calibration, batches, sequences, tokens
from prunekit.errors import PrunekitError
from prunekit.models import dropped as modeling


class Characters:
    """A tokenizer: one token per character, 2 = end of sequence."""

    eos_token_id = 2

    def __call__(self, documents, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return {"input_ids": [[ord(character) % 80 + 3 for character in d] for d in documents]}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_sampling_equals_uncached_inverse_transform_sampling(tiny, name):
    model = tiny(name)
    got = tokens(Calibration(samples=3, length=14, seed=5), model, progress=False)
    generator = torch.Generator().manual_seed(5)
    expected = torch.full((3, 1), model.config.bos_token_id)
    for _ in range(13):
        with torch.no_grad():
            probabilities = model(expected, use_cache=False).logits[:, -1].double().softmax(-1)
        draws = torch.rand(3, 1, dtype=torch.float64, generator=generator)
        below = (probabilities.cumsum(-1) <= draws).sum(-1, keepdim=True)
        expected = torch.cat([expected, below], dim=1)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)


def test_sampling_depends_on_the_seed_only(tiny):
    model = tiny("llama")
    first = tokens(Calibration(samples=2, length=10), model)
    torch.manual_seed(99)
    assert torch.equal(first, tokens(Calibration(samples=2, length=10), model))
    assert not torch.equal(first, tokens(Calibration(samples=2, length=10, seed=1), model))


def test_sampling_more_sequences_than_run_together(tiny, monkeypatch):
    monkeypatch.setattr(calibration, "_GENERATED_TOGETHER", 2)
    got = tokens(Calibration(samples=5, length=6), tiny("llama"))
    assert got.shape == (5, 6)
    assert len({tuple(row) for row in got.tolist()}) == 5


def test_sampling_from_a_model_with_dropped_sublayers(tiny):
    model = tiny("opt")
    modeling.drop_sublayers_(model, attn=[0, 2], mlp=[1])
    got = tokens(Calibration(samples=2, length=8, seed=3), model)
    with torch.no_grad():
        probabilities = model(got[:, :-1], use_cache=False).logits.softmax(-1)
    taken = probabilities.gather(-1, got[:, 1:, None])
    assert bool((taken > 0).all())


def test_sampling_starts_at_random_where_there_are_no_special_tokens(tiny):
    model = tiny("llama", bos_token_id=None, eos_token_id=None)
    got = tokens(Calibration(samples=16, length=2), model)
    assert len(set(got[:, 0].tolist())) > 5


def test_draws_follow_the_probabilities_and_never_what_is_impossible():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    logits = probabilities.log().repeat(20000, 1)
    drawn = calibration._sample(logits, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=6) / 20000
    assert frequency[[0, 2, 5]].tolist() == [0, 0, 0]
    torch.testing.assert_close(frequency, probabilities, rtol=0, atol=0.015)


def test_length_beyond_the_context(tiny):
    with pytest.raises(PrunekitError, match="length 65 exceeds the model's context of 64"):
        tokens(Calibration(samples=1, length=65), tiny("llama"))


@pytest.mark.parametrize("settings", [{"samples": 0}, {"length": 1}], ids=str)
def test_impossible_sizes(settings):
    with pytest.raises(PrunekitError, match="use samples >= 1 and length >= 2"):
        Calibration(**settings)


def rows_of(path):
    return {
        ".txt": lambda rows: path.write_text("\n".join(rows)),
        ".json": lambda rows: path.write_text(json.dumps([{"text": row} for row in rows])),
        ".jsonl": lambda rows: path.write_text("\n\n".join(json.dumps({"text": r}) for r in rows)),
        ".parquet": lambda rows: pyarrow.parquet.write_table(
            pyarrow.table({"text": rows, "other": [1] * len(rows)}), path
        ),
    }[path.suffix]


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_windows_of_every_format_are_disjoint_pieces_of_the_text(tiny, tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    rows = [f"{number:04d} is number {number}" for number in range(60)]
    rows_of(path)(rows)
    tokenizer, model = Characters(), tiny("llama")
    described = Calibration(source=path, samples=20, length=16, seed=1)
    got = tokens(described, model, tokenizer)
    assert got.shape == (20, 16) and got.dtype == torch.int64
    read = text_files.read(str(path), seed=1)
    assert sorted(read) == sorted(text_files.read_file(path))
    joined = "".join(
        chr(token) for ids in tokenizer(read, False, False)["input_ids"] for token in [*ids, 2]
    )
    starts = [joined.find("".join(map(chr, window.tolist()))) for window in got]
    assert min(starts) >= 0
    assert all(
        later - earlier >= 16
        for earlier, later in zip(*[sorted(starts)[i:] for i in (0, 1)], strict=False)
    )
    assert starts != sorted(starts), "windows are not in random order"
    assert torch.equal(got, tokens(described, model, tokenizer))
    other = Calibration(source=str(path), samples=20, length=16, seed=2)
    assert not torch.equal(got, tokens(other, model, tokenizer))


def test_a_huge_file_is_tokenized_only_as_far_as_needed(tiny, tmp_path):
    path = write(tmp_path, "big.json", json.dumps(["twelve chars"] * 5000))
    seen = []

    class Counting(Characters):
        def __call__(self, documents, *args, **kwargs):
            seen.extend(documents)
            return super().__call__(documents, *args, **kwargs)

    tokens(Calibration(source=path, samples=2, length=8), tiny("llama"), Counting())
    assert len(seen) <= 64


def test_text_field_is_chosen(tiny, tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"text": 3, "body": "abcdefgh"}))
    described = Calibration(source=path, samples=1, length=4, text_field="body")
    assert tokens(described, tiny("llama"), Characters()).shape == (1, 4)


def test_line_separators_inside_json_strings(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps("one\u2028two", ensure_ascii=False) + "\r\n")
    assert text_files.read_file(path) == ["one\u2028two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "'.*empty.txt' holds no text: give"),
        ("blank.jsonl", '""\n"  "\n', "holds no text"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', r"bad.jsonl' line 2 is no valid JSON"),
        ("field.jsonl", '{"text": "a"}\n\n{"body": "b"}', "line 3 has no field 'text'.*body"),
        ("number.jsonl", '{"text": 3}', "line 1 holds int where text is expected"),
        ("list.jsonl", "[1]", "line 1 holds list where text"),
        ("broken.json", '[\n"a",\n}', "line 3 is no valid JSON"),
        ("object.json", '{"text": "a"}', "holds a JSON dict: give a list"),
        ("item.json", '["a", {"body": "b"}]', "item 2 has no field 'text'"),
        ("fake.parquet", "hello", "is no readable parquet file"),
        ("latin.txt", None, "is not UTF-8 text .byte 1.: save it as UTF-8"),
        ("table.csv", "text\na", "table.csv' is no text source: give a .txt"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(b"a\xff" if content is None else content.encode())
    with pytest.raises(PrunekitError, match=message) as error:
        text_files.read(str(path))
    assert "\n" not in str(error.value)


def test_parquet_without_the_field_and_with_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None]}), path)
    with pytest.raises(PrunekitError, match="no field 'text': set text_field to one of body"):
        text_files.read(str(path))
    with pytest.raises(PrunekitError, match="row 2 holds NoneType"):
        text_files.read(str(path), text_field="body")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path, "a.parquet", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PrunekitError, match=r"-m pip install .*\[parquet\]"):
        text_files.read(path)


@pytest.mark.parametrize(
    ("samples", "length", "fix"),
    [
        (3, 8, "use samples <= 2, or length <= 7, or more text"),
        (12, 2, "use samples <= 11, or more text"),
        (1, 40, "use length <= 23, or more text"),
        (40, 40, "use more text"),
    ],
)
def test_too_few_tokens(tiny, tmp_path, samples, length, fix):
    path = write(tmp_path, "short.txt", "a" * 22)
    described = Calibration(source=path, samples=samples, length=length)
    with pytest.raises(PrunekitError, match="holds 23 tokens, and") as error:
        tokens(described, tiny("llama"), Characters())
    assert str(error.value).endswith(fix)


def test_a_file_needs_a_tokenizer(tiny, tmp_path):
    path = write(tmp_path, "a.txt", "abc")
    with pytest.raises(PrunekitError, match="needs the tokenizer"):
        tokens(Calibration(source=path), tiny("llama", max_position_embeddings=512))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("allenai/c4", True),
        ("allenai/c4:en", True),
        ("c4", False),
        ("missing/data.jsonl", False),
        ("data.txt", False),
        ("a/b/c", False),
        ("~/texts", False),
    ],
)
def test_what_counts_as_a_hub_id(source, expected):
    assert text_files.is_hub_id(source) is expected


def test_a_missing_file_in_an_existing_folder_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    for source in ("data/c4", "data/c4.jsonl", "gone.txt"):
        with pytest.raises(PrunekitError, match=r"no text source|does not exist: check the path"):
            text_files.read(source)


def test_hub_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PrunekitError, match=r"-m pip install .*\[datasets\]"):
        list(text_files.read("owner/name"))


def test_hub_dataset_is_streamed(tiny, monkeypatch):
    asked = []

    class Rows(list):
        def shuffle(self, seed, buffer_size):
            asked.append(seed)
            return Rows(reversed(self))

    def load_dataset(name, configuration, split, streaming):
        asked.append((name, configuration, split, streaming))
        return Rows({"body": f"document {index} of the set"} for index in range(9))

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    described = Calibration(source="owner/name:en", samples=2, length=10, seed=4, text_field="body")
    assert tokens(described, tiny("llama"), Characters()).shape == (2, 10)
    assert asked == [("owner/name", "en", "train", True), 4]
    with pytest.raises(PrunekitError, match=r"row 1 has no field 'text'.*body"):
        list(text_files.read("owner/name"))


def test_hub_failures_are_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(PrunekitError, match=r"can't be read \(no route\)") as error:
        list(text_files.read("owner/name"))
    assert "\n" not in str(error.value)


def test_given_sequences_are_passed_through(tiny, token_ids):
    model = tiny("llama")
    assert torch.equal(torch.stack(sequences(token_ids.int(), model)), token_ids)
    ragged = [token_ids[0], token_ids[1, :5]]
    got = sequences(ragged, model)
    assert all(map(torch.equal, got, ragged)) and got[0].dtype == torch.int64
    sampled = sequences(Calibration(samples=2, length=4), model)
    assert [tuple(sequence.shape) for sequence in sampled] == [(4,), (4,)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\): give \(samples, length\)"),
        (torch.zeros(0, 3, dtype=torch.int64), "no sequences"),
        ([], "no sequences"),
        (torch.zeros(1, 3), "sequence 0 is torch.float32"),
        ([torch.zeros(1, 3, dtype=torch.int64)], r"of shape \(1, 3\): give 1-D token ids"),
        (torch.zeros(1, 65, dtype=torch.int64), "has 65 tokens: give 1 to 64"),
        ([torch.zeros(0, dtype=torch.int64)], "has 0 tokens"),
        (torch.tensor([[3, 97]]), r"token id 97, .* has 97 rows .*: use the tokenizer"),
        (torch.tensor([[3, -1]]), "token id -1, "),
    ],
)
def test_unusable_tokens(tiny, given, message):
    with pytest.raises(PrunekitError, match=message):
        sequences(given, tiny("llama"))


def test_batches_hold_equal_lengths_and_every_sequence_once():
    ragged = [torch.full((length,), index) for index, length in enumerate([3, 5, 3, 3, 5, 1])]
    got = batches(ragged, 2, torch.device("cpu"))
    assert [tuple(batch.shape) for batch in got] == [(2, 3), (1, 3), (2, 5), (1, 1)]
    assert [batch[:, 0].tolist() for batch in got] == [[0, 2], [3], [1, 4], [5]]
    with pytest.raises(PrunekitError, match="batch_size 0"):
        batches(ragged, 0, torch.device("cpu"))


def test_by_default_a_cpu_runs_1024_tokens_together_and_an_accelerator_8_sequences():
    sequences = [torch.zeros(length) for length in (256,) * 9 + (700,) * 2 + (2048,)]
    found = {
        device: [tuple(batch.shape) for batch in batches(sequences, None, torch.device(device))]
        for device in ("cpu", "cuda")
    }
    assert found["cpu"] == [(4, 256), (4, 256), (1, 256), (1, 700), (1, 700), (1, 2048)]
    assert found["cuda"] == [(8, 256), (1, 256), (2, 700), (1, 2048)]
