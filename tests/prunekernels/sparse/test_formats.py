"""Every packed format comes back bit for bit, and refuses what does not fit it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_formats import DTYPES, FORMATS, assert_same_bits, assert_same_state, every_format


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_weights_of_any_shape_and_bits_come_back(form, rows, columns, dtype, seed):
    torch.manual_seed(seed)
    weight = form.bits(rows, columns, dtype)
    packed = form.kind.pack(weight)
    assert packed.shape == (rows, columns) and packed.dtype == dtype
    assert_same_bits(packed.to_dense(), weight)
    again = form.kind.from_state_dict(packed.state_dict())
    assert_same_state(again, packed)
    assert_same_bits(again.to_dense(), weight)


@every_format
def test_strided_weights_pack_like_contiguous_ones(form):
    weight = form.values(24, 40, torch.float16)
    strided = torch.zeros(24, 80, dtype=torch.float16)
    strided[:, ::2] = weight
    assert_same_state(form.kind.pack(strided[:, ::2]), form.kind.pack(weight))
    turned = weight.T.contiguous().T
    assert not turned.is_contiguous()
    assert_same_state(form.kind.pack(turned), form.kind.pack(weight))


@every_format
def test_packed_weights_carry_no_gradient_and_cannot_be_trained(form):
    packed = form.kind.pack(torch.nn.Parameter(form.values(24, 40, torch.float32)))
    assert not any(tensor.requires_grad for tensor in packed.state_dict().values())
    with pytest.raises(ValueError, match=r"to_dense\(\)"):
        packed.requires_grad_()


@every_format
@pytest.mark.parametrize("shape", [(4,), (2, 4, 4), (0, 8)], ids=str)
def test_only_matrices_pack(form, shape):
    with pytest.raises(ValueError, match="non-empty matrix"):
        form.kind.pack(torch.zeros(shape, dtype=torch.bfloat16))


@every_format
def test_what_is_no_tensor_does_not_pack(form):
    with pytest.raises(ValueError, match=f"{form.name}_pack: weight must be a tensor, not None"):
        form.function("pack")(None)


@every_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_other_value_types_name_the_fix(form, dtype):
    with pytest.raises(ValueError, match=r"weight\.to\(torch\.bfloat16\)"):
        form.kind.pack(torch.zeros(4, 4, dtype=dtype))


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_weights_equal_packing_the_stacked_dense(form, dtype):
    rows = [32, 16, 48, 21]
    parts = [form.bits(count, 100, dtype) for count in rows]
    parts[1].zero_()  # an empty part between full ones
    stacked = form.kind.cat([form.kind.pack(part) for part in parts])
    assert_same_state(stacked, form.kind.pack(torch.cat(parts)))
    memory = {t.untyped_storage().data_ptr() for t in stacked.state_dict().values()}
    for part, dense in zip(stacked.split(rows), parts, strict=True):
        assert_same_bits(part.to_dense(), dense)
        form.kind.from_state_dict(part.state_dict())
        assert memory & {t.untyped_storage().data_ptr() for t in part.state_dict().values()}


@every_format
def test_what_does_not_stack_or_split_is_refused(form):
    whole, odd = (form.kind.pack(form.values(rows, 100, torch.float16)) for rows in (32, 21))
    stacked = form.kind.cat([whole, odd])
    for wrong in ([32, 20], [30, 23], [64, -11], [0, 53], [53, 0]):
        with pytest.raises(ValueError, match="53 rows"):
            stacked.split(wrong)
    dense = form.values(32, 100, torch.float16)
    with pytest.raises(ValueError, match="not Tensor: pack each with"):
        form.kind.cat([whole, dense])
    with pytest.raises(ValueError, match="not Tensor: pack each with"):
        form.kind.cat([dense])
    with pytest.raises(ValueError, match="multiple of 16 rows, not 21"):
        form.kind.cat([odd, whole])
    with pytest.raises(ValueError, match="pack them alike"):
        form.kind.cat([whole, odd.to(dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="at least one"):
        form.kind.cat([])


@every_format
def test_moves_between_types_round_like_torch(form):
    weight = form.values(20, 100, torch.float32)
    packed = form.kind.pack(weight)
    for dtype in DTYPES:
        moved = packed.to(dtype=dtype)
        assert moved.dtype == dtype and torch.equal(moved.to_dense(), weight.to(dtype))
        form.kind.from_state_dict(moved.state_dict())
    assert packed.to(dtype=torch.float16).nbytes < packed.nbytes
    assert packed.to("cpu").device == torch.device("cpu")
    assert packed.to("meta").device.type == "meta"
    with pytest.raises(ValueError, match="float64"):
        packed.to(dtype=torch.float64)
    # a value that rounds to nothing comes back as 0.0, not −0.0
    tiny = form.kind.pack(torch.full((1, 1), -1e-30)).to(dtype=torch.float16).to_dense()
    assert tiny.view(torch.int16).item() == 0


@every_format
def test_states_that_do_not_fit_are_refused(form):
    state = form.kind.pack(form.values(16, 64, torch.bfloat16)).state_dict()
    version, rows, columns, code = state["header"].tolist()
    assert (rows, columns) == (16, 64)

    def refused(message: str, numbers: list[int]) -> None:
        with pytest.raises(ValueError, match=message):
            form.kind.from_state_dict({**state, "header": torch.tensor(numbers)})

    refused("version 99 is unknown", [99, rows, columns, code])
    refused("value type 9", [version, rows, columns, 9])
    refused("4 numbers", [version, rows])
    refused("shape", [version, 2 * rows, columns, code])
    for name in state:
        with pytest.raises(ValueError, match=name):
            form.kind.from_state_dict({key: t for key, t in state.items() if key != name})


@every_format
def test_repr_names_shape_bytes_and_type(form):
    packed = form.kind.pack(form.values(16, 64, torch.bfloat16))
    text = repr(packed)
    assert "shape=(16, 64)" in text and f"nbytes={packed.nbytes}" in text and "bfloat16" in text
