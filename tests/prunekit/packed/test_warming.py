"""Every kind of packed layer is warmed up once for every number of tokens, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import prunekit as pk
from prunekit.errors import PrunekitError
from prunekit.packed import warming
from prunekit.packed.modules import FusedGatedMLP, MergedLinear, PackedLinear


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    """What `prunekernels.warm_up` is given to call, as layer, shape of x and result."""
    seen: list[tuple[str, tuple[int, ...], torch.Tensor]] = []

    def note(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def noting(self: Any, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = real(self, x)
            seen.append((type(self).__name__, tuple(x.shape), y))
            return y

        noting.__name__ = name
        monkeypatch.setattr(kind, name, noting)

    note(PackedLinear, "product")
    note(FusedGatedMLP, "gated")

    def warm_up(calls: list[Callable[[], Any]], progress: Any = None) -> int:
        for call in calls:
            call()
        return len(calls)

    monkeypatch.setattr(warming, "warm_up", warm_up)
    # a tiny model on this CPU stands for one on a GPU
    monkeypatch.setattr(warming, "DEVICE", "cpu")
    return seen


def test_each_kind_of_layer_is_called_once_per_number_of_tokens(tiny_24: Any, warmed: Any) -> None:
    model = tiny_24("llama")
    pk.swap_(model)
    hidden, wide = model.config.hidden_size, model.config.intermediate_size
    attention = model.model.layers[0].self_attn
    assert pk.warm_up_(model, (1, 5, 1)) == 8
    kinds = {
        (MergedLinear.__name__, hidden),  # q, k and v
        (PackedLinear.__name__, attention.o_proj.in_features),
        (FusedGatedMLP.__name__, hidden),
        (PackedLinear.__name__, wide),  # down
    }
    assert {(name, shape) for name, shape, _ in warmed} == {
        (name, (1, count, width)) for name, width in kinds for count in (1, 5)
    }
    for name, shape, y in warmed:
        if name == MergedLinear.__name__:
            assert y.shape == (1, shape[1], sum(attention.q_proj.sizes))


def test_swapping_warms_up_on_request(tiny_24: Any, warmed: Any) -> None:
    pk.swap_(tiny_24("llama"))
    assert not warmed
    pk.swap_(tiny_24("llama"), warm_up=(3,))
    assert {shape[1] for _, shape, _ in warmed} == {3} and len(warmed) == 4


def test_what_cannot_be_warmed_up_is_refused_or_left_alone(tiny_24: Any) -> None:
    model = tiny_24("llama")
    assert pk.warm_up_(model) == 0
    pk.swap_(model)
    assert pk.warm_up_(model) == 0  # on a CPU
    for tokens in ((), (1, 0)):
        with pytest.raises(PrunekitError, match="give tokens per call, each from 1"):
            pk.warm_up_(model, tokens)
    with pytest.raises(PrunekitError, match="tokens is 0: give the tokens per call"):
        pk.swap_(model, warm_up=(0,))
