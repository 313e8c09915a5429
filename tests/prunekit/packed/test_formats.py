"""A sparse format is one class and one row: everything else finds it by its name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import prunekernels
import pytest
import torch
from prunekernels.sparse import FORMATS, PackedWeight
from prunekernels.sparse.layer import Expected
from torch import Tensor

import prunekit as pk
from prunekit.packed.modules import MergedLinear, PackedLinear, packed_layers


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """A weight of whose columns only those that hold something are kept."""

    kept: Tensor
    values: Tensor
    shape: tuple[int, int]
    format: ClassVar[str] = "columns"
    row_multiple: ClassVar[int] = 1
    gate_up: ClassVar[None] = None
    exact: ClassVar[bool] = True

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.kept, self.values))

    @classmethod
    def pack(cls, weight: Tensor) -> Columns:
        kept = (weight != 0).any(0).nonzero()[:, 0]
        return cls(kept, weight[:, kept].contiguous(), (weight.shape[0], weight.shape[1]))

    def to_dense(self) -> Tensor:
        dense = self.values.new_zeros(self.shape)
        dense[:, self.kept] = self.values
        return dense

    def kept_values(self) -> list[Tensor]:
        return [self.values]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Columns:
        return Columns(self.kept.to(device), self.values.to(device, dtype), self.shape)

    def state_dict(self) -> dict[str, Tensor]:
        return {"kept": self.kept, "values": self.values, "header": torch.tensor(self.shape)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Columns:
        rows, columns = state["header"].tolist()
        return cls(state["kept"], state["values"], (rows, columns))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Columns:
        return cls(tensors["kept"], tensors["values"], shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x[..., self.kept], self.values, bias)

    def expected(self, tokens: int) -> Expected:
        return Expected(2.0, "eager", "half of the columns")

    @classmethod
    def cat(cls, weights: Sequence[Columns]) -> Columns:
        return cls.pack(torch.cat([w.to_dense() for w in weights]))

    def split(self, rows: Sequence[int]) -> list[Columns]:
        parts = torch.split(self.values, list(rows))
        return [Columns(self.kept.clone(), part, (len(part), self.shape[1])) for part in parts]


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: type[PackedWeight] = Columns
    monkeypatch.setitem(FORMATS, "columns", kind)


def test_a_third_format_is_swapped_merged_saved_and_loaded(
    third: None, tiny: Any, tmp_path: Any, token_ids: Tensor, word_tokenizer: Any
) -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data[:, ::2] = 0
    dense = copy.deepcopy(model)
    with torch.no_grad():
        want = model(input_ids=token_ids).logits
        report = pk.swap_(model, formats=["columns"])
        assert {module.format for module in report.swapped} == {"columns"} and report.faster
        assert any(isinstance(module, MergedLinear) for module in model.modules())
        got = model(input_ids=token_ids).logits
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    pk.save(model, word_tokenizer, tmp_path / "saved")
    loaded, _ = pk.load(tmp_path / "saved")
    assert {layer.format for _, layer in packed_layers(loaded)} == {"columns"}
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=token_ids).logits, want, rtol=1e-4, atol=1e-5)
    pk.unswap_(model)
    for (name, restored), original in zip(
        model.named_parameters(), dense.parameters(), strict=True
    ):
        assert torch.equal(restored, original), name


@pytest.mark.parametrize("name", FORMATS)
def test_formats_answer_for_themselves(name: str) -> None:
    kind = FORMATS[name]
    dense = torch.zeros(32, 128)
    dense[:, ::4] = torch.randn(32, 32)
    packed = kind.pack(dense)
    if kind.exact:
        assert torch.equal(packed.to_dense(), dense)
    dense = packed.to_dense()
    x, bias = torch.randn(3, 128), torch.randn(32)
    want = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    assert torch.allclose(packed.linear(x, bias).double(), want, rtol=1e-5, atol=1e-5)
    assert packed.expected(1) == getattr(prunekernels, f"{_op(name)}_expected")(1, packed)
    state = packed.state_dict()
    for again in (
        kind.from_state_dict(state),
        kind.from_tensors(state, packed.shape, packed.dtype),
    ):
        assert again.state_dict().keys() == state.keys() and again.nbytes == packed.nbytes
        assert torch.equal(again.to_dense(), dense)
    twice = kind.cat([packed, packed])
    assert twice.shape == (64, 128)
    assert all(torch.equal(part.to_dense(), dense) for part in twice.split([32, 32]))
    if kind.exact:
        assert sum(int(part.count_nonzero()) for part in packed.kept_values()) == 32 * 32


def _op(name: str) -> str:
    return {"2:4": "sparse24", "bitmap": "bitmap"}.get(name, "quantized24")


def test_a_layer_makes_its_weight_from_its_buffers_every_time() -> None:
    layer = PackedLinear(FORMATS["2:4"].pack(torch.eye(64)), None, "2:4")
    first = layer.weight
    layer.packed = layer.packed.clone()
    # nothing but the buffers keeps the weight: offloading would otherwise free no memory
    assert layer.weight.packed is layer.packed and first.packed is not layer.packed
