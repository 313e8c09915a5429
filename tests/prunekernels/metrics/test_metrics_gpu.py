"""The metric kernels on a real NVIDIA GPU: values, graph capture, memory, sizes beyond 2³¹."""

from __future__ import annotations

from typing import Any

import accuracy
import pytest
import torch
from prunekernels import head_pair_stats, merge, pair_state, pair_stats, reference, vector_stats
from prunekernels.metrics import eager, tuning
from prunekernels.runtime import Problem, known
from rows import adversarial, for_splits
from tolerances import worse_than_allowed
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

VOCABS = [1, 17, 4096, 50257, 151936, 262144]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(rows: int, vocab: int, dtype: torch.dtype, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    base = torch.randn(rows, vocab, device="cuda") * 3
    other = base + noise * torch.randn(rows, vocab, device="cuda")
    return base.to(dtype), other.to(dtype)


IMPLS = ("triton", "triton_warp")


def as_good_as_eager(
    found: dict[str, Tensor], base: Tensor, other: Tensor, impl: str = "triton", **options: Any
) -> None:
    """As near float64 as the table, eager's own error and a GPU's exponentials allow; ids equal."""
    design = "warp" if impl == "triton_warp" else "tile"
    precise = options.get("level", "core") != "core"
    rows, itemsize = base.numel() // base.shape[-1], base.element_size()
    config = tuning.pair_config(
        rows, base.shape[-1], itemsize, precise=precise, every=True, design=design
    )
    tile = tuning.tile_columns(config, base.dtype == torch.bfloat16)
    worse = worse_than_allowed(found, base, other, tile=tile, approximate=True, **options)
    assert not worse, worse


def test_auto_is_the_kernel() -> None:
    problem = Problem(torch.device("cuda"), torch.float32)
    for op in ("pair_stats", "pair_state", "head_pair_stats", "vector_stats"):
        assert known(op).select(problem).name == "triton"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["pair_stats", "vector_stats"])
def test_a_call_that_is_launched_again_gives_the_same_bits(name: str, impl: str) -> None:
    op = {"pair_stats": pair_stats, "vector_stats": vector_stats}[name]
    tensors, others = (pair(5, 50257, torch.bfloat16) for _ in range(2))
    known(name).forget()
    first = op(*tensors, impl=impl)
    assert "_packed" not in vars(first)
    op(*others, impl=impl)
    again = op(*tensors, impl=impl)
    assert "_packed" in vars(again)
    for field, value in first.as_dict().items():
        assert torch.equal(getattr(again, field), value), field


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["core", "precise", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values(vocab: int, dtype: torch.dtype, level: str, impl: str) -> None:
    for noise in (1.0, 0.2, 0.003):
        base, other = pair(5, vocab, dtype, noise)
        labels = torch.randint(0, vocab, (5,), device="cuda")
        options: dict[str, Any] = {"labels": labels, "level": level, "temperature": 0.9}
        found = pair_stats(base, other, impl=impl, **options).as_dict()
        as_good_as_eager(found, base, other, impl, **options)
        again = pair_stats(base, other, impl=impl, **options).as_dict()
        assert all(torch.equal(again[name], x) or x.isnan().any() for name, x in found.items())


@pytest.mark.parametrize("level", ["core", "precise", "full"])
@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("impl", IMPLS)
def test_accuracy_table(vocab: int, kind: str, level: str, impl: str) -> None:
    base, other = accuracy.pair(kind, vocab, device="cuda")
    accuracy.check_pair(impl, base, other, level)


@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_accuracy_table_of_heads(vocab: int, level: str) -> None:
    assert tuning.head_fused(len(accuracy.STEPS), True)
    accuracy.check_head("triton", vocab, level, device="cuda")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("splits", range(1, 38))
def test_every_number_of_splits(splits: int, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that have a tile for each, as near the truth as the table allows, and repeatable."""
    config = tuning.PairConfig(lanes=128, units=1, num_warps=4)
    if impl == "triton_warp":
        config = tuning.PairConfig(lanes=32, units=4, num_warps=1, design="warp")
    monkeypatch.setattr(tuning, "pair_config", lambda *_, **__: config)
    tile = 4 * config.lanes
    size = 37 * tile + 13
    cases = for_splits(size, tile, splits)
    labels = torch.tensor([size - 1], device="cuda")
    for name, rows in cases.items():
        base, other = (row[None].cuda() for row in rows)
        level = "core" if "alone" in name else "precise"
        got = accuracy.of_splits(base, other, labels, splits, level, impl)
        worse = worse_than_allowed(got, base, other, tile=tile, level=level, labels=labels)
        assert not worse, (name, worse)
        again = accuracy.of_splits(base, other, labels, splits, level, impl)
        assert all(torch.equal(again[n].nan_to_num(7), x.nan_to_num(7)) for n, x in got.items())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 3, 130, 2048])
def test_rows_that_share_the_machine_differently(rows: int, impl: str) -> None:
    base, other = pair(rows, 50257, torch.bfloat16)
    found = pair_stats(base, other, impl=impl).as_dict()
    as_good_as_eager(found, base, other, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["core", "precise"])
def test_adversarial_rows(level: str, impl: str) -> None:
    """Fields with a bound wherever the references lie; the interpreter tests hold all."""
    cases = adversarial(4096 * 5 + 200)
    base, other = (torch.stack([p[side] for p in cases.values()]).cuda() for side in (0, 1))
    found = pair_stats(base, other, level=level, impl=impl).as_dict()
    exact = reference.pair_stats(base.double(), other.double())
    for name in ("kl_base_other", "kl_other_base", "cos_prob", "cos_logit", "lse_base"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-5, atol=3e-6)
    for name in ("argmax_base", "argmax_other", "flipped", "tie"):
        assert torch.equal(found[name], exact[name]), name
    same = pair_stats(base, base.clone(), level=level, impl=impl)
    assert (same.kl_base_other == 0).all() and (same.cos_prob == 1).all()


@pytest.mark.parametrize("level", ["core", "precise"])
def test_temperature_scales_exactly_and_rows_swap(level: str) -> None:
    base, other = pair(3, 50257, torch.float32)
    first = pair_stats(base, other, temperature=0.7, level=level).as_dict()
    twice = pair_stats(2 * base, 2 * other, temperature=1.4, level=level).as_dict()
    options: dict[str, Any] = {"temperature": 0.7, "level": level, "weights": "other"}
    back = pair_stats(other, base, **options).as_dict()
    for name in ("kl_base_other", "kl_other_base", "entropy_base", "cos_prob", "kl_estimate"):
        assert torch.equal(twice[name], first[name]), name
    for name, swapped in (
        ("kl_base_other", "kl_other_base"),
        ("kl_other_base", "kl_base_other"),
        ("entropy_base", "entropy_other"),
        ("cos_prob", "cos_prob"),
        ("kl_estimate", "kl_estimate"),
    ):
        torch.testing.assert_close(first[name], back[swapped], rtol=1e-5, atol=3e-7)


def test_broken_and_excluded_elements() -> None:
    base, other = pair(7, 50000, torch.float32)
    inf = float("inf")
    base[0, 5] = other[0, 5] = -inf
    base[1, 49999], other[2, 30000] = -inf, -inf
    base[3, 3], other[4, 41000] = float("nan"), inf
    base[5] = -inf
    for level in ("core", "full"):
        found = pair_stats(base, other, level=level, impl="triton").as_dict()
        as_good_as_eager(found, base, other, level=level)


def test_top_tokens_and_subset() -> None:
    base, other = pair(6, 50257, torch.bfloat16)
    options = {"topk": 8, "subset": torch.tensor([9, 50256, 3], device="cuda"), "level": "full"}
    found = pair_stats(base, other, impl="triton", **options).as_dict()
    wanted = pair_stats(base, other, impl="eager", **options).as_dict()
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=3e-6, msg=name)
        else:
            assert torch.equal(found[name], value), name


def test_states_of_shards_merge() -> None:
    base, other = pair(4, 151936, torch.bfloat16)
    labels = torch.tensor([0, 70000, 70001, 151935], device="cuda")
    cuts = ((0, 70001), (70001, 70002), (70002, 151936))
    states = [pair_state(base[:, a:b], other[:, a:b], offset=a, labels=labels) for a, b in cuts]
    found = merge(states).stats().as_dict()
    as_good_as_eager(found, base, other, labels=labels)


@pytest.mark.parametrize("rows", [1, 40])
def test_graph_capture(rows: int) -> None:
    base, other = pair(rows, 50257, torch.bfloat16)
    hidden, head = torch.randn(2, rows, 256, device="cuda"), torch.randn(5000, 256, device="cuda")
    hidden, head = hidden.bfloat16(), head.bfloat16()
    labels = torch.zeros(rows, dtype=torch.int64, device="cuda")
    subset = torch.tensor([4, 50256, 9], device="cuda")

    def everything() -> list[dict[str, Tensor]]:
        return [
            pair_stats(base, other).as_dict(),
            pair_stats(base, other, level="full", topk=5, labels=labels, subset=subset).as_dict(),
            pair_stats(base, other, fields=("kl_base_other", "flipped")).as_dict(),
            head_pair_stats(hidden[0], hidden[1], head).as_dict(),
            vector_stats(hidden[0], hidden[1]).as_dict(),
            pair_stats(base, other, level="full", impl="triton_warp").as_dict(),
            vector_stats(hidden[0], hidden[1], impl="triton_warp").as_dict(),
        ]

    everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = everything()
    for scale in (1.0, 0.5):
        other.mul_(scale)
        hidden[1].mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        for captured, fresh in zip(found, everything(), strict=True):
            for name, value in fresh.items():
                assert torch.equal(captured[name], value), name


@pytest.mark.parametrize("impl", IMPLS)
def test_more_than_two_to_the_31_logits(impl: str) -> None:
    rows, vocab = 14200, 152064
    assert rows * vocab > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * rows * vocab * 2:
        pytest.skip(f"{free >> 30} GiB free")
    base = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    other = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    found = pair_stats(base, other, impl=impl).as_dict()
    few = [0, 7000, rows - 1]
    as_good_as_eager({name: x[few] for name, x in found.items()}, base[few], other[few], impl)


@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (48, 4096), (200, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads(rows: int, width: int, dtype: torch.dtype) -> None:
    base = torch.randn(rows, width, device="cuda").to(dtype)
    other = (base + 0.1 * torch.randn(rows, width, device="cuda")).to(dtype)
    head = (torch.randn(50257, width, device="cuda") * 3 / width**0.5).to(dtype)
    options: dict[str, Any] = {
        "norm_weight": (torch.rand(width, device="cuda") + 0.5).to(dtype),
        "bias": torch.randn(50257, device="cuda").to(dtype),
        "softcap": 20.0,
        "logit_scale": 0.9,
        "labels": torch.randint(0, 50257, (rows,), device="cuda"),
    }
    found = head_pair_stats(base, other, head, impl="triton", **options).as_dict()
    wanted = head_pair_stats(base, other, head, impl="eager", level="precise", **options).as_dict()
    for name, value in wanted.items():
        if value.is_floating_point() and not name.startswith("margin"):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert (found["argmax_base"] == wanted["argmax_base"]).float().mean() > 0.97


def test_head_memory_is_under_a_percent_of_the_logits() -> None:
    rows, width, vocab = 16384, 1024, 152064
    hidden = torch.randn(2, rows, width, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)
    head_pair_stats(hidden[0], hidden[1], head)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_pair_stats(hidden[0], hidden[1], head)
    peak = torch.cuda.max_memory_allocated() - before
    materialised = 2 * rows * vocab * 4
    print(f"{peak / 2**20:.0f} MiB extra, {100 * peak / materialised:.2f} % of the logits")
    assert peak < 0.01 * materialised


def test_pair_memory_does_not_grow_with_the_vocabulary() -> None:
    base, other = pair(512, 152064, torch.bfloat16)
    pair_stats(base, other)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pair_stats(base, other)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * (base.nbytes + other.nbytes)


@pytest.mark.parametrize("impl", IMPLS)
def test_vectors_of_all_layers_in_one_launch(impl: str) -> None:
    base = torch.randn(32, 7, 4096, device="cuda", dtype=torch.bfloat16)
    other = base + 0.05 * torch.randn_like(base)
    found = vector_stats(base, other, impl=impl).as_dict()
    exact = reference.vector_stats(base.double(), other.double())
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=1e-7, msg=name)
    packed = eager.vector_stats(base, other)
    assert packed.shape == (8, 32 * 7)
