"""A folder with models, whole and broken, and data files, for commands to run in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import QUESTIONS, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM as Qwen2

from prunekit import checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, broken and foreign ones, and data files."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    for name, model in (
        ("dense", tiny_model()),
        ("other-vocabulary", tiny_model(vocabulary=270)),
        ("other-architecture", tiny_model(Qwen2)),
    ):
        checkpoint.save(model, tokenizer, root / name)

    def broken(name: str) -> Path:
        shutil.copytree(root / "dense", root / name)
        (root / name / "prunekit.json").unlink()
        return root / name

    weights = load_file(root / "dense" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(weights, broken("nan") / "model.safetensors", {"format": "pt"})
    whole = (root / "dense" / "model.safetensors").read_bytes()
    (broken("truncated") / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((root / "dense" / "config.json").read_text())
    unknown = {**config, "model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (broken("unknown-architecture") / "config.json").write_text(json.dumps(unknown))
    (root / "foreign").mkdir()
    (root / "foreign" / "photo.txt").write_text("not a model")
    (root / "full").mkdir()
    (root / "full" / "precious.txt").write_text("keep me")

    for name, text in {
        "empty.txt": "",
        "blank.txt": "\n \n",
        "short.txt": "too short",
        "long.txt": "A plain text about cats and mats. " * 200,
        "broken.jsonl": '{"text": "fine"}\n{"text": ',
        "prompts.txt": "Count to three.\nName a colour.\n",
        "long-prompt.txt": "word " * 200,
        "broken.yaml": "pattern: [2:4",
        "list.yaml": "- pattern",
        "unknown.yaml": "patern: 2:4\n",
        "rules.yaml": 'rules:\n  "*.nothing": {method: magnitude}\n',
    }.items():
        (root / name).write_text(text)
    (root / "choices.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (root / "bad-choices.jsonl").write_text(json.dumps({**QUESTIONS[0], "answer": 7}))
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place
