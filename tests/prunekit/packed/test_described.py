"""Packed checkpoints: exact, small, never dense on the way, and damage is named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from former_bitmaps import version_2
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

import prunekit as pk
from prunekit import packed
from prunekit.checkpoint import former_layouts
from prunekit.errors import PrunekitError
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.packed import FORMATS
from prunekit.packed.modules import PackedLinear, packed_layers
from prunekit.swap import merge_

FORMER = former_layouts.FORMER_LAYOUTS


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    return Fast(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>")))


@pytest.fixture
def saved(tiny_24, tokenizer, tmp_path):
    """A packed tiny Llama in a folder."""
    model = tiny_24("llama")
    pk.swap_(model)
    return pk.save(model, tokenizer, tmp_path / "saved")


@torch.inference_mode()
def logits(model, token_ids):
    return model(token_ids).logits


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, **changes) -> None:
    """Change tensors (None removes one) and drop the manifest that would notice."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    (folder / "prunekit.json").unlink()


def test_packed_models_come_back_exactly(tiny_24, tokenizer, architecture, tmp_path, token_ids):
    model = tiny_24(architecture)
    dense_size = sum(tensor.nbytes for tensor in model.state_dict().values())
    report = pk.swap_(model)
    want, state = logits(model, token_ids), model.state_dict()
    folder = pk.save(model, tokenizer, tmp_path / "one")
    formats = {module.format for module in report.swapped}
    assert json.loads((folder / "prunekit.json").read_text())["packed"] == sorted(formats)
    assert "2:4" in formats
    saved = dense_size - (folder / "model.safetensors").stat().st_size
    assert saved > 0.9 * (report.dense_bytes - report.bytes) - 20_000
    loaded, _ = pk.load(folder)
    assert type(loaded) is type(model) and loaded.config.model_type == model.config.model_type
    assert torch.equal(logits(loaded, token_ids), want)
    again = loaded.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    # and once more, from what was loaded
    twice, _ = pk.load(pk.save(loaded, tokenizer, tmp_path / "two"))
    assert torch.equal(logits(twice, token_ids), want)
    auto = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(auto.eval(), token_ids), want, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(m, PackedLinear) for m in auto.modules()) == len(report.swapped)


def test_loading_runs_the_self_tests_before_anything_is_captured(saved, monkeypatch):
    asked, real = [], FORMATS["2:4"].expected

    def expected(weight, tokens):
        asked.append((tokens, weight.device.type))
        return real(weight, tokens)

    monkeypatch.setattr(FORMATS["2:4"], "expected", expected)
    pk.load(saved, device="cpu")
    assert asked == [(1, "cpu")]


def test_packed_models_are_saved_by_every_way(saved, tmp_path, token_ids):
    loaded, _ = pk.load(saved)
    auto = AutoModelForCausalLM.from_pretrained(saved).eval()
    want = logits(auto, token_ids)
    for model in (loaded, auto):
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(logits(again, token_ids), want)
        assert again.state_dict().keys() == auto.state_dict().keys()


@pytest.mark.parametrize("format", ["dense", "zeroed", *FORMER])
@pytest.mark.parametrize("swapped", [True, False])
def test_other_formats_hold_the_same_model(
    tiny_24, tokenizer, tmp_path, token_ids, format, swapped
):
    model = tiny_24("qwen2")
    want = logits(model, token_ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if swapped:
        pk.swap_(model)
    loaded, _ = pk.load(pk.save(model, tokenizer, tmp_path / "saved", format=format))
    packed_again = format in FORMER
    assert bool(list(packed_layers(loaded))) == packed_again
    assert torch.allclose(logits(loaded, token_ids), want, rtol=1e-5, atol=1e-5)
    pk.unswap_(loaded)
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)


def test_former_layouts_as_the_library_wrote_them(tiny_24, tokenizer, tmp_path):
    weight = torch.zeros(2, 12)
    weight[0, [1, 2, 7]] = torch.tensor([1.5, -2.0, 3.0])
    weight[1, [0, 9, 11]] = torch.tensor([4.0, 5.0, -6.0])
    wide = weight.repeat(1, 4)
    bits = [[0b10000110, 0b00000000], [0b00000001, 0b00001010]]
    found = former_layouts._compress(wide, "sparse-bitmask")
    assert found["compressed"].tolist() == [1.5, -2.0, 3.0] * 4 + [4.0, 5.0, -6.0] * 4
    assert found["row_offsets"].tolist() == [0, 12] and found["shape"].tolist() == [2, 48]
    first = former_layouts._compress(weight.repeat(8, 1), "sparse-bitmask")["bitmask"]
    assert first[:2].tolist() == bits
    found = former_layouts._compress(wide.repeat(2, 1), "sparse-24-bitmask")
    assert found["compressed"].shape == (4, 24) and found["shape"].tolist() == [[4], [48]]
    assert found["bitmask"].shape == (4, 6) and found["bitmask"].dtype == torch.uint8
    kept = [bin(byte).count("1") for byte in found["bitmask"].flatten().tolist()]
    assert kept == [4] * 24
    model = tiny_24("llama")
    folder = pk.save(model, tokenizer, tmp_path / "ct", format="sparse-24-bitmask")
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert listed["quant_method"] == "compressed-tensors"
    assert listed["sparsity_config"]["sparsity_structure"] == "2:4"
    assert "lm_head" in listed["sparsity_config"]["ignore"]
    assert 0.49 < listed["sparsity_config"]["global_sparsity"] < 0.51
    names = load_file(folder / "model.safetensors")
    assert "model.layers.0.mlp.down_proj.compressed" in names
    assert "model.layers.0.mlp.down_proj.weight" not in names


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 90),
    seed=st.integers(0, 2**31),
    density=st.sampled_from([0.0, 0.1, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_former_layouts_round_trip(rows, columns, seed, density, dtype):
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=random)
    dense = (dense * (torch.rand(rows, columns, generator=random) < density)).to(dtype)
    for layout in FORMER:
        parts = former_layouts._compress(dense, layout)
        if parts is not None:
            assert torch.equal(former_layouts._decompress("w", parts), dense)


def test_dropped_and_packed_together(tiny_24, tokenizer, tmp_path, token_ids):
    model = tiny_24("qwen3")
    drop_blocks_(model, [1])
    drop_sublayers_(model, attn=[1], mlp=[0])
    pk.swap_(model)
    want = logits(model, token_ids)
    loaded, _ = pk.load(pk.save(model, tokenizer, tmp_path / "saved"))
    assert torch.equal(logits(loaded, token_ids), want)
    assert loaded.config.drop_attn_list == [1] and loaded.config.drop_mlp_list == [0]
    assert loaded.generate(token_ids[:1], max_new_tokens=4).shape == (1, 16)
    zeroed, _ = pk.load(pk.save(model, tokenizer, tmp_path / "zeroed", format="zeroed"))
    assert torch.allclose(logits(zeroed, token_ids), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_bitmaps_come_back_exactly(tiny, tokenizer, tmp_path, token_ids, name):
    model = tiny(name, hidden_size=64)
    pk.prune_(model, pk.Magnitude(sparsity=0.7))
    pk.swap_(model)
    want = logits(model, token_ids)
    folder = pk.save(model, tokenizer, tmp_path / "saved")
    assert "bitmap" in json.loads((folder / "prunekit.json").read_text())["packed"]
    loaded, _ = pk.load(folder)
    assert torch.equal(logits(loaded, token_ids), want)
    named = next(n for n, layer in packed_layers(loaded) if layer.format == "bitmap")
    starts = load_file(folder / "model.safetensors")[f"{named}.starts"]
    starts[1] += 1
    edit_weights(folder, **{f"{named}.starts": starts})
    with pytest.raises(PrunekitError, match=f"{named} is no valid packed weight"):
        pk.load(folder)


def test_bitmaps_of_version_2_are_converted(tiny, tokenizer, tmp_path, token_ids):
    model = tiny("llama", hidden_size=64)
    pk.prune_(model, pk.Magnitude(sparsity=0.7))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    pk.swap_(model)
    want = logits(model, token_ids)
    folder = pk.save(model, tokenizer, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    changes = {}
    for name, described in config["packed_layers"]["modules"].items():
        if described["format"] == "bitmap":
            former = version_2(weights[f"{name}.weight"])
            changes |= {f"{name}.{part}": None for part in described["tensors"]}
            changes |= {f"{name}.{part}": tensor for part, tensor in former.items()}
            described["tensors"] = {
                part: [str(tensor.dtype).removeprefix("torch."), *tensor.shape]
                for part, tensor in former.items()
            }
    assert changes
    edit_weights(folder, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    loaded, _ = pk.load(folder)
    assert torch.equal(logits(loaded, token_ids), want)
    state, now = loaded.state_dict(), model.state_dict()
    assert set(state) == set(now)
    assert all(torch.equal(state[name], tensor) for name, tensor in now.items())
    # what is written is version 3
    again, _ = pk.load(pk.save(loaded, tokenizer, tmp_path / "again"))
    assert torch.equal(logits(again, token_ids), want)


def test_spread_over_devices_and_offloaded(saved, token_ids, tmp_path):
    whole, _ = pk.load(saved)
    want = logits(whole, token_ids)
    spread, _ = pk.load(saved, device="auto")
    assert torch.equal(logits(spread, token_ids), want)
    offloaded = cpu_offload(
        AutoModelForCausalLM.from_pretrained(saved).eval(), offload_buffers=True
    )
    assert {layer.weight.device.type for _, layer in packed_layers(offloaded)} == {"meta"}
    assert merge_(offloaded) == {}
    assert torch.allclose(logits(offloaded, token_ids), want, rtol=1e-5, atol=1e-5)


def test_loading_in_another_type(saved):
    loaded, _ = pk.load(saved, dtype="bfloat16")
    exact, _ = pk.load(saved)
    assert {layer.weight.dtype for _, layer in packed_layers(loaded)} == {torch.bfloat16}
    pk.unswap_(loaded)
    pk.unswap_(exact)
    state = loaded.state_dict()
    for name, tensor in exact.state_dict().items():
        assert torch.equal(state[name], tensor.to(torch.bfloat16)), name


def _damage_header(position: int, value: int):
    def damage(folder: Path) -> None:
        name = "model.layers.1.mlp.down_proj.header"
        header = load_file(folder / "model.safetensors")[name]
        header[position] = value
        edit_weights(folder, **{name: header})

    return damage


def _damage_field(**changes):
    def damage(folder: Path) -> None:
        def change(config):
            modules = config["packed_layers"]["modules"]
            modules["model.layers.1.mlp.down_proj"].update(changes)

        edit_json(folder / "config.json", change)

    return damage


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _truncate_without_manifest(folder: Path) -> None:
    _truncate(folder)
    (folder / "prunekit.json").unlink()


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def _version(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["packed_layers"].update(version=2))


def _list_another(name: str):
    def damage(folder: Path) -> None:
        def change(config):
            modules = config["packed_layers"]["modules"]
            modules[name] = modules["model.layers.0.mlp.down_proj"]

        edit_json(folder / "config.json", change)

    return damage


DAMAGES = {
    "truncated": (_truncate, r"has \d+ bytes instead of \d+"),
    "truncated, no manifest": (_truncate_without_manifest, "truncated"),
    "checksum": (_flip, "its checksum differs"),
    "version of the checkpoint": (_version, "version 2 is unknown"),
    "no field": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(packed_layers=[1])),
        "packed_layers in config.json is not valid",
    ),
    "version of the format": (_damage_header(0, 9), r"layers\.1\.mlp\.down_proj.*version 9"),
    "header of another shape": (_damage_header(2, 64), r"layers\.1\.mlp\.down_proj.*int32 buffer"),
    "header of another type": (_damage_header(3, 0), r"layers\.1\.mlp\.down_proj.*bfloat16"),
    "tensor of another shape": (
        lambda f: edit_weights(
            f, **{"model.layers.1.mlp.down_proj.packed": torch.zeros(4, 8, dtype=torch.int32)}
        ),
        r"model\.layers\.1\.mlp\.down_proj\.packed has shape \(4, 8\)",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, **{"model.layers.1.mlp.down_proj.packed": None}),
        r"model\.layers\.1\.mlp\.down_proj\.packed is missing",
    ),
    "other shape": (_damage_field(shape=[64, 64]), r"\(64, 64\).*implies \(64, 128\)"),
    "unknown format": (_damage_field(format="3:7"), "packed as '3:7'.*upgrade prunekit"),
    "nonsense": (_damage_field(tensors={"packed": ["int33", 2]}), "can't be read.*int33"),
    "unknown layer": (_list_another("model.layers.9.mlp.down_proj"), "which the model has not"),
    "no linear layer": (_list_another("model.norm"), "which is a LlamaRMSNorm"),
    "hidden size": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(intermediate_size=256)),
        r"\(64, 128\), config.json implies \(64, 256\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(saved, damage):
    damaging, message = DAMAGES[damage]
    damaging(saved)
    with pytest.raises(PrunekitError, match=message) as caught:
        pk.load(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_former_layouts_are_named(tiny_24, tokenizer, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    damages = [
        ({f"{name}.bitmask": None}, "bitmask is missing"),
        ({f"{name}.compressed": torch.zeros(3)}, "bits are set for 3 values"),
        ({f"{name}.shape": torch.tensor([64, 64])}, "does not fit the shape"),
        ({f"{name}.compressed": torch.zeros(64, 64).to(torch.float8_e4m3fn)}, "float8"),
        ({f"{name}s.bitmask": torch.zeros(1)}, "is missing"),
    ]
    for number, (changes, message) in enumerate(damages):
        folder = tmp_path / str(number)
        pk.save(tiny_24("llama"), tokenizer, folder, format="sparse-24-bitmask")
        edit_weights(folder, **changes)
        with pytest.raises(PrunekitError, match=message):
            pk.load(folder)

    def quantise(config):
        config["quantization_config"]["config_groups"] = {"group_0": {}}

    edit_json(folder / "config.json", quantise)
    with pytest.raises(PrunekitError, match="is quantised"):
        pk.load(folder)


def test_a_failed_save_changes_nothing(saved, tiny_24, tokenizer, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = tiny_24("llama")
    pk.swap_(model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PrunekitError, match="No space left"):
        pk.save(model, tokenizer, saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert not hasattr(model.config, "packed_layers")


MEASURE = """
import sys, threading, time, torch
import prunekit as pk

def resident():
    rows = [line.split() for line in open("/proc/self/status")]
    return sum(int(row[1]) for row in rows if row[0] in ("RssAnon:", "RssFile:")) * 1024

def peak_of(folder):
    start = peak = resident()
    done = threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident())
    thread = threading.Thread(target=watch)
    thread.start()
    model, _ = pk.load(folder)
    with torch.inference_mode():
        model(torch.arange(4)[None])
    done.set()
    thread.join()
    return max(peak, resident()) - start

warm, folder = sys.argv[1:]
peak_of(warm)
print(peak_of(folder))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_and_running_never_holds_a_dense_copy(saved, tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    pk.prune_(model, pk.Magnitude(pattern="2:4"))
    dense = pk.save(model, tokenizer, tmp_path / "dense")
    report = pk.swap_(model)
    folder = pk.save(model, tokenizer, tmp_path / "packed")
    file = (folder / "model.safetensors").stat().st_size
    assert file <= 0.6 * report.dense_bytes

    def peak(measured):
        # a process of its own: what another model left in the heap would be used again, unseen
        command = [sys.executable, "-c", MEASURE, str(saved), str(measured)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    packed_peak, dense_peak = peak(folder), peak(dense)
    print(f"peak: packed {packed_peak / 1e6:.0f} MB, dense {dense_peak / 1e6:.0f} MB")
    # the measurement sees dense weights where there are any
    assert dense_peak > 0.9 * report.dense_bytes
    # the packed weights, q/k/v a second time while they are merged, one layer expanded
    assert packed_peak < 0.85 * report.dense_bytes


@pytest.mark.slow
def test_the_embedded_model(tmp_path):
    model, tokenizer = pk.load("demo")
    pk.prune_(
        model,
        pk.Wanda(pattern="2:4"),
        pk.Calibration(samples=4, length=32),
        tokenizer=tokenizer,
    )
    text = "The capital of France is Paris, and the largest city of Germany is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    want, dense = logits(model, ids), copy.deepcopy(model)
    before = packed.weight_bytes(model)
    report = pk.swap_(model)
    assert len(report.swapped) == 210
    assert report.bytes <= 0.6 * report.dense_bytes
    assert before - packed.weight_bytes(model) == report.dense_bytes - report.bytes
    assert (logits(model, ids) - want).abs().max() <= 1e-4
    folder = pk.save(model, tokenizer, tmp_path / "saved")
    file = (folder / "model.safetensors").stat().st_size
    others = before - report.dense_bytes
    assert file - others <= 0.6 * report.dense_bytes
    loaded, _ = pk.load(folder)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    dense.to(torch.bfloat16)
    loaded.to(torch.bfloat16)
    got, eager = logits(loaded, ids).double(), logits(dense, ids).double()
    exact = logits(dense.double(), ids)
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max()
