"""The bitmap format alone: every sparsity, sizes, the order of values, states, version 2."""

from __future__ import annotations

import pytest
import torch
from former_bitmaps import version_2
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_formats import DTYPES, assert_same_bits, integers
from prunekernels.sparse.bitmap.format import BitmapSparse, bitmap_pack
from prunekernels.sparse.bitmap.layout import words_of

SPARSITIES = [0.0, 0.01, 0.3, 0.5, 0.6, 0.7, 0.9, 0.99, 0.999, 1.0]


def sparse_bits(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> torch.Tensor:
    """Random patterns (NaN, infinities, subnormals included); half of the zeros are negative."""
    kind = integers(dtype)
    lowest = torch.iinfo(kind).min
    bits = torch.randint(lowest, -lowest, (rows, columns)).to(kind)
    empty = torch.where(torch.rand(rows, columns) < 0.5, lowest, 0).to(kind)
    return torch.where(torch.rand(rows, columns) < sparsity, empty, bits).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_round_trip_at_every_sparsity(dtype, sparsity):
    for rows, columns in ((96, 1024), (33, 330), (1, 1)):
        weight = sparse_bits(rows, columns, sparsity, dtype)
        packed = bitmap_pack(weight)
        assert packed.shape == (rows, columns) and packed.dtype == dtype
        assert_same_bits(packed.to_dense(), weight)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_rows_that_differ_come_back(rows, columns, dtype, seed):
    torch.manual_seed(seed)
    # about half of them are empty
    density = torch.rand(rows, 1).mul(2).sub(1).clamp(min=0)
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
    packed = bitmap_pack(weight.to(dtype))
    assert_same_bits(packed.to_dense(), weight.to(dtype))
    assert_same(BitmapSparse.from_state_dict(packed.state_dict()), packed)


def assert_same(a: BitmapSparse, b: BitmapSparse) -> None:
    assert torch.equal(a.records, b.records) and torch.equal(a.starts, b.starts)
    assert (a.shape, a.dtype, a.chunks) == (b.shape, b.dtype, b.chunks)


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
    assert_same_bits(packed.to_dense(), weight)
    # never more than the values, rounded up to 8 in each tile, one bit each and the starts
    tiles = 5 * 5
    assert packed.nbytes <= 2 * (int((weight != 0).sum()) + 7 * tiles) + 256 * tiles + 4 * tiles + 4
    # a full record takes 9 chunks, an empty one 1
    assert packed.chunks == {"full": 9, "empty": 1}.get(kind, packed.chunks)


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
        assert ideal <= per_weight <= 1.06 * ideal
        assert packed.nbytes == packed.records.nbytes + packed.starts.nbytes


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 1.13), (0.6, 0.93), (0.7, 0.73)])
def test_bytes_per_weight_of_a_large_layer(sparsity, most):
    # 14336 × 4096 is 896 lines like these 16
    rows, columns = 256, 4096
    weight = torch.randn(rows, columns).bfloat16()
    keep = torch.rand(rows, columns).argsort(1).argsort(1) >= round(sparsity * columns)
    packed = bitmap_pack(weight * keep)
    assert packed.records.nbytes / weight.numel() <= most
    # an int32 of starts for each of the 2048 weights of a tile
    assert packed.nbytes / weight.numel() <= most + 4 / 2048


def test_the_order_is_that_of_the_tensor_core_operand():
    # tile (line 1, stage 1): one non-zero at a time, its bit by the formula of the format
    for row, column in [(0, 0), (5, 3), (13, 9), (8, 38), (15, 127), (2, 64), (7, 31), (4, 12)]:
        weight = torch.zeros(32, 256, dtype=torch.float16)
        weight[16 + row, 128 + column] = 1.0
        packed = bitmap_pack(weight)
        block, inside = divmod(column, 64)
        p, t, s, u, c = (
            inside >> bit & mask for bit, mask in ((5, 1), (3, 3), (2, 1), (1, 1), (0, 1))
        )
        lane, bit = 4 * (row % 8) + t, 8 * (2 * p + s) + 4 * u + 2 * (row // 8) + c
        words = torch.zeros(64, dtype=torch.int64)
        words[2 * lane + block] = 1 << bit
        # three empty records are words alone
        assert packed.starts.tolist() == [0, 16, 32, 48, 65]
        assert torch.equal(packed.records[48:64].flatten().long() & 0xFFFFFFFF, words)
        assert packed.records[64].view(torch.float16).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    # values follow block, step, u, lane, h, c
    weight = torch.zeros(16, 128, dtype=torch.float16)
    places = [(0, 1), (8, 1), (0, 8), (1, 0), (0, 3), (0, 4), (0, 33), (9, 63), (3, 64)]
    for number, place in enumerate(places):
        weight[place] = number + 1
    values = bitmap_pack(weight).records[16:].view(torch.float16).flatten()
    assert values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("sparsity", "most"), [(0.0, 2.0), (0.3, 2.0), (0.5, 1.3), (0.6, 1.1), (0.7, 1.05), (0.9, 1.0)]
)
def test_loads_of_a_warp_meet_few_banks_twice(sparsity, most):
    # what a load from shared memory costs: the most words that its lanes want from one bank
    packed = bitmap_pack(torch.ones(64, 1024) * (torch.rand(64, 1024) >= sparsity))
    words = words_of(packed.records, packed.starts[:-1])
    bits = words[..., None] >> torch.arange(32) & 1
    # (tile, block and run, lane, element)
    used = bits.bool().view(-1, 32, 16, 4).transpose(1, 2)
    flat = used.flatten(1).long()
    word = (flat.cumsum(1) - flat).view(used.shape) // 2
    load = used.transpose(2, 3).flatten(0, 2)  # a load is one element of one run
    word = word.transpose(2, 3).flatten(0, 2)
    wanted = torch.zeros(load.shape[0], 32 * 32, dtype=torch.bool)
    wanted[torch.arange(load.shape[0])[:, None], word * load] = True
    wanted[:, 0] = ((word == 0) & load).any(1)
    cost = wanted.view(-1, 32, 32).sum(1).amax(1).clamp_min(1).double().mean()
    print(f"{sparsity:.0%} zeros: {cost:.2f} passes for each load")
    assert cost <= most


def test_large_weights_go_through_in_chunks(monkeypatch):
    weight = sparse_bits(100, 320, 0.5, torch.float16)
    whole = bitmap_pack(weight)
    monkeypatch.setattr("prunekernels.sparse.bitmap.layout._CHUNK_ELEMENTS", 1)
    pieces = bitmap_pack(weight)
    assert_same(pieces, whole)
    assert_same_bits(whole.to_dense(), weight)
    BitmapSparse.from_state_dict(whole.state_dict())


def test_states_that_do_not_fit_are_refused():
    state = bitmap_pack(torch.ones(16, 64, dtype=torch.bfloat16)).state_dict()
    assert state["header"].tolist() == [3, 16, 64, 0] and len(state["room"]) == 5
    # 16 units of words and 128 of values
    assert state["records"].shape == (144, 4)

    def refused(message: str, **changes: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            BitmapSparse.from_state_dict({**state, **changes})

    with pytest.raises(ValueError, match="records"):
        BitmapSparse.from_state_dict({k: v for k, v in state.items() if k != "records"})
    # the first version has its values in another order
    for version in (1, 4):
        header = torch.tensor([version, 16, 64, 0])
        refused(rf"version {version} is unknown \(this build reads 2 and 3\)", header=header)
    refused("value type 9", header=torch.tensor([3, 16, 64, 9]))
    refused("4 numbers, not 2", header=torch.tensor([3, 16]))
    refused(r"starts .* of shape \(3,\)", header=torch.tensor([3, 32, 64, 0]))
    refused("starts .* int32", starts=state["starts"].long())
    refused(r"\(units, 4\)", records=state["records"].view(-1))
    refused("contiguous", records=torch.ones(4, 144, dtype=torch.int32).t())
    refused("on meta", starts=state["starts"].to("meta"))
    # sizes are right, but reading by these numbers would go wrong
    for starts in ([0, 143], [1, 144], [0, 145], [0, -1]):
        refused("do not agree", starts=torch.tensor(starts, dtype=torch.int32))
    refused("do not agree", records=torch.zeros(144, 4, dtype=torch.int32))
    refused("do not agree", records=torch.ones(145, 4, dtype=torch.int32))
    refused("do not agree", header=torch.tensor([3, 16, 64, 2]))
    # copies of so many pieces would lose values, or take room for nothing
    for chunks in (4, 6):
        room = torch.zeros(chunks, dtype=torch.int8)
        refused(f"takes 5 chunks of 512 bytes, there is room for {chunks}", room=room)
    for chunks in (0, 10):
        room = torch.zeros(chunks, dtype=torch.int8)
        refused(f"1 to 9 chunks of 512 bytes, not {chunks}", room=room)


@pytest.mark.parametrize("dtype", DTYPES)
def test_version_2_is_read_and_converted(dtype, monkeypatch):
    monkeypatch.setattr("prunekernels.sparse.bitmap.layout._CHUNK_ELEMENTS", 1)
    weight = sparse_bits(37, 200, 0.6, dtype)
    weight[20:, :64] = 0
    state = version_2(weight)
    read = BitmapSparse.from_state_dict(state)
    assert read.version == 3
    assert_same(read, bitmap_pack(weight))

    def refused(message: str, **changes: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            BitmapSparse.from_state_dict({**state, **changes})

    refused("other tensors", header=torch.tensor([2, 64, 200, state["header"][3]]))
    refused("other tensors", values=state["values"].to(torch.float64))
    refused("do not agree", bitmap=torch.zeros_like(state["bitmap"]))
    refused("do not agree", values=state["values"][:-8])
    with pytest.raises(ValueError, match=r"lacks .*values"):
        BitmapSparse.from_state_dict({k: v for k, v in state.items() if k != "values"})


def test_kept_values_are_all_values_that_are_not_zero():
    weight = sparse_bits(50, 300, 0.7, torch.float16).nan_to_num(1.0, 1.0, 1.0)
    (kept,) = bitmap_pack(weight).kept_values()
    assert torch.equal(kept.sort().values, weight[weight != 0].sort().values)
