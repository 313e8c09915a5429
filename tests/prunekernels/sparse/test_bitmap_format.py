"""The packed bitmap format comes back bit for bit, at any sparsity and in the promised size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekernels.sparse.bitmap.format import BitmapSparse, bitmap_cat, bitmap_pack, bitmap_split

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPARSITIES = [0.0, 0.01, 0.3, 0.5, 0.6, 0.7, 0.9, 0.99, 0.999, 1.0]


def integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def sparse_bits(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> torch.Tensor:
    """Random patterns (NaN, infinities, subnormals included); half of the zeros are negative."""
    kind = integers(dtype)
    lowest = torch.iinfo(kind).min
    bits = torch.randint(lowest, -lowest, (rows, columns)).to(kind)
    empty = torch.where(torch.rand(rows, columns) < 0.5, lowest, 0).to(kind)
    return torch.where(torch.rand(rows, columns) < sparsity, empty, bits).view(dtype)


def assert_exact(packed: BitmapSparse, weight: torch.Tensor) -> None:
    kind = integers(weight.dtype)
    wanted = torch.where(weight == 0, 0, weight.view(kind))
    dense = packed.to_dense()
    assert dense.dtype == weight.dtype and torch.equal(dense.view(kind), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_round_trip_at_every_sparsity(dtype, sparsity):
    for rows, columns in ((96, 1024), (33, 330), (1, 1)):
        weight = sparse_bits(rows, columns, sparsity, dtype)
        packed = bitmap_pack(weight)
        assert packed.shape == (rows, columns) and packed.dtype == dtype
        assert_exact(packed, weight)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_round_trip_of_any_shape(rows, columns, dtype, sparsity, seed):
    torch.manual_seed(seed)
    weight = sparse_bits(rows, columns, sparsity, dtype)
    packed = bitmap_pack(weight)
    assert_exact(packed, weight)
    again = BitmapSparse.from_state_dict(packed.state_dict())
    assert again.shape == (rows, columns) and again.dtype == dtype
    assert torch.equal(again.bitmap, packed.bitmap) and torch.equal(again.starts, packed.starts)
    assert torch.equal(again.values.view(integers(dtype)), packed.values.view(integers(dtype)))


def _adversarial() -> dict[str, torch.Tensor]:
    block, row, lane = (torch.zeros(80, 640) for _ in range(3))
    block[:, 128:192] = 1.5
    row[37] = -2.0
    # everything that one lane of one line holds
    lane[3::8][:2, 6:8] = 1.0
    checks = (torch.arange(80)[:, None] + torch.arange(640)) % 2
    ragged = torch.arange(640) < torch.linspace(0, 640, 80)[:, None]
    return {
        "one column block": block,
        "one full row": row,
        "one lane": lane,
        "checks": checks.float(),
        "rows from empty to full": ragged.float(),
        "full": torch.full((80, 640), 3.0),
        "empty": torch.zeros(80, 640),
    }


@pytest.mark.parametrize("kind", list(_adversarial()))
def test_round_trip_of_adversarial_weights(kind):
    weight = _adversarial()[kind].to(torch.bfloat16)
    packed = bitmap_pack(weight)
    assert_exact(packed, weight)
    # never more than the values, rounded up to 8 in each tile, one bit each and the starts
    tiles = 5 * 10
    assert packed.nbytes <= 2 * (int((weight != 0).sum()) + 7 * tiles) + 128 * tiles + 4 * tiles + 4


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_bytes_per_weight(sparsity):
    weight = torch.randn(256, 2048) * (torch.rand(256, 2048) >= sparsity)
    for dtype in (torch.bfloat16, torch.float16):
        packed = bitmap_pack(weight.to(dtype))
        per_weight = packed.nbytes / weight.numel()
        ideal = 2 * float((weight.to(dtype) != 0).double().mean()) + 1 / 8
        print(
            f"{sparsity:.1%} zeros, {dtype}: {per_weight:.4f} bytes per weight, {ideal:.4f} ideal"
        )
        assert ideal <= per_weight <= 1.12 * ideal
        really = sum(t.nbytes for t in (packed.bitmap, packed.starts, packed.values))
        assert packed.nbytes == really


def test_the_order_is_that_of_the_tensor_core_operand():
    # tile (line 1, block 2): one non-zero at a time, its bit by the formula of the PTX ISA
    for row, column in [(0, 0), (5, 3), (13, 9), (8, 38), (15, 63), (2, 48)]:
        weight = torch.zeros(32, 192, dtype=torch.float16)
        weight[16 + row, 128 + column] = 1.0
        packed = bitmap_pack(weight)
        step, inside = divmod(column, 16)
        lane = row % 8 * 4 + inside % 8 // 2
        element = inside // 8 * 4 + row // 8 * 2 + inside % 2
        words = torch.zeros(2, 3, 32, dtype=torch.int64)
        words[1, 2, lane] = 1 << (8 * step + element)
        assert torch.equal(packed.bitmap.long() & 0xFFFFFFFF, words)
        assert packed.starts.tolist() == [0] * 6 + [1]
    # values follow step, half of its columns, lane, element
    weight = torch.zeros(16, 64, dtype=torch.float16)
    for number, place in enumerate([(0, 1), (8, 1), (0, 2), (1, 0), (0, 9), (0, 16), (9, 63)]):
        weight[place] = number + 1
    assert bitmap_pack(weight).values.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.parametrize(
    ("sparsity", "most"), [(0.0, 2.0), (0.3, 2.0), (0.5, 1.3), (0.6, 1.1), (0.7, 1.05), (0.9, 1.0)]
)
def test_loads_of_a_warp_meet_few_banks_twice(sparsity, most):
    # what a load from shared memory costs: the most words that its lanes want from one bank
    packed = bitmap_pack(torch.ones(64, 1024) * (torch.rand(64, 1024) >= sparsity))
    bits = packed.bitmap[..., None] >> torch.arange(32) & 1
    used = bits.bool().view(-1, 32, 8, 4).transpose(1, 2)  # (tile, run, lane, element)
    flat = used.flatten(1).long()
    word = (flat.cumsum(1) - flat).view(used.shape) // 2
    load = used.transpose(2, 3).flatten(0, 2)  # a load is one element of one run
    word = word.transpose(2, 3).flatten(0, 2)
    wanted = torch.zeros(load.shape[0], 32 * 32, dtype=torch.bool)
    wanted[torch.arange(load.shape[0])[:, None], word % 1024 * load] = True
    wanted[:, 0] = ((word % 1024 == 0) & load).any(1)
    cost = wanted.view(-1, 32, 32).sum(1).amax(1).clamp_min(1).double().mean()
    print(f"{sparsity:.0%} zeros: {cost:.2f} passes for each load")
    assert cost <= most


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_weights_equal_packing_the_stacked_dense(dtype):
    # one part is empty, and tiles are filled up at the seams
    sparsities = {32: 0.5, 16: 1.0, 48: 0.0, 21: 0.9}
    parts = [sparse_bits(rows, 100, sparsity, dtype) for rows, sparsity in sparsities.items()]
    stacked = bitmap_cat([bitmap_pack(part) for part in parts])
    whole = bitmap_pack(torch.cat(parts))
    assert stacked.shape == (117, 100)
    assert torch.equal(stacked.bitmap, whole.bitmap) and torch.equal(stacked.starts, whole.starts)
    kind = integers(dtype)
    assert torch.equal(stacked.values.view(kind), whole.values.view(kind))
    for part, dense in zip(bitmap_split(stacked, list(sparsities)), parts, strict=True):
        assert_exact(part, dense)
        BitmapSparse.from_state_dict(part.state_dict())
        assert (
            part.values.untyped_storage().data_ptr() == stacked.values.untyped_storage().data_ptr()
        )
    for wrong in ([32, 16, 48], [30, 87]):
        with pytest.raises(ValueError, match="117 rows"):
            bitmap_split(stacked, wrong)
    a, b = bitmap_pack(parts[0]), bitmap_pack(parts[3])
    with pytest.raises(ValueError, match="multiple of 16 rows, not 21"):
        bitmap_cat([b, a])
    other = torch.float16 if dtype != torch.float16 else torch.bfloat16
    with pytest.raises(ValueError, match="pack them alike"):
        bitmap_cat([a, b.to(dtype=other)])
    with pytest.raises(ValueError, match="at least one"):
        bitmap_cat([])


def test_large_weights_go_through_in_chunks(monkeypatch):
    weight = sparse_bits(100, 320, 0.5, torch.float16)
    whole = bitmap_pack(weight)
    monkeypatch.setattr("prunekernels.sparse.bitmap.layout._CHUNK_ELEMENTS", 1)
    pieces = bitmap_pack(weight)
    assert torch.equal(pieces.bitmap, whole.bitmap) and torch.equal(pieces.starts, whole.starts)
    assert torch.equal(pieces.values.view(torch.int16), whole.values.view(torch.int16))
    assert_exact(whole, weight)
    BitmapSparse.from_state_dict(whole.state_dict())


def test_non_contiguous_and_gradient_carrying_weights():
    weight = sparse_bits(24, 40, 0.5, torch.float32).nan_to_num(1.0, 1.0, 1.0)
    strided = torch.zeros(24, 80)
    strided[:, ::2] = weight
    assert_exact(bitmap_pack(strided[:, ::2]), weight)
    assert_exact(bitmap_pack(weight.T), weight.T.contiguous())
    packed = bitmap_pack(torch.nn.Parameter(weight))
    assert not packed.values.requires_grad
    with pytest.raises(ValueError, match=r"to_dense\(\)"):
        packed.requires_grad_()


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 4, 4), torch.zeros(0, 8)])
def test_only_matrices_pack(bad):
    with pytest.raises(ValueError, match="non-empty matrix"):
        bitmap_pack(bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool])
def test_other_value_types_name_the_fix(dtype):
    with pytest.raises(ValueError, match=r"weight\.to\(torch\.bfloat16\)"):
        bitmap_pack(torch.zeros(4, 4, dtype=dtype))


def test_moves():
    weight = (torch.randn(20, 70) * (torch.rand(20, 70) < 0.3)).to(torch.float32)
    packed = bitmap_pack(weight)
    assert torch.equal(packed.to(dtype=torch.bfloat16).to_dense(), weight.to(torch.bfloat16))
    assert packed.to(dtype=torch.float16).nbytes < packed.nbytes
    assert (
        packed.to("cpu").device == torch.device("cpu") and packed.to("meta").device.type == "meta"
    )
    with pytest.raises(ValueError, match="float64"):
        packed.to(dtype=torch.float64)
    # what rounds down to nothing comes back as 0.0, not −0.0
    tiny = bitmap_pack(torch.full((1, 1), -1e-30)).to(dtype=torch.float16).to_dense()
    assert tiny.view(torch.int16).item() == 0


def test_states_that_do_not_fit_are_refused():
    state = bitmap_pack(torch.ones(16, 64, dtype=torch.bfloat16)).state_dict()

    def refused(message: str, **changes: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            BitmapSparse.from_state_dict({**state, **changes})

    with pytest.raises(ValueError, match="values"):
        BitmapSparse.from_state_dict({k: v for k, v in state.items() if k != "values"})
    # the first version has its values in another order
    for version in (1, 3):
        refused(f"version {version} is unknown", header=torch.tensor([version, 16, 64, 0]))
    refused("value type 9", header=torch.tensor([2, 16, 64, 9]))
    refused("value type 0.*float16", values=state["values"].half())
    refused("4 numbers", header=torch.tensor([2, 16]))
    refused(r"bitmap .* of shape \(2, 1, 32\)", header=torch.tensor([2, 32, 64, 0]))
    refused("starts .* int32", starts=state["starts"].long())
    refused("multiple of 8", values=state["values"][:-1])
    refused("contiguous", values=torch.ones(2048, dtype=torch.bfloat16)[::2])
    refused("on meta", values=state["values"].to("meta"))
    # sizes are right, but reading by these numbers would go wrong
    refused("do not agree", starts=torch.tensor([0, 127], dtype=torch.int32))
    refused("do not agree", starts=torch.tensor([1, 128], dtype=torch.int32))
    refused("do not agree", bitmap=torch.zeros(1, 1, 32, dtype=torch.int32))
    refused("do not agree", values=torch.ones(1032, dtype=torch.bfloat16))


def test_repr_says_what_it_holds():
    text = repr(bitmap_pack(torch.ones(16, 64, dtype=torch.bfloat16)))
    assert "shape=(16, 64)" in text and f"nbytes={2048 + 128 + 8}" in text and "bfloat16" in text
