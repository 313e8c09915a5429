"""The digest of weights notices whatever changes them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from prunekit.divergence.loading import fingerprint, fingerprint_of
from prunekit.files.content import add_content

SIZE = (3 << 20) + 4096 + 13  # three chunks, one more row, and an odd end


def digest(data):
    found = hashlib.sha256()
    add_content(found, data)
    return found.hexdigest()


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.mark.parametrize("place", [0, 7, 4096, (1 << 20) - 1, 1 << 20, SIZE - 14, SIZE - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_any_bit(data, place, bit):
    other = data.copy()
    other[place] ^= np.uint8(1 << bit)
    assert digest(other) != digest(data)
    assert digest(data.copy()) == digest(data)


@pytest.mark.parametrize("length", [8, 4096, 1 << 20])
@pytest.mark.parametrize("apart", [1, 2])
def test_parts_that_change_places(data, length, apart):
    """Words, rows and chunks."""
    other, at = data.copy(), apart * length
    other[:length], other[at : at + length] = data[at : at + length], data[:length]
    assert digest(other) != digest(data)


@pytest.mark.parametrize("removed", [1, 13, 4096, 1 << 20])
def test_shorter(data, removed):
    zeros = np.zeros_like(data)
    assert digest(data[:-removed]) != digest(data)
    assert digest(zeros[:-removed]) != digest(zeros)


@torch.no_grad()
def test_every_tensor_of_a_model(tiny, tmp_path):
    """One element of each tensor, by its last bit; then on disk."""
    model = tiny("llama")
    before = fingerprint_of(model)
    for name, tensor in model.state_dict().items():
        bits = tensor.view(-1)[-1:].view(torch.int32)
        bits ^= 1
        assert fingerprint_of(model) != before, name
        bits ^= 1
    assert fingerprint_of(model) == before
    found = []
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        found.append(fingerprint(str(tmp_path / "model")))
        next(model.parameters()).view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    assert found[0] != found[1]
    model.save_pretrained(tmp_path / "model")  # the bit is back
    assert fingerprint(str(tmp_path / "model")) == found[0]
