"""2:4 weights of 8- and 4-bit values come back exactly, and nothing is rounded unasked."""

from __future__ import annotations

import pytest
import quantized
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_formats import DTYPES, assert_same_state, two_of_four
from prunekernels import (
    quantized24_pack,
    quantized24_parts,
    quantized24_round,
)
from prunekernels.sparse.two_four.quantized.format import CLASSES

every_kind = pytest.mark.parametrize("kind", CLASSES)
every = pytest.mark.parametrize(("kind", "group", "zeros"), quantized.EVERY)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(quantized.EVERY),
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    seed=st.integers(0, 2**31),
)
def test_integers_of_any_shape_come_back(case, rows, columns, seed):
    torch.manual_seed(seed)
    given = quantized.integers(rows, columns, *case)
    packed = quantized24_pack(*given, kind=case[0], dtype=torch.float32)
    # products of two float32 numbers, rounded once
    want = quantized.exact(given).float()
    assert torch.equal(packed.to_dense(), want)
    for dtype in DTYPES:
        assert torch.equal(packed.to(dtype=dtype).to_dense(), want.to(dtype))
    again = type(packed).from_state_dict(packed.state_dict())
    assert_same_state(again, packed)
    assert torch.equal(again.to_dense(), want)
    scales, zeros = quantized24_parts(packed)
    assert torch.equal(scales, given.scales)
    assert zeros is None if given.zeros is None else torch.equal(zeros, given.zeros)


@every
def test_bytes_are_those_of_values_metadata_and_scales(kind, group, zeros):
    packed, _ = quantized.made(32, 1024, kind, group, zeros)
    bits = 4 if kind == "2:4-int4" else 8
    scales = (5 if zeros else 4) / (group or 1024)
    assert packed.nbytes == 32 * 1024 * (bits / 16 + 1 / 8 + scales)


@every
def test_stacked_weights_come_apart(kind, group, zeros):
    rows = [32, 16, 21]
    parts = [quantized.made(count, 200, kind, group, zeros)[0] for count in rows]
    stacked = type(parts[0]).cat(parts)
    assert torch.equal(stacked.to_dense(), torch.cat([part.to_dense() for part in parts]))
    for part, want in zip(stacked.split(rows), parts, strict=True):
        assert_same_state(part, want)
        type(part).from_state_dict(part.state_dict())
    with pytest.raises(ValueError, match="multiple of 16 rows, not 21"):
        type(parts[0]).cat(parts[::-1])


def test_weights_that_are_packed_otherwise_do_not_stack():
    one, other = (quantized.made(16, 200, "2:4-int4", 64, zeros)[0] for zeros in (False, True))
    wide = quantized.made(16, 200, "2:4-int4", 128)[0]
    for unlike in (other, wide, one.to(dtype=torch.float16)):
        with pytest.raises(ValueError, match="pack them alike"):
            type(one).cat([one, unlike])


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_the_nearest(kind, dtype):
    weight = (torch.randn(40, 300) * two_of_four(40, 300)).to(dtype)
    weight[3] = 0
    packed = quantized24_round(weight, kind)
    assert packed.dtype == dtype and packed.group == (128 if kind == "2:4-int4" else 0)
    scales, _ = quantized24_parts(packed)
    size = packed.group or 300
    step = scales.repeat_interleave(size, 1)[:, :300]
    error = (packed.to(dtype=torch.float32).to_dense() - weight.float()).abs()
    # fp8: three bits of mantissa, and steps of 2⁻⁹ below 2⁻⁶
    half = torch.maximum(weight.float().abs() / 16, step * 2**-10)
    bound = half if kind == "2:4-fp8" else step / 2
    assert (error <= bound * (1 + 1e-5)).all()
    assert not error[3].any()
    again = quantized24_round(packed.to(dtype=torch.float32).to_dense(), kind)
    torch.testing.assert_close(
        again.to_dense(), packed.to(dtype=torch.float32).to_dense(), rtol=1e-6, atol=0
    )


def test_zero_points_fit_values_of_one_sign_better():
    weight = (torch.rand(32, 256) + 1) * two_of_four(32, 256)
    weight[::2] *= -1
    errors = [
        (quantized24_round(weight, "2:4-int4", symmetric=symmetric).to_dense() - weight)
        .square()
        .mean()
        for symmetric in (True, False)
    ]
    assert errors[1] < errors[0] / 3


@every_kind
def test_scales_of_any_size_come_back(kind):
    given = quantized.integers(16, 128, kind, 0, False)
    for scale in (0.0, 1e-45, 1e-40, -2.0, 3e38):
        scales = torch.full((16, 1), scale)
        packed = quantized24_pack(
            given.integers, given.mask, scales, kind=kind, dtype=torch.float32
        )
        assert torch.equal(quantized24_parts(packed)[0], scales)
        want = given.integers.float() * given.mask * scales
        assert torch.equal(packed.to_dense(), want)
    tiny = torch.full((16, 128), 1e-42) * given.mask
    assert quantized24_round(tiny, kind).to_dense().isfinite().all()
    huge = torch.full((16, 128), 3e38) * given.mask
    assert quantized24_round(huge, kind).to_dense().isfinite().all()


def test_codes_of_what_is_not_kept_do_not_matter():
    given = quantized.integers(20, 100, "2:4-int4", 64, True)
    packed = quantized24_pack(*given, kind="2:4-int4")
    changed = given.integers.masked_fill(~given.mask, -100)
    assert_same_state(
        quantized24_pack(changed, *given[1:], kind="2:4-int4"),
        packed,
    )


def refusals():
    def given(kind="2:4-int4", pointed=False, **changed):
        made = quantized.integers(16, 200, kind, 0 if kind == "2:4-fp8" else 64, pointed)
        # the same are kept everywhere, so that a wrong value cannot hide
        kept = (torch.arange(200) % 4 < 2).expand(16, 200)
        made = made._replace(mask=kept)
        return made._replace(**{name: change(made) for name, change in changed.items()}), kind

    yield given("2:4-int8", integers=lambda m: m.integers.fill_(-128)), "-127 to 127, not -128"
    yield given(integers=lambda m: m.integers.fill_(8)), "-8 to 7, not 8"
    yield given(pointed=True, integers=lambda m: m.integers.fill_(-1)), "0 to 15, not -1"
    yield given(pointed=True, zeros=lambda m: m.zeros.fill_(16)), "0 to 15, not 16"
    yield given(integers=lambda m: m.integers.int()), "torch.int8 .*not torch.int32"
    yield given("2:4-fp8", integers=lambda m: m.integers.float()), "float8_e4m3fn.*torch.float32"
    yield given(scales=lambda m: m.scales.half()), "torch.float32.*torch.float16"
    yield given(scales=lambda m: m.scales * float("inf")), r"\(0, 0\) is inf, not finite"
    yield given(scales=lambda m: torch.ones(16, 3)), r"\(16, 3\) do not divide 200.* 4 .* 2 "
    yield given("2:4-fp8", scales=lambda m: torch.ones(16, 4)), "1 scale for each row, not 4"
    yield given("2:4-int8", zeros=lambda m: torch.zeros(16, 4, dtype=torch.int8)), "no zero points"
    full = torch.ones(16, 200, dtype=torch.int8)
    kept = {"mask": lambda m: full.bool(), "integers": lambda m: full}
    yield given(**kept), "row 0, columns 0 to 3 hold 4"
    yield given(mask=lambda m: m.mask.int()), "torch.bool.*torch.int32"
    nan = torch.full((16, 200), float("nan")).to(torch.float8_e4m3fn)
    yield given("2:4-fp8", integers=lambda m: nan), "NaN in row 0, column 0"


@pytest.mark.parametrize("name", ["integers", "mask", "scales"])
def test_what_is_no_tensor_is_refused_by_its_name(name):
    given = quantized.integers(16, 200, "2:4-int4", 64, True)
    for wrong, called in ((None, "NoneType"), ([1.0], "list")):
        with pytest.raises(ValueError, match=f"pack: {name} must be a tensor, not {called}"):
            quantized24_pack(*given._replace(**{name: wrong}), kind="2:4-int4")
    with pytest.raises(ValueError, match="pack: zeros must be a tensor, not list"):
        quantized24_pack(*given._replace(zeros=[8]), kind="2:4-int4")
    with pytest.raises(ValueError, match="round: weight must be a tensor, not NoneType"):
        quantized24_round(None, "2:4-int4")
    with pytest.raises(ValueError, match="round: mask must be a tensor, not list"):
        quantized24_round(given.integers.float(), "2:4-int4", mask=[True])
    with pytest.raises(ValueError, match=r"must be one of 2:4-int8, .* not \[\]"):
        quantized24_pack(*given, kind=[])


@pytest.mark.parametrize(("given", "message"), refusals())
def test_what_does_not_fit_is_refused_with_both_values(given, message):
    integers, kind = given
    with pytest.raises(ValueError, match=message):
        quantized24_pack(*integers, kind=kind)


def test_other_kinds_groups_and_weights_are_refused():
    weight = torch.randn(16, 200) * two_of_four(16, 200)
    with pytest.raises(ValueError, match=r"2:4-int8, 2:4-fp8, 2:4-int4, not '2:4-int3'"):
        quantized24_round(weight, "2:4-int3")
    with pytest.raises(ValueError, match="0, 64, 128, not 100"):
        quantized24_round(weight, "2:4-int4", group=100)
    with pytest.raises(ValueError, match="one of 0, not 64"):
        quantized24_round(weight, "2:4-fp8", group=64)
    with pytest.raises(ValueError, match="no zero points"):
        quantized24_round(weight, "2:4-int8", symmetric=False)
    with pytest.raises(ValueError, match=r"float64.*weight\.to"):
        quantized24_round(weight.double(), "2:4-int4")
    with pytest.raises(ValueError, match="non-empty matrix"):
        quantized24_round(weight[:0], "2:4-int4")
    with pytest.raises(ValueError, match="not 2:4: row 0"):
        quantized24_round(torch.ones(16, 200), "2:4-int4")
    weight[2, 5] = float("nan")
    with pytest.raises(ValueError, match="nan in row 2, column 5 is not finite"):
        quantized24_round(weight, "2:4-int4")


@every_kind
def test_states_that_do_not_fit_are_refused(kind):
    packed, _ = quantized.made(16, 200, kind, 0)
    state = packed.state_dict()
    header = state["header"].tolist()

    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            type(packed).from_state_dict({**state, **changed})

    for place, value, message in (
        (0, 99, "version 99 is unknown"),
        (1, 32, "shape"),
        (3, 9, "type 9"),
        (4, 6 if kind != "2:4-int8" else 5, "own format"),
        (5, 64, "groups of 64"),
    ):
        numbers = [*header]
        numbers[place] = value
        refused(message, header=torch.tensor(numbers))
    refused("6 numbers, not 2", header=torch.tensor([1, 2]))
    refused("finite", scales=packed.scales * float("nan"))
    refused("float32", scales=packed.scales.half())
    refused("uint8", zeros=packed.scales)
    refused("reach 16, not 15", zeros=torch.full(packed.scales.shape, 16, dtype=torch.uint8))
    for name in state:
        with pytest.raises(ValueError, match=name):
            type(packed).from_state_dict({key: t for key, t in state.items() if key != name})
    with pytest.raises(ValueError, match=r"to_dense\(\)"):
        packed.requires_grad_()
    with pytest.raises(ValueError, match="float64"):
        packed.to(dtype=torch.float64)
    assert f"nbytes={packed.nbytes}" in repr(packed) and packed.to("meta").device.type == "meta"
