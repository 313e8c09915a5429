"""States of parts of the vocabulary merge into what pair_stats says of whole rows."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prunekernels import PairState, PairStats, merge, pair_state, pair_stats, reference
from rows import adversarial, broad_against_certain
from tolerances import mismatches
from torch import Tensor

CUTS = {
    "halves": (0.5,),
    "slivers": (0.001, 0.002, 0.4),
    "many": tuple(i / 11 for i in range(1, 11)),
}


def split_stats(base: Tensor, other: Tensor, cuts: tuple[float, ...], **options: Any) -> PairStats:
    """Statistics through one state per part of the vocabulary."""
    vocab = base.shape[-1]
    edges = [0, *(max(1, int(cut * vocab)) for cut in cuts), vocab]
    states = [
        pair_state(base[..., low:high], other[..., low:high], offset=low, **options)
        for low, high in pairwise(edges)
        if high > low
    ]
    return merge(states).stats()


def truth(base: Tensor, other: Tensor, **options: Any) -> dict[str, Tensor]:
    return reference.pair_stats(base.double(), other.double(), **options)


@pytest.mark.parametrize("name", list(CUTS))
@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize("weights", ["base", "other"])
def test_parts_of_the_vocabulary(weights: str, level: str, name: str) -> None:
    base = torch.randn(2, 3, 4001) * 3
    other = base + 0.3 * torch.randn(2, 3, 4001)
    other[0, 0] = base[0, 0] + 1e-4 * torch.randn(4001)
    labels = torch.tensor([[0, 4000, 17], [1999, 2000, 2001]])
    options = {"weights": weights, "level": level, "labels": labels, "temperature": 0.8}
    found = split_stats(base, other, CUTS[name], **options)
    assert found.kl_base_other.shape == (2, 3)
    wrong = mismatches(
        found.as_dict(), truth(base, other, **options), level=level, vocab=4001, temperature=0.8
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("level", ["core", "precise"])
def test_adversarial_rows(level: str) -> None:
    """Every part has its own references; the merge moves them by up to 1e4 and 80 nats."""
    cases = adversarial(1531)
    base, other = (torch.stack([pair[side] for pair in cases.values()]) for side in (0, 1))
    for cuts in (CUTS["halves"], CUTS["slivers"]):
        found = split_stats(base, other, cuts, level=level).as_dict()
        # Float32 sums of parts round one by one, each centred on a top token of its own.
        slack = 2.0 if level == "core" else 1.0
        wrong = mismatches(found, truth(base, other), level=level, vocab=1531, slack=slack)
        assert not wrong, "\n".join(wrong)
    pair = broad_against_certain(5000)
    found = split_stats(*pair, CUTS["many"], level="precise").as_dict()
    wrong = mismatches(found, truth(*pair), level="precise", vocab=5000)
    assert not wrong, "\n".join(wrong)


def test_one_part_is_pair_stats() -> None:
    base, other = torch.randn(4, 999), torch.randn(4, 999)
    for level in ("core", "precise"):
        whole = pair_stats(base, other, level=level).as_dict()
        for name, value in pair_state(base, other, level=level).stats().as_dict().items():
            torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-12, msg=name)


def test_identical_rows_stay_exactly_zero_and_one() -> None:
    base = torch.randn(3, 700) * 3 + torch.tensor([[0.0], [1e4], [-1e4]])
    for level in ("core", "precise"):
        found = split_stats(base, base.clone(), CUTS["many"], level=level)
        for name in ("kl_base_other", "kl_other_base", "one_minus_cos_prob", "uniform_variance"):
            assert bool((getattr(found, name) == 0).all()), name
        assert bool((found.cos_prob == 1).all()) and bool((found.cos_logit == 1).all())


def test_the_order_of_parts_and_of_merges_does_not_matter() -> None:
    base, other = torch.randn(3, 900), torch.randn(3, 900)
    cuts = ((0, 300), (300, 500), (500, 900))
    states = [pair_state(base[:, a:b], other[:, a:b], offset=a) for a, b in cuts]
    whole = merge(states).stats().as_dict()
    nested = merge([states[2], merge([states[1], states[0]])]).stats().as_dict()
    for name, value in whole.items():
        torch.testing.assert_close(nested[name], value, rtol=1e-6, atol=1e-12, msg=name)
    again = merge(states).stats().as_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("level", ["core", "precise"])
def test_excluded_and_broken_elements(level: str) -> None:
    base, other = torch.randn(8, 900), torch.randn(8, 900)
    base[0, 5] = other[0, 5] = -math.inf
    base[1, 7], other[2, 800] = -math.inf, -math.inf
    base[3, 3], other[4, 700], base[5, 899] = math.nan, math.inf, -math.inf
    base[6, :450] = other[6, :450] = -math.inf  # nothing at all in the first half
    base[7, :450] = -math.inf
    labels = torch.full((8,), 600)
    found = split_stats(base, other, (0.5,), level=level, labels=labels).as_dict()
    wanted = truth(base, other, labels=labels)
    wrong = mismatches(found, wanted, level=level, vocab=900)
    assert not wrong, "\n".join(wrong)
    nothing = torch.full((1, 10), -math.inf)
    empty = pair_state(nothing, nothing).stats()
    assert empty.argmax_base.tolist() == [-1] and bool(empty.kl_base_other.isnan())


def test_ties_across_parts_go_to_the_lower_id() -> None:
    base = torch.tensor([[1.0, 5.0, 0.0, 5.0, 2.0]])
    other = torch.tensor([[0.0, 1.0, 3.0, 2.0, 3.0]])
    found = split_stats(base, other, (0.6,))
    assert (found.argmax_base.item(), found.argmax_other.item()) == (1, 2)
    assert found.margin_base.item() == found.margin_other.item() == 0.0
    assert bool(found.tie)
    reverse = [
        pair_state(base[:, 3:], other[:, 3:], offset=3),
        pair_state(base[:, :3], other[:, :3]),
    ]
    assert merge(reverse).stats().argmax_base.item() == 1


def test_a_label_that_no_part_holds_is_nan() -> None:
    base, other = torch.randn(2, 50), torch.randn(2, 50)
    labels = torch.tensor([3, 77])
    found = split_stats(base, other, (0.5,), labels=labels)
    assert found.nll_base is not None and found.nll_base.isnan().tolist() == [False, True]
    assert found.kl_base_other.isfinite().all()


def test_no_rows_and_opcheck_and_fullgraph() -> None:
    empty = torch.empty(2, 0, 9)
    assert pair_state(empty, empty).stats().kl_base_other.shape == (2, 0)
    base, other = torch.randn(2, 40), torch.randn(2, 40)
    torch.library.opcheck(
        torch.ops.prunekernels.pair_state.default,
        (base, other, torch.tensor([3, 41]), 1.0, "precise", "other", 7, "", "auto"),
    )

    def both(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        states = [pair_state(a[:, :20], b[:, :20]), pair_state(a[:, 20:], b[:, 20:], offset=20)]
        return merge(states).stats().as_dict()

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for name, value in both(base, other).items():
        torch.testing.assert_close(compiled(base, other)[name], value, rtol=1e-6, atol=1e-9)


def _shard(rank: int, world: int, port: int, folder: str) -> None:
    """One process: its columns of every row, then whole rows of its own."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.manual_seed(0)
    base, other = torch.randn(6, 500), torch.randn(6, 500)
    labels = torch.arange(6) * 90
    low, high = (0, 170) if rank == 0 else (170, 500)
    state = pair_state(base[:, low:high], other[:, low:high], offset=low, labels=labels)
    data = [torch.empty_like(state.data) for _ in range(world)]
    dist.all_gather(data, state.data)
    stats = merge([state.with_data(part) for part in data]).stats()
    mine = pair_stats(base[rank::world], other[rank::world])
    parts: list[PairStats] = [mine] * world
    dist.all_gather_object(parts, mine)
    rows = PairStats.cat(parts)
    torch.save((stats.as_dict(), rows.as_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_with_a_shard_each(tmp_path: Any) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_shard, (2, port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    base, other = torch.randn(6, 500), torch.randn(6, 500)
    wanted = truth(base, other, labels=torch.arange(6) * 90)
    for rank in range(2):
        columns, rows = torch.load(tmp_path / f"{rank}.pt")
        assert not mismatches(columns, wanted, vocab=500)
        order = [0, 2, 4, 1, 3, 5]
        assert not mismatches(rows, {name: x[order] for name, x in wanted.items()}, vocab=500)


def bad_calls() -> dict[str, tuple[Any, str]]:
    rows = torch.zeros(2, 9)
    state = pair_state(rows, rows)
    return {
        "full": (lambda: pair_state(rows, rows, level="full"), "'full' cannot be merged"),
        "offset": (lambda: pair_state(rows, rows, offset=-3), "offset must be .* got -3"),
        "shapes": (lambda: pair_state(rows, rows[:1]), r"\(2, 9\) and \(1, 9\)"),
        "temperature": (lambda: pair_state(rows, rows, temperature=0), "above 0, got 0"),
        "nothing": (lambda: merge([]), "pass at least one"),
        "kinds": (
            lambda: merge([state, pair_state(rows, rows, temperature=2.0)]),
            "same temperature, got 1.0 and 2.0",
        ),
        "levels": (
            lambda: merge([state, pair_state(rows, rows, level="precise")]),
            "same level, got core and precise",
        ),
        "rows": (lambda: merge([state, pair_state(rows[:1], rows[:1])]), r"\(2, .* and \(1,"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_input_names_both_values(name: str) -> None:
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_states_of_another_process_keep_their_kind() -> None:
    rows = torch.randn(2, 9)
    state = pair_state(rows, rows, temperature=2.0, level="precise", weights="other")
    moved = state.with_data(state.data.clone())
    assert isinstance(moved, PairState)
    assert (moved.temperature, moved.level, moved.weights) == (2.0, "precise", "other")
