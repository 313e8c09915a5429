"""Calls that are launched again with addresses alone, and results whose fields are made later."""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Iterator
from typing import Any

import prunekernels
import pytest
import torch
from prunekernels import PairStats, VectorStats, checks, pair_stats, runtime, vector_stats
from prunekernels.launch import calls as launch
from prunekernels.launch import record
from prunekernels.metrics import eager
from prunekernels.metrics.fields import Layout, pair_places, unpack_pair
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.result_rows import VECTOR_FLOATS

from bench import bench_host

fake_gpu = pytest.mark.skipif(
    not runtime.triton_installed() or runtime.interpreting(), reason="binds compiled kernels"
)
LEAD, VOCAB = (2, 3), 20000
KL = "kl_base_other"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Grid, addresses and scalars of every launch, none of which does anything."""
    found: list[tuple[Any, ...]] = []
    compiled = types.SimpleNamespace(
        function=1, packed_metadata=(), run=lambda *given: found.append((given[:3], *given[9:]))
    )
    with torch.inference_mode(), bench_host.idle_gpu():
        monkeypatch.setattr(launch.Launch, "compiled", lambda *_: compiled)
        yield found


def logits(start: int = 0) -> torch.Tensor:
    """(2, 3, V); start: elements past an aligned address."""
    flat = torch.zeros(start + 6 * VOCAB, dtype=torch.bfloat16)
    return flat[start:].view(*LEAD, VOCAB)


@fake_gpu
@pytest.mark.parametrize("impl", ["auto", "triton_warp"])
@pytest.mark.parametrize("fields", [None, ("kl_base_other",), ("flipped", "lse_base"), ("tie",)])
@pytest.mark.parametrize("start", [0, 1])
def test_a_pair_that_is_launched_again_differs_in_addresses_alone(
    launched: list[tuple[Any, ...]], impl: str, fields: tuple[str, ...] | None, start: int
) -> None:
    options: dict[str, Any] = {"fields": fields, "impl": impl, "temperature": 0.7}
    pair_stats(logits(start), logits(start), **options)
    general = launched[:]
    assert len(runtime.known("pair_stats").prepared) == 1
    del launched[:]
    base, other = logits(start), logits(start)
    found = pair_stats(base, other, **options)
    assert "_packed" in vars(found) and len(launched) == len(general) == 2
    for now, before in zip(launched, general, strict=True):
        assert now[0] == before[0] and now[7:] == before[7:]  # grids and scalars
    (_, *first), (_, *merge) = launched
    assert first[:4] == [base.data_ptr(), other.data_ptr(), None, None]
    assert first[4:6] == merge[:2]
    # parts of the scratch do not overlap (a state has twelve numbers and two sums or more)
    assert merge[1] - merge[0] >= 6 * first[8] * 4 * 14
    assert merge[5] - merge[1] >= 6 * first[8] * 2 * 8
    assert all(address % 16 == 0 for address in merge[:6])
    assert len(found._held()) == len(fields or PairStats.names())
    # the second launch fills what the result holds
    for name, place in (("kl_base_other", 2), ("argmax_base", 3), ("flipped", 4)):
        if fields is None or name in fields:
            assert getattr(found, name).data_ptr() == merge[place]
    for name, value in found.as_dict().items():
        assert value.shape == LEAD and value.is_contiguous(), name
        kind = torch.int64 if name.startswith("arg") else torch.float32
        assert value.dtype == (torch.bool if name in ("flipped", "tie", "estimate_valid") else kind)
        assert getattr(found, name) is value


@fake_gpu
def test_a_tensor_that_was_compared_with_itself_stands_for_one_side(
    launched: list[tuple[Any, ...]],
) -> None:
    for op in (pair_stats, vector_stats):
        base, other = logits(), logits()
        op(base, base)
        del launched[:]
        op(base, other)
        assert launched[0][1:3] == (base.data_ptr(), other.data_ptr())


@fake_gpu
@pytest.mark.parametrize("impl", ["auto", "triton_warp"])
def test_vectors_that_are_launched_again(launched: list[tuple[Any, ...]], impl: str) -> None:
    for fields in (None, ("alpha", "cosine")):
        del launched[:]
        vector_stats(logits(), logits(), fields=fields, impl=impl)
        base, other = logits(), logits()
        found = vector_stats(base, other, fields=fields, impl=impl)
        (grid, *before), (grid_now, *now) = launched
        assert grid == grid_now and now[4:] == before[4:]
        assert now[:3] == [base.data_ptr(), other.data_ptr(), None]
        assert found.cosine.data_ptr() == now[3]
        assert found.alpha.data_ptr() == now[3] + 3 * 6 * 4
        assert list(found.as_dict()) == [n for n in VECTOR_FLOATS if not fields or n in fields]


@fake_gpu
def test_what_is_asked_otherwise_is_checked_and_prepared_by_itself(
    launched: list[tuple[Any, ...]],
) -> None:
    base = logits()
    for _ in range(2):
        pair_stats(base, base)
    for wrong, message in (
        (dict(other=base.float()), "must have the same dtype"),
        (dict(other=base[:1]), "must have the same shape"),
        (dict(temperature=0.0), "temperature must be"),
        (dict(topk=VOCAB + 1), "topk must lie in"),
        (dict(level="high"), "level must be one of"),
        (dict(fields=("kl",)), "fields holds 'kl'"),
        (dict(fields="tie"), "fields must be a sequence"),
        (dict(impl="fast"), "impl must be one of"),
        (dict(labels=torch.full(LEAD, VOCAB)), "labels holds token id"),
        (dict(subset=[1, 1]), "token id 1 appears twice"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                pair_stats(**{"base": base, "other": base, **wrong})
    with torch.inference_mode(False), pytest.raises(ValueError, match="requires grad"):
        pair_stats(logits().requires_grad_(), logits())
    prepared = runtime.known("pair_stats").prepared
    assert len(prepared) == 1
    # other strides and other alignment are other keys
    pair_stats(base.transpose(0, 1), base.transpose(0, 1))
    strided = torch.zeros(*LEAD, 2 * VOCAB, dtype=torch.bfloat16)[..., ::2]
    pair_stats(strided, strided)
    pair_stats(logits(1), logits(1))
    assert len(prepared) == 3  # rows without a common distance need a table, made for each call


@fake_gpu
def test_a_tensor_less_aligned_than_the_first_takes_the_general_way(
    launched: list[tuple[Any, ...]],
) -> None:
    # both keys say "not both aligned", but the kernel was bound to an aligned base
    for starts in ((0, 1), (0, 1), (1, 0), (0, 1)):
        del launched[:]
        base, other = (logits(start) for start in starts)
        found = vector_stats(base, other)
        assert len(launched) == 1
        assert launched[0][1:3] == (base.data_ptr(), other.data_ptr())
        assert found.cosine.data_ptr() == launched[0][4]


@fake_gpu
def test_nothing_is_prepared_while_launches_are_recorded(launched: list[tuple[Any, ...]]) -> None:
    with record() as recorded:
        prunekernels.pair_stats(logits(), logits())
    assert len(recorded) == 2 and not launched
    assert not runtime.known("pair_stats").prepared


@pytest.mark.parametrize("op", [pair_stats, vector_stats])
@pytest.mark.parametrize("fields", [None, "first"])
def test_a_call_on_a_cpu_is_looked_over_once(
    op: Any, fields: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = torch.randn(3, 2, 4, 2500)
    names = None if fields is None else (KL if op is pair_stats else "cosine",)
    fresh = []
    for base, other in pairs:
        runtime.known(op.__name__).forget()
        fresh.append(op(base, other, fields=names).as_dict())
    seen: list[str] = []
    for check in ("floats", "alike"):
        monkeypatch.setattr(checks, check, lambda *_, check=check, **__: seen.append(check))
    for (base, other), wanted in zip(pairs, fresh, strict=True):
        found = op(base, other, fields=names).as_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert not seen
    op(pairs[0, 0, :2], pairs[0, 1, :2], fields=names)
    assert seen == ["floats", "alike"]


def results(fields: str) -> tuple[PairStats, PairStats]:
    """One result as the general way makes it, and with fields that are made later."""
    generator = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, *LEAD, 50, generator=generator)
    options = PairOptions(fields=fields)
    packed = eager.pair_stats(base, other, None, None, options)
    blocks = [block.view(block.shape[0], *LEAD) for block in packed]
    places = pair_places(options)
    names = tuple(places) if fields else PairStats.names()
    whole = unpack_pair(packed, torch.Size(LEAD), options, False)
    return whole, PairStats.later(Layout(places, names), blocks)


@pytest.mark.parametrize("fields", ["", "kl_base_other,argmax_other,tie"])
def test_fields_made_later_are_those_made_at_once(fields: str) -> None:
    def same(one: PairStats, two: PairStats) -> None:
        assert repr(one) == repr(two)
        assert list(one.as_dict()) == list(two.as_dict()) and len(one.as_dict()) > 2
        for name, value in one.as_dict().items():
            assert torch.equal(value, getattr(two, name)), name

    whole, _ = results(fields)
    for change in (
        lambda stats: stats,
        lambda stats: stats[0],
        lambda stats: stats.to("cpu", torch.float64),
        lambda stats: stats.map(torch.clone),
        lambda stats: PairStats.cat([stats, stats]),
        copy.copy,
        copy.deepcopy,
        lambda stats: pickle.loads(pickle.dumps(stats)),
    ):
        same(change(whole), change(results(fields)[1]))
    later = results(fields)[1]
    assert later.tie is later.tie and "kl_base_other" not in vars(later)
    assert later.nll_base is None if not fields else not hasattr(later, "lse_base")
    file = io.BytesIO()
    torch.save(later.as_dict(), file)
    file.seek(0)
    assert torch.equal(torch.load(file)["tie"], later.tie)


def test_what_a_later_result_lacks_is_named() -> None:
    _, later = results("kl_base_other,argmax_other,tie")
    with pytest.raises(AttributeError, match="it holds kl_base_other, argmax_other, tie; ask"):
        _ = later.lse_base
    with pytest.raises(AttributeError, match="'PairStats' object has no attribute 'kl'"):
        _ = later.kl  # type: ignore[attr-defined]
    made = VectorStats.later(Layout({"alpha": (0, 1)}, ("alpha",)), [torch.arange(4.0).view(2, 2)])
    assert made.alpha.tolist() == [2.0, 3.0]
