"""The packed 2:4 format comes back bit for bit, and refuses what does not fit it."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekernels import nm_mask
from prunekernels.sparse.two_four import expand as expand24
from prunekernels.sparse.two_four.format import (
    Sparse24,
    sparse24_cat,
    sparse24_pack,
    sparse24_split,
)
from prunekernels.sparse.two_four.layout import packed_shape

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {2: torch.int16, 4: torch.int32}


def sparse_bits(
    rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """A weight of random bits (NaN, infinities, subnormals, −0.0 included), 2:4 along columns."""
    random = torch.Generator().manual_seed(seed)
    groups, integer = -(-columns // 4), INTEGERS[dtype.itemsize]
    lowest = torch.iinfo(integer).min
    bits = torch.randint(lowest, -lowest, (rows, groups, 4), generator=random).to(integer)
    count = torch.randint(0, 3, (rows, groups, 1), generator=random)
    rank = torch.rand(rows, groups, 4, generator=random).argsort(2).argsort(2)
    negative_zero = torch.rand(rows, groups, 4, generator=random) < 0.5
    empty = torch.where(negative_zero, lowest, 0).to(integer)
    chosen = torch.where(rank < count, bits, empty).view(rows, -1)[:, :columns]
    return chosen.contiguous().view(dtype)


def as_bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(INTEGERS[weight.dtype.itemsize])


def without_negative_zero(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(weight == 0, 0, as_bits(weight))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_exact(rows, columns, dtype, seed):
    weight = sparse_bits(rows, columns, seed, dtype)
    packed = sparse24_pack(weight)
    assert packed.to_dense().dtype == dtype
    assert torch.equal(as_bits(packed.to_dense()), without_negative_zero(weight))
    again = Sparse24.from_state_dict(packed.state_dict())
    assert again.shape == (rows, columns) and again.dtype == dtype
    assert torch.equal(again.packed, packed.packed)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(3, 300),
    place=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    drop=st.integers(0, 4),
    value=st.sampled_from([1.0, float("nan"), -1e-7, float("inf")]),
)
def test_a_full_group_is_refused_by_row_and_column(rows, columns, place, drop, value):
    weight = sparse_bits(rows, columns, 0).nan_to_num(1.0, 1.0, 1.0)
    row, group = place[0] % rows, place[1] % (columns // 4 if columns >= 4 else 1)
    first, last = 4 * group, min(4 * group + 3, columns - 1)
    weight[row, first : last + 1] = value
    if drop < 4 and last - first == 3:
        weight[row, first + drop] = 0.0
    with pytest.raises(ValueError, match=rf"row {row}, columns {first} to {first + 3} hold [34]"):
        sparse24_pack(weight)


def test_the_first_bad_group_is_named():
    weight = torch.zeros(40, 64, dtype=torch.bfloat16)
    weight[35, 0:4] = 1.0
    weight[20, 40:43] = 1.0
    with pytest.raises(ValueError, match="row 20, columns 40 to 43 hold 3 non-zeros"):
        sparse24_pack(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights_go_through_in_chunks(monkeypatch, dtype):
    weight = sparse_bits(100, 320, 1, dtype)
    whole = sparse24_pack(weight)
    monkeypatch.setattr("prunekernels.sparse.two_four.format._CHUNK_ELEMENTS", 1)
    assert torch.equal(sparse24_pack(weight).packed, whole.packed)
    for lines in (1, 3, 4, 7):
        monkeypatch.setattr(expand24, "_CHUNK", 16 * 320 * lines)
        monkeypatch.setattr(expand24, "_LINES", 1)
        assert torch.equal(as_bits(whole.to_dense()), without_negative_zero(weight))
    weight[99, 0:3] = 1.0
    with pytest.raises(ValueError, match="row 99"):
        sparse24_pack(weight)


def test_size_is_half_the_values_and_two_bits_for_each_kept_one():
    weight = torch.zeros(256, 1344, dtype=torch.bfloat16)
    assert sparse24_pack(weight).nbytes * 16 == weight.nbytes * 9
    assert sparse24_pack(weight.float()).nbytes * 32 == 2 * weight.nbytes * 17


def test_non_contiguous_and_gradient_carrying_weights():
    weight = sparse_bits(24, 40, 2).nan_to_num(1.0, 1.0, 1.0)
    strided = torch.zeros(24, 80, dtype=torch.float16)
    strided[:, ::2] = weight
    assert torch.equal(sparse24_pack(strided[:, ::2]).packed, sparse24_pack(weight).packed)
    parameter = torch.nn.Parameter(weight)
    assert not sparse24_pack(parameter).packed.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_says_what_is_packed(dtype):
    weight = torch.randn(100, 323).to(dtype)
    mask = torch.nn.functional.pad(nm_mask(weight[:, :320].float().abs(), 2, 4), (0, 3))
    weight[mask.logical_not()] = float("nan")
    kept = weight.masked_fill(mask.logical_not(), 0)
    assert torch.equal(sparse24_pack(weight, mask).packed, sparse24_pack(kept).packed)
    mask[70, 8:12] = True
    with pytest.raises(ValueError, match="row 70, columns 8 to 11 hold 4 non-zeros"):
        sparse24_pack(weight, mask)


def test_packing_by_a_mask_makes_no_copy_of_the_weight():
    beside_the_result = []
    for rows in (1024, 8192):
        weight = torch.randn(rows, 1024).to(torch.bfloat16)
        mask = nm_mask(weight.abs(), 2, 4)
        with Allocations() as used:
            packed = sparse24_pack(weight, mask)
        beside_the_result.append(used.peak - packed.nbytes)
    assert beside_the_result[0] == beside_the_result[1] < weight.nbytes / 2


@pytest.mark.parametrize(
    "mask", [torch.ones(4, 4), torch.ones(4, 8, dtype=torch.bool), torch.ones(4, dtype=torch.bool)]
)
def test_a_mask_must_fit(mask):
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(4, 4\)"):
        sparse24_pack(torch.zeros(4, 4), mask)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 4, 4), torch.zeros(0, 8)])
def test_only_matrices_pack(bad):
    with pytest.raises(ValueError, match="non-empty matrix"):
        sparse24_pack(bad.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_other_value_types_name_the_fix(dtype):
    with pytest.raises(ValueError, match=r"weight\.to\(torch\.bfloat16\)"):
        sparse24_pack(torch.zeros(4, 4, dtype=dtype))


def test_stacked_weights_equal_packing_the_stacked_dense():
    parts = [sparse_bits(rows, 100, rows) for rows in (32, 16, 21)]
    stacked = sparse24_cat([sparse24_pack(part) for part in parts])
    assert stacked.shape == (69, 100)
    assert torch.equal(stacked.packed, sparse24_pack(torch.cat(parts)).packed)
    split = sparse24_split(stacked, [32, 16, 21])
    for part, dense in zip(split, parts, strict=True):
        assert torch.equal(as_bits(part.to_dense()), without_negative_zero(dense))
        assert part.packed.untyped_storage().data_ptr() == stacked.packed.data_ptr()
    for wrong in ([32, 16, 20], [30, 39]):
        with pytest.raises(ValueError, match="69 rows"):
            sparse24_split(stacked, wrong)
    a, b = sparse24_pack(parts[0]), sparse24_pack(parts[2])
    with pytest.raises(ValueError, match="multiple of 16 rows, not 21"):
        sparse24_cat([b, a])
    with pytest.raises(ValueError, match="pack them alike"):
        sparse24_cat([a, b.to(dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="at least one"):
        sparse24_cat([])


def test_moves_between_types_round_like_torch():
    weight = sparse_bits(20, 100, 3).nan_to_num(1.0, 1.0, 1.0)
    moved = sparse24_pack(weight).to(dtype=torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved.to_dense(), weight.to(torch.bfloat16))
    assert sparse24_pack(weight).to("meta").device.type == "meta"
    assert torch.equal(moved.to(dtype=torch.float32).to_dense(), moved.to_dense().float())
    with pytest.raises(ValueError, match="float64"):
        moved.to(dtype=torch.float64)


def test_states_that_do_not_fit_are_refused():
    state = sparse24_pack(torch.ones(16, 64, dtype=torch.bfloat16) * _two_of_four(64)).state_dict()
    with pytest.raises(ValueError, match="header"):
        Sparse24.from_state_dict({"packed": state["packed"]})
    with pytest.raises(ValueError, match="version 2 is unknown"):
        Sparse24.from_state_dict({**state, "header": torch.tensor([2, 16, 64, 0])})
    with pytest.raises(ValueError, match="value type 9"):
        Sparse24.from_state_dict({**state, "header": torch.tensor([1, 16, 64, 9])})
    with pytest.raises(ValueError, match="int32 buffer of shape"):
        Sparse24.from_state_dict({**state, "header": torch.tensor([1, 32, 64, 0])})
    with pytest.raises(ValueError, match=r"of torch\.float32 is an int32 buffer of shape"):
        Sparse24.from_state_dict({**state, "header": torch.tensor([1, 16, 64, 2])})
    with pytest.raises(ValueError, match="int32 buffer of shape"):
        Sparse24.from_state_dict({**state, "packed": state["packed"][:, :-1]})
    with pytest.raises(ValueError, match="4 numbers"):
        Sparse24.from_state_dict({**state, "header": torch.tensor([1, 16])})


def test_repr_says_what_it_holds():
    text = repr(sparse24_pack(torch.zeros(16, 64, dtype=torch.bfloat16)))
    assert "shape=(16, 64)" in text and "nbytes=1152" in text and "bfloat16" in text
    assert packed_shape(17, 320, torch.bfloat16) == (2, 1152 + 288)
    assert packed_shape(17, 320, torch.float32) == (2, 2176 + 544)


def _two_of_four(columns: int) -> torch.Tensor:
    return torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(columns // 4).to(torch.bfloat16)
