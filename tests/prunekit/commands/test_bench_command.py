"""`prunekit bench`: rates that follow from times, every variant or the reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunekit import checkpoint, cli
from prunekit.commands import bench
from prunekit.errors import PrunekitError
from prunekit.packed.sizes import weight_bytes
from prunekit.report.charts import COLORS
from prunekit.speed import variants


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).eval()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    path = tmp_path_factory.mktemp("bench") / "model"
    checkpoint.save(model, PreTrainedTokenizerFast(tokenizer_object=words), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["bench", *words])
    found = capsys.readouterr()
    return status, found.out, found.err


SMALL = ("--prompt", "12", "--new", "4", "--rounds", "2", "--device", "cpu")


def test_json_has_every_variant_or_says_why_not(folder, capsys):
    status, out, _ = run(capsys, str(folder), *SMALL, "--batch", "1", "3", "--json")
    found = json.loads(out)
    assert status == 0 and found["cache"] == "dynamic"
    names = {row["variant"] for row in found["variants"]}
    assert names | set(found["absent"]) == set(variants.USUAL) and {"dense", "dropped"} <= names
    assert [r["batch"] for r in found["variants"] if r["variant"] == "dense"] == [1, 3]
    dense = {row["batch"]: row for row in found["variants"] if row["variant"] == "dense"}
    for row in found["variants"]:
        seconds = row["decode_ms"]["p50_ms"] / 1000
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch"] / seconds)
        assert row["decode_low"] <= row["decode_tokens_per_second"] <= row["decode_high"]
        reading = row["prefill_ms"]["p50_ms"] / 1000
        assert row["prefill_tokens_per_second"] == pytest.approx(12 * row["batch"] / reading)
        other = dense[row["batch"]]["decode_ms"]["p50_ms"]
        assert row["decode_speedup"] == pytest.approx(other / row["decode_ms"]["p50_ms"])
        assert row["logit_difference"] < 1e-3
    dropped = next(r for r in found["variants"] if r["variant"] == "dropped")
    assert dropped["what"] == "1 of 4 attentions dropped" and dropped["size"] < 1


def test_table_and_plot(folder, capsys, tmp_path):
    out = tmp_path / "out"
    words = (str(folder), *SMALL, "--variants", "dropped", "--output", str(out))
    status, text, _ = run(capsys, *words)
    assert status == 0 and "tokens/s" in text and "1 of 4 attentions dropped" in text
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "speed.png"]
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "bench.json").read_text())["variants"][0]["variant"] == "dense"
    assert run(capsys, *words)[0] == 2  # not silently replaced
    assert run(capsys, *words, "--overwrite")[0] == 0


def test_given_checkpoints_are_measured_as_they_are(folder, capsys, tmp_path):
    model, tokenizer = checkpoint.load(str(folder))
    made = variants.build(model, "dropped")
    places = [tmp_path / "a" / "dropped", tmp_path / "b" / "small", tmp_path / "c" / "small"]
    for place in places:
        checkpoint.save(made.model, tokenizer, place)
    out = tmp_path / "out"
    words = [str(folder), *map(str, places), *SMALL, "--variants", "dropped", "--json"]
    status, text, _ = run(capsys, *words, "--output", str(out))
    assert status == 0
    rows = {row["variant"]: row for row in json.loads(text)["variants"]}
    names = [f"{place} (given)" for place in places]  # one is a variant's name, two are the same
    assert list(rows) == ["dense", "dropped", *names]
    for name in names:
        assert rows[name]["what"] == "as given"
        assert rows[name]["weight_bytes"] == rows["dropped"]["weight_bytes"]
        assert rows[name]["decode_tokens_per_second"] > 0
    assert (out / "speed.png").is_file()
    status, text, err = run(capsys, str(folder), str(tmp_path / "nowhere"), *SMALL)
    assert status == 2 and text == "" and "nowhere" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--variants", "int4"), "'int4' is unknown: use dense, dropped, 2:4, bitmap, 2:4-int8, "),
        (("--cache", "graph"), "needs an NVIDIA GPU"),
        (("--prompt", "120", "--new", "20"), "exceed the model's context of 128"),
        (("--sparsity", "1.5"), "not between 0 and 1"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(folder, capsys, words, message):
    status, out, err = run(capsys, str(folder), *SMALL, *words)
    assert status == 2 and out == "" and message in err and err.count("\n") == 1


def test_every_variant_of_the_plot_has_a_colour_of_its_own():
    names = ["dense", "dropped", "2:4", "2:4-int8", "2:4-int4", "2:4-fp8", "a/copy", "another"]
    row = dict.fromkeys(("decode_tokens_per_second", "decode_low", "decode_high"), 1.0)
    row |= {"batch": 1, "prefill_tokens_per_second": 1.0, "weight_bytes": 1}
    found = dict.fromkeys(("cache", "device", "dtype", "prompt", "model"), "x")
    drawn = bench._figure({**found, "variants": [{**row, "variant": name} for name in names]})
    assert len(drawn.charts) == 3
    for chart in drawn.charts:
        assert [series.name for series in chart.series] == names
        assert len({COLORS[series.role] for series in chart.series}) == len(names)


@pytest.mark.parametrize(("threads", "words"), [(1, "cpu, 1 thread"), (2, "cpu, 2 threads")])
def test_the_device_is_named_in_words(threads, words, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert bench._device_name(torch.empty(1)) == words


def test_a_variant_with_wrong_logits_is_not_timed(folder, capsys, monkeypatch):
    build = variants.build

    def broken(model: object, name: str, **options: float) -> variants.Variant:
        made = build(model, name, **options)  # type: ignore[arg-type]
        return variants.Variant(name, made.model, made.what, 3.0 if name == "dropped" else 0.0)

    monkeypatch.setattr(variants, "build", broken)
    words = (str(folder), *SMALL, "--variants", "dropped", "--json")
    found = json.loads(run(capsys, *words)[1])
    assert [row["variant"] for row in found["variants"]] == ["dense"]
    assert "wrong logits" in found["absent"]["dropped"]


def test_rounded_formats_beside_16_bits(folder, capsys, tmp_path):
    names = ["dense", "2:4", "2:4-int8", "2:4-fp8", "2:4-int4"]
    words = ("--variants", *names[1:], "--dtype", "bfloat16", "--json")
    status, text, _ = run(capsys, str(folder), *SMALL, *words, "--output", str(tmp_path / "out"))
    found = json.loads(text)
    assert status == 0 and not found["absent"]
    rows = {row["variant"]: row for row in found["variants"]}
    assert list(rows) == names
    sizes = [rows[name]["weight_bytes"] for name in names]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] > sizes[4]
    for name in names[2:]:
        # against the rounded weights, whose logits are not those of the 16-bit ones
        assert rows[name]["logit_difference"] < 0.05
        assert "28 of 29 linear layers packed, values rounded to nearest; " in rows[name]["what"]
        assert "expand" in rows[name]["what"]
    assert "rounded" not in rows["2:4"]["what"]


def test_a_rounded_variant_is_judged_by_its_rounded_weights(folder, monkeypatch):
    model, _ = checkpoint.load(str(folder))
    good = variants.build(model, "2:4-int4")
    assert good.difference < 1e-3
    # as large as what rounding alone does to the logits
    prompts = variants.speed.random_prompts(model, 1, 16)
    unrounded = variants.build(model, "2:4")
    before, after = (variants._logits(v.model, prompts) for v in (unrounded, good))
    assert float((after - before).abs().max() / before.std()) > 0.1

    from prunekernels.sparse.two_four.quantized import linear

    product = linear.product
    monkeypatch.setattr(linear, "product", lambda *given: product(*given).roll(1, -1))
    assert variants.build(model, "2:4-int4").difference > variants.speed.TOLERANCE


def test_a_format_that_no_layer_fits_is_not_timed_as_dense(capsys, folder, monkeypatch):
    from prunekit import swap

    monkeypatch.setattr(swap, "_WORTHWHILE", 0.25)
    words = ("--variants", "2:4-int8", "--json")
    found = json.loads(run(capsys, str(folder), *SMALL, *words, "--dtype", "bfloat16")[1])
    assert [row["variant"] for row in found["variants"]] == ["dense"]
    why = found["absent"]["2:4-int8"]
    assert "no layer was packed (hardly smaller as 2:4-int8" in why and "--variants" in why


def test_building_variants_leaves_the_dense_model_alone(folder):
    model, _ = checkpoint.load(str(folder))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = weight_bytes(model)
    for name in variants.VARIANTS:
        made = variants.build(model, name)
        assert (made.model is model) == (name == "dense")
        assert weight_bytes(made.model) <= size
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(PrunekitError, match="unknown"):
        variants.build(model, "quantised")
