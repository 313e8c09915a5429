"""Saving and loading: bit-equal in every format, whole or not at all, and damage is named."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from prunekernels import BitmapSparse, Sparse24
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import prunekit as pk
from prunekit import checkpoint
from prunekit.checkpoint import sources
from prunekit.errors import PrunekitError
from prunekit.files import atomic
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_blocks_, drop_sublayers_

WORDS = "the cat sat on 2 mats"
MERGES = [("a", "t"), ("c", "at"), ("Ġ", "cat")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<pad>", "<s>", "</s>", *letters, "at", "cat", "Ġcat"]
    bpe = models.BPE({token: i for i, token in enumerate(vocabulary)}, MERGES)
    bytewise = Tokenizer(bpe)
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, **special)


@pytest.fixture
def saved(tiny, tokenizer, tmp_path):
    """A tiny dense Llama in a folder."""
    return checkpoint.save(tiny("llama"), tokenizer, tmp_path / "saved")


@torch.inference_mode()
def logits(model, token_ids):
    return model(token_ids).logits


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_weights(folder: Path, **changes) -> None:
    """Change tensors (None removes one) and drop the manifest that would notice."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "prunekit.json").unlink()


@pytest.mark.parametrize("case", ["masked", "blocks", "sublayers", "zeroed"])
def test_saved_models_load_bit_equal(architecture, case, tiny, tokenizer, token_ids, tmp_path):
    model = tiny(architecture)
    stock = type(model)
    if case == "masked":
        for ref in Architecture(model).weights(1):
            ref.matrix.masked_fill_(torch.rand(ref.matrix.shape) < 0.5, 0)
    elif case == "blocks":
        drop_blocks_(model, [1])
    else:
        drop_sublayers_(model, attn=[0, 3], mlp=[1, 2])
    zeroed = {"format": "zeroed"} if case == "zeroed" else {}
    checkpoint.save(model, tokenizer, tmp_path / "out", **zeroed)
    loaded, words = checkpoint.load(tmp_path / "out")
    assert type(loaded) is (stock if case != "sublayers" else type(model))
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    assert words(WORDS).input_ids == tokenizer(WORDS).input_ids
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    if case == "sublayers":
        assert set(loaded.state_dict()) == set(model.state_dict())
    if case == "zeroed":
        assert not any(tensor.any() for tensor in Architecture(loaded).last_projection(0, "attn"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_embeddings_and_dtype_are_kept(name, tiny, tokenizer, token_ids, tmp_path):
    model = tiny(name, tie_word_embeddings=True, num_hidden_layers=6)
    for parameter in model.parameters():  # unlike model.to, which rounds rotary frequencies as well
        parameter.data = parameter.data.bfloat16()
    for format in checkpoint.SAVE_FORMATS:
        drop_sublayers_(model, attn=[len(getattr(model.config, "drop_attn_list", []))])
        folder = checkpoint.save(model, tokenizer, tmp_path / format, format=format)
        loaded, _ = checkpoint.load(folder)
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert head.weight.data_ptr() == embedding.weight.data_ptr()
        assert loaded.dtype is torch.bfloat16
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


def test_dtype_and_device_on_request(saved):
    assert checkpoint.load(saved, dtype="float16", device="cpu")[0].dtype is torch.float16
    assert checkpoint.load(saved, dtype=torch.bfloat16)[0].dtype is torch.bfloat16
    with pytest.raises(PrunekitError, match="do not compute in dtype 'int8': use float32"):
        checkpoint.load(saved, dtype="int8")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(PrunekitError, match=f"device {device} can't be used"):
            checkpoint.load(saved, device=device)


_WITHOUT_PRUNEKIT = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor([[5, 9, 4, 7, 11, 3, 8, 10]])
results = {}
with torch.inference_mode():
    for name in ("llama", "gemma2"):
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")
        results[name] = model(ids).logits
    assert not any(module.startswith("prunekit") for module in sys.modules)
    try:
        AutoModelForCausalLM.from_pretrained(f"{folder}/sublayers")
    except ValueError as error:
        assert "prunekit_llama" in str(error), error
    else:
        raise AssertionError("loaded without prunekit")
    import prunekit
    imported = [module for module in sys.modules if module.endswith("modeling_qwen3_moe")]
    assert not imported, "importing prunekit imports every architecture"
    results["sublayers"] = AutoModelForCausalLM.from_pretrained(f"{folder}/sublayers")(ids).logits
torch.save(results, f"{folder}/results.pt")
"""


def test_checkpoints_load_in_plain_transformers(tiny, tokenizer, tmp_path):
    expected, ids = {}, torch.tensor([[5, 9, 4, 7, 11, 3, 8, 10]])
    for name in ("llama", "gemma2"):
        model = tiny(name)
        drop_blocks_(model, [0, 2] if name == "llama" else [1])
        checkpoint.save(model, tokenizer, tmp_path / name)
        expected[name] = logits(model, ids)
    model = tiny("llama")
    drop_sublayers_(model, attn=[0], mlp=[2])
    checkpoint.save(model, tokenizer, tmp_path / "sublayers")
    expected["sublayers"] = logits(model, ids)
    command = [sys.executable, "-c", _WITHOUT_PRUNEKIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("flags", [False, True], ids=["indices", "flags"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_llm_drop_checkpoints_load(name, flags, tiny, tokenizer, token_ids, tmp_path):
    model = tiny(name)
    folder = checkpoint.save(model, tokenizer, tmp_path / "dense")
    attn = [False, True, False, True] if flags else [3, 1, 3]
    mlp = [False] * 4 if flags else []
    code = {"AutoModelForCausalLM": "modeling_dropped.DroppedForCausalLM", "AutoConfig": "c.C"}
    rewrite_config(folder, drop_attn_list=attn, drop_mlp_list=mlp, auto_map=code)
    drop_sublayers_(model, attn=[1, 3])
    loaded, _ = checkpoint.load(folder)  # its weights still hold the dropped sublayers
    assert loaded.config.model_type == f"prunekit_{name}"
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    rewrite_config(folder, drop_attn_list=[False] * 4)
    assert checkpoint.load(folder)[0].config.model_type == name


def test_manifest_says_what_was_done(tiny, tokenizer, tmp_path):
    model = tiny("llama")
    drop_blocks_(model, [1])
    drop_sublayers_(model, mlp=[2])
    folder = checkpoint.save(model, tokenizer, tmp_path / "out", report={"sparsity": 0.5})
    manifest = json.loads((folder / "prunekit.json").read_text())
    assert manifest["dropped"] == {"attn": [], "mlp": [2]}
    assert manifest["kept_blocks"] == [0, 2, 3]
    assert manifest["report"] == {"sparsity": 0.5}
    size = (folder / "model.safetensors").stat().st_size
    assert manifest["files"]["model.safetensors"]["bytes"] == size


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def cut_without_manifest(folder: Path) -> None:
    cut(folder)
    (folder / "prunekit.json").unlink()


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 not tensors" * 10)
    (folder / "prunekit.json").unlink()


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGES = {
    "flipped byte": (flip_a_byte, r"model\.safetensors is damaged \(its checksum differs\): copy"),
    "truncated": (cut, r"model\.safetensors has \d+ bytes instead of \d+: copy it again"),
    "truncated, no manifest": (cut_without_manifest, r"model\.safetensors is truncated or no safe"),
    "garbage": (garbage, r"model\.safetensors is truncated or no safetensors file"),
    "pickles": (pickles_only, "only pickled weights, which prunekit never opens"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "lost shard": (lost_shard, r"model-00001-of-00001\.safetensors is missing"),
    "no tokenizer": (no_tokenizer, "holds no tokenizer: copy tokenizer.json"),
    "broken tokenizer": (broken_tokenizer, "the tokenizer in .* can't be read"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "broken config": (broken_json, r"config\.json can't be read"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "doesn't hold a JSON object"),
    "bert": (lambda f: rewrite_config(f, model_type="bert"), "architecture 'bert' is not supp"),
    "bad value": (lambda f: rewrite_config(f, hidden_size="x"), "not a valid llama configuration"),
    "quantised": (lambda f: rewrite_config(f, quantization_config={"bits": 4}), "is quantised"),
    "wrong shape": (
        lambda f: rewrite_config(f, intermediate_size=56),
        r"mlp\.\w+\.weight has shape .*48.*, config\.json implies .*56",
    ),
    "missing tensor": (
        lambda f: rewrite_weights(f, **{UP: None}),
        r"model\.layers\.0\.mlp\.up_proj\.weight is missing from the weights",
    ),
    "extra tensor": (
        lambda f: rewrite_weights(f, stray=torch.zeros(2)),
        "the weights hold stray, which the model has not",
    ),
    "fewer layers": (
        lambda f: rewrite_config(f, num_hidden_layers=3),
        r"the weights hold model\.layers\.3\.\S+, a layer past the 3 that config\.json says",
    ),
    "bad drop list": (lambda f: rewrite_config(f, drop_attn_list="0"), "must be listed as layer"),
    "drop out of range": (lambda f: rewrite_config(f, drop_mlp_list=[7]), "index 7 is out of rang"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line(saved, damage):
    harm, message = DAMAGES[damage]
    harm(saved)
    with pytest.raises(PrunekitError, match=message) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_verification_can_be_skipped(saved):
    flip_a_byte(saved)
    checkpoint.load(saved, verify=False)


def test_a_newer_manifest_is_refused(saved):
    (saved / "prunekit.json").write_text('{"format_version": 99}')
    with pytest.raises(PrunekitError, match="newer prunekit: upgrade prunekit"):
        checkpoint.load(saved)


def test_sharded_weights_load(tiny, tokenizer, token_ids, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(checkpoint.load(tmp_path)[0], token_ids), logits(model, token_ids))


@pytest.mark.parametrize("source", ["./nothing", "/no/such/folder", "a/b/c", "with space/x"])
def test_missing_paths_never_reach_the_network(source, monkeypatch):
    monkeypatch.setattr(sources, "snapshot_download", lambda *a, **k: pytest.fail("network"))
    with pytest.raises(PrunekitError, match="doesn't exist: give a folder"):
        checkpoint.load(source)


def test_hub_ids_go_through_the_hub(saved, monkeypatch):
    asked = []

    def download(source, **settings):
        asked.append(source)
        if source == "nobody/offline":
            raise LocalEntryNotFoundError("no network\nand more")
        return str(saved)

    monkeypatch.setattr(sources, "snapshot_download", download)
    model, _ = checkpoint.load("somebody/model")
    assert model.config.name_or_path == "somebody/model"
    with pytest.raises(PrunekitError, match="nobody/offline is neither a folder") as caught:
        checkpoint.load("nobody/offline")
    assert asked == ["somebody/model", "nobody/offline"] and "\n" not in str(caught.value)


def test_check_finite(tiny):
    model = tiny("llama")
    checkpoint.check_finite(model)
    model.model.layers[2].mlp.up_proj.weight.data[3, 1] = float("nan")
    with pytest.raises(PrunekitError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        checkpoint.check_finite(model)


@pytest.mark.parametrize(("format", "columns"), [("2:4", 64), ("2:4", 320), ("bitmap", 64)])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_check_finite_looks_into_packed_layers(tiny, monkeypatch, format, columns, value):
    model = tiny("llama", hidden_size=64, intermediate_size=columns)
    pk.prune_(model, pk.Magnitude(pattern="2:4"))
    broken = copy.deepcopy(model)
    weight = broken.model.layers[2].mlp.down_proj.weight
    row, column = weight.nonzero()[-1].tolist()  # of the last block
    weight.data[row, column] = value
    for each in (model, broken):
        assert pk.swap_(each, formats=[format]).swapped
    for packed in (BitmapSparse, Sparse24):
        monkeypatch.setattr(packed, "to_dense", None)
    checkpoint.check_finite(model)
    with pytest.raises(PrunekitError, match=r"layers\.2\.mlp\.down_proj holds NaN or infinite"):
        checkpoint.check_finite(broken)


def test_loading_leaves_the_verbosity_alone(saved):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    checkpoint.load(saved)
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert before == after


# Writing whole or not at all.


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwriting_has_to_be_asked_for(saved, tiny, tokenizer, token_ids):
    before = contents(saved)
    other = tiny("opt")
    with pytest.raises(PrunekitError, match="is not empty: choose another folder"):
        checkpoint.save(other, tokenizer, saved)
    assert contents(saved) == before
    checkpoint.save(other, tokenizer, saved, overwrite=True)
    assert torch.equal(logits(checkpoint.load(saved)[0], token_ids), logits(other, token_ids))
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_only_checkpoints_are_overwritten(tiny, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PrunekitError, match="it won't be overwritten"):
        checkpoint.save(tiny("llama"), tokenizer, tmp_path, overwrite=True)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), RuntimeError("odd")],
    ids=repr,
)
def test_interrupted_saves_leave_the_old_one(saved, tiny, tokenizer, monkeypatch, error):
    before = contents(saved)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)  # the model is written by then
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PrunekitError
    with pytest.raises(expected):
        checkpoint.save(tiny("opt"), tokenizer, saved, overwrite=True)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_others_may_read_a_checkpoint_as_they_may_read_any_file(saved):
    probe = saved.parent / "probe"
    probe.write_text("x")
    modes = {path.name: path.stat().st_mode for path in saved.iterdir()}
    assert set(modes.values()) == {probe.stat().st_mode} and "model.safetensors" in modes


@pytest.mark.parametrize("rename", [0, 1])
def test_interrupted_swaps_leave_the_old_one(tmp_path, monkeypatch, rename):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    stock, calls = Path.rename, []

    def interrupted(self, other):
        calls.append(self)
        if len(calls) == rename + 1:
            raise KeyboardInterrupt
        return stock(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic.replaced_folder(target, overwrite=True, replaceable=["config.json"]) as new,
    ):
        (new / "config.json").write_text("new")
    assert contents(target) == {"config.json": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_that_can_not_be_written(tiny, tokenizer, tmp_path):
    model = tiny("llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(PrunekitError, match="is a file: choose a folder"):
        checkpoint.save(model, tokenizer, tmp_path / "file")
    with pytest.raises(PrunekitError, match=r"file (is a file|can't be written.*): choose"):
        checkpoint.save(model, tokenizer, tmp_path / "file" / "below")
    with pytest.raises(PrunekitError, match="unknown format 'gguf': use one of auto, dense"):
        checkpoint.save(model, tokenizer, tmp_path / "out", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_parents_are_made_and_empty_folders_taken(tiny, tokenizer, tmp_path):
    checkpoint.save(tiny("llama"), tokenizer, tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    folder = checkpoint.save(tiny("llama"), tokenizer, tmp_path / "empty")
    assert folder.stat().st_mode & 0o055 == (tmp_path / "a").stat().st_mode & 0o055
