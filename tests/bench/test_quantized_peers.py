"""Peers that quantise alone: right on a CPU, and with stand-ins for what only a GPU has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ptx
import pytest
import torch
from prunekernels.runtime import interpreting
from prunekernels.sparse.two_four.tuning import MmaConfig
from torch import Tensor

from bench import bench_sparse, bounds, dense_quantized, peers, quantized_peers
from bench.harness import Absent, Case, Prepared, Session
from bench.quantized_peers import WEIGHT_ONLY

PEERS = {peer.name: peer for peer in WEIGHT_ONLY}
ON_GPU_ALONE = ["int8 weight-only", *(name for name in PEERS if "mma_sync" in name)]


def prepared(name: str, tokens: int = 3, rows: int = 64, columns: int = 512) -> Prepared:
    """A contender of the sparse benchmark, with two copies of its weight."""
    sizes = {"M": tokens, "N": rows, "K": columns, "sparsity": 0.5}
    case = Case("linear", "2:4", "bfloat16", sizes)
    weights = bench_sparse.Weights(case, torch.bfloat16, torch.device("cpu"), lambda held: 2)
    made = {c.provider: c for c in bench_sparse.contenders(weights, case, torch.bfloat16)}
    found: Prepared = made[name].prepare()
    return found


def assert_right(found: Prepared, said: str) -> None:
    """The first copy's product passes its check, the second's does not; the note says who."""
    verdict = found.check(found.runs[0]())
    assert verdict.right and said in verdict.note
    assert not found.check(found.runs[1]()).right


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int8 weight-only pack", f"torch {torch.__version__} _weight_int8pack_mm"),
        ("int4 weight-only", "_weight_int4pack_mm_for_cpu, groups of 128"),
        ("int4 weight-only g64", "groups of 64"),
        ("int4 weight-only g256", "groups of 256"),
        ("torchao int8", "Int8WeightOnlyConfig"),
        ("torchao int4 opaque", "groups of 128"),
    ],
)
def test_what_a_cpu_can_run(name, said):
    if name.startswith("torchao"):
        pytest.importorskip("torchao")
    found = prepared(name)
    assert_right(found, said)
    (cost,) = found.cost
    # bounds leave the int8 rows' scales out
    assert found.held == pytest.approx(cost.bytes - 2 * 3 * (512 + 64), abs=4 * 64)


@pytest.mark.parametrize("name", ON_GPU_ALONE)
def test_what_needs_a_gpu_says_so(name):
    with pytest.raises(Absent, match="NVIDIA GPU"):
        prepared(name)


@pytest.mark.parametrize(
    ("name", "columns", "said"),
    [
        ("int4 weight-only", 576, "multiples of 16 × 128, not torch.bfloat16 64 × 576"),
        ("int4 weight-only tiles=2", 512, "layout on a GPU"),
        ("torchao int4 opaque", 576, "multiples of 128 columns, not torch.bfloat16 and 576"),
        ("torchao int4 plain", 512, "layout 'plain' is for cuda"),
    ],
)
def test_what_does_not_fit_is_said(name, columns, said):
    if name.startswith("torchao"):
        pytest.importorskip("torchao")
    with pytest.raises(Absent, match=said):
        prepared(name, columns=columns)


@pytest.fixture
def as_on_gpu(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """TinyGEMM's two operations on CPU tensors, with its shapes; the shapes of packed weights."""

    def shape(words: Tensor, tiles: int) -> torch.Size:
        like = torch.empty_like(words, device="meta")
        made: Tensor = torch.ops.aten._convert_weight_to_int4pack(like, tiles)
        return made.shape

    def convert(words: Tensor, tiles: int) -> Tensor:
        shapes.append(tuple(shape(words, tiles)))
        return words.clone().view(torch.int32).view(shapes[-1])

    def multiply(x: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
        rows = 8 * packed.shape[0]
        words = packed.reshape(rows, -1).view(torch.uint8)
        # the even column is in the upper half of a byte
        codes = torch.stack((words >> 4, words & 15), 2).view(rows, -1).double() - 8
        scale, zero = (part.double().t().repeat_interleave(group, 1) for part in pairs.unbind(2))
        assert pairs.dtype == x.dtype == torch.bfloat16 and pairs.shape[0] * group == x.shape[1]
        return (x.double() @ (codes * scale + zero).t()).to(x.dtype)

    shapes: list[tuple[int, ...]] = []
    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", convert, "CPU")
    library.impl("_weight_int4pack_mm", multiply, "CPU")
    monkeypatch.setattr(quantized_peers, "on_cpu", lambda weight: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield shapes
    library._destroy()


@pytest.mark.parametrize(
    ("name", "group", "tiles"),
    [
        ("int4 weight-only", 128, 8),
        ("int4 weight-only tiles=2", 128, 2),
        ("int4 weight-only tiles=4", 128, 4),
        ("int4 weight-only g64", 64, 8),
        ("int4 weight-only g256", 256, 8),
    ],
)
def test_torch_s_four_bits_as_on_a_gpu(as_on_gpu, name, group, tiles):
    found = prepared(name)
    assert_right(found, f"_weight_int4pack_mm, groups of {group}, {tiles} inner tiles")
    assert as_on_gpu == [(8, 512 // (16 * tiles), 32, tiles // 2)] * 2
    with pytest.raises(Absent, match="multiples of 8 ×"):
        prepared(name, rows=68)


def test_torchao_s_four_bits_as_on_a_gpu(as_on_gpu):
    pytest.importorskip("torchao")
    # it pads columns to 1024
    assert_right(prepared("torchao int4 tile_packed_to_4d", columns=1024), "tile_packed_to_4d")
    assert as_on_gpu == [(8, 8, 32, 4)] * 2
    for layout in ("plain", "preshuffled"):
        with pytest.raises(Absent, match=f"{layout}: .*mslk.*; pip install mslk-cuda"):
            prepared(f"torchao int4 {layout}")
    with pytest.raises(Absent, match="'opaque' is for cpu"):
        prepared("torchao int4 opaque")


def test_a_torch_without_the_int8_kernel_is_named(as_on_gpu):
    with pytest.raises(Absent, match=r"^torch 2.* has no CUDA kernel of _weight"):
        prepared("int8 weight-only pack")


def test_int8_is_compiled_for_a_gpu(monkeypatch):
    asked = []

    def compiled(function):
        asked.append(function)
        return function

    for name in ("need_gpu", "compiled", "on_cpu"):
        monkeypatch.setattr(
            quantized_peers, name, {"compiled": compiled}.get(name, lambda *_: None)
        )
    assert_right(prepared("int8 weight-only"), "compile")
    pytest.importorskip("torchao")
    assert_right(prepared("torchao int8"), "torch.compile")
    assert peers.product in asked and quantized_peers._dequantised in asked


def test_a_weight_that_is_another_one_is_not_judged_by_itself():
    weight = torch.randn(16, 256).bfloat16()
    assert torch.equal(quantized_peers.seen(lambda x: x @ weight.t(), weight), weight)
    with pytest.raises(ValueError, match="not this one in 4 bits"):
        quantized_peers.seen(lambda x: x @ weight.roll(1, 0).t(), weight)


@pytest.mark.skipif(interpreting(), reason="kernels are being interpreted")
@pytest.mark.parametrize(
    "name",
    [
        "int4 mma_sync zeros",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("int8 mma_sync", "int4 mma_sync", "int4 mma_sync g64")
        ),
    ],
)
def test_our_kernel_without_sparsity_by_a_machine(monkeypatch, name):
    monkeypatch.setattr(quantized_peers, "need_gpu", lambda weight: None)
    monkeypatch.setattr(dense_quantized, "unfit", lambda weight: "")
    config = MmaConfig(1, 1, 2, 1)
    monkeypatch.setattr(dense_quantized.mma, "configuration", lambda *form: config)
    ptx.Machine(90).take_over(monkeypatch)
    found = prepared(name, 1, 48, 288)
    assert_right(found, "kernel without sparsity")
    (cost,) = found.cost
    assert found.held == cost.bytes - 2 * (288 + 48)


def test_the_kernel_without_sparsity_says_what_it_does_not_take(monkeypatch):
    weight = torch.zeros(16, 32)
    assert dense_quantized.unfit(weight) == "activations are bfloat16 or float16, not torch.float32"
    monkeypatch.setattr(dense_quantized, "capability", lambda device: (7, 5))
    assert dense_quantized.unfit(weight.half()) == "not on compute capability (7, 5)"


@pytest.mark.parametrize("mode", bench_sparse.peers.PATTERNS)
def test_so_many_copies_of_each_weight_that_it_leaves_the_cache(tmp_path, monkeypatch, mode):
    asked: list[float] = []
    monkeypatch.setattr(Session, "copies", lambda self, size: asked.append(size) or 1)
    make = bench_sparse.maker(Session(tmp_path / "x.csv", torch.device("cpu")))
    sizes = {"M": 1, "N": 64, "K": 512, "sparsity": 0.5}
    held = []
    for contender in make(Case("linear", mode, "bfloat16", sizes)):
        with contextlib.suppress(Absent):
            held.append(contender.prepare().held)
    assert len(held) > 5 and asked == held


def test_sparsity_s_own_gain_in_the_bounds():
    on = bounds.MACHINES["H200"]
    for pruned, whole, low, high in (
        ("24 int8", "int8 mma", 1.5, 1.6),
        ("24 int4", "int4 mma", 1.25, 1.35),
    ):
        times = [bounds.bound(bounds.linear(kind, 1, 14336, 4096), on) for kind in (pruned, whole)]
        assert low < times[1].ms / times[0].ms < high
        assert [found.limit for found in times] == ["memory"] * 2
        # decoding twice the values takes about twice the instructions
        counts = [bounds.linear(kind, 1, 14336, 4096)[0].slots for kind in (pruned, whole)]
        assert 1.7 < counts[1] / counts[0] < 2.1
