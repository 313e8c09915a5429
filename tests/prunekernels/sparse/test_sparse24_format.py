"""The packed 2:4 format alone: groups that do not fit, masks, chunks, sizes."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_formats import DTYPES, FORMATS, assert_same_bits
from prunekernels import nm_mask
from prunekernels.sparse.two_four import expand as expand24
from prunekernels.sparse.two_four.format import (
    Sparse24,
    sparse24_pack,
)
from prunekernels.sparse.two_four.layout import packed_shape

FORM = FORMATS[0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(3, 300),
    place=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    drop=st.integers(0, 4),
    value=st.sampled_from([1.0, float("nan"), -1e-7, float("inf")]),
)
def test_a_full_group_is_refused_by_row_and_column(rows, columns, place, drop, value):
    torch.manual_seed(0)
    weight = FORM.values(rows, columns, torch.float16)
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
    weight = FORM.bits(100, 320, dtype)
    whole = sparse24_pack(weight)
    monkeypatch.setattr("prunekernels.sparse.two_four.format._CHUNK_ELEMENTS", 1)
    assert torch.equal(sparse24_pack(weight).packed, whole.packed)
    for lines in (1, 3, 4, 7):
        monkeypatch.setattr(expand24, "_CHUNK", 16 * 320 * lines)
        monkeypatch.setattr(expand24, "_LINES", 1)
        assert_same_bits(whole.to_dense(), weight)
    weight[99, 0:3] = 1.0
    with pytest.raises(ValueError, match="row 99"):
        sparse24_pack(weight)


def test_size_is_half_the_values_and_two_bits_for_each_kept_one():
    weight = torch.zeros(256, 1344, dtype=torch.bfloat16)
    assert sparse24_pack(weight).nbytes * 16 == weight.nbytes * 9
    assert sparse24_pack(weight.float()).nbytes * 32 == 2 * weight.nbytes * 17


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


def test_buffers_of_other_shapes_are_refused():
    state = sparse24_pack(torch.ones(16, 64, dtype=torch.bfloat16) * _two_of_four(64)).state_dict()
    with pytest.raises(ValueError, match="int32 buffer of shape"):
        Sparse24.from_state_dict({**state, "header": torch.tensor([1, 32, 64, 0])})
    with pytest.raises(ValueError, match=r"of torch\.float32 is an int32 buffer of shape"):
        Sparse24.from_state_dict({**state, "header": torch.tensor([1, 16, 64, 2])})
    with pytest.raises(ValueError, match="int32 buffer of shape"):
        Sparse24.from_state_dict({**state, "packed": state["packed"][:, :-1]})


def test_lines_are_padded_to_sixteen_rows_and_sixty_four_columns():
    assert sparse24_pack(torch.zeros(16, 64, dtype=torch.bfloat16)).nbytes == 1152
    assert packed_shape(17, 320, torch.bfloat16) == (2, 1152 + 288)
    assert packed_shape(17, 320, torch.float32) == (2, 2176 + 544)


def _two_of_four(columns: int) -> torch.Tensor:
    return torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(columns // 4).to(torch.bfloat16)
