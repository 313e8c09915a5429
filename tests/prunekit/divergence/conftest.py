"""Tiny models on disk, and texts of the word tokenizer's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def saved(tmp_path, word_tokenizer) -> Callable[..., str]:
    """`saved(model, name)` writes a model and its tokenizer, and returns where."""

    def write(model, name: str) -> str:
        folder = tmp_path / "models" / name
        model.save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture
def documents() -> list[str]:
    """Twelve documents of 30 to 41 words."""
    draw = torch.Generator().manual_seed(3)
    return [
        " ".join(f"w{token}" for token in torch.randint(3, 93, (30 + n,), generator=draw).tolist())
        for n in range(12)
    ]


@pytest.fixture
def text_file(tmp_path, documents) -> Path:
    """The documents as one text."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path
