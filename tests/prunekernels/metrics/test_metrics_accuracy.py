"""How near the metrics are to float64: vocabulary sizes, the fused head, splits.

Kernels run in Triton's interpreter; eager is held to the same table in the process as it is.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import STEPS, check_head, check_pair, of_splits, pair
from interpreter import IMPL, run_interpreted
from prunekernels import pair_stats
from prunekernels.metrics import tuning
from prunekernels.runtime import interpreting
from rows import adversarial, for_splits, one_hot
from tolerances import allowed, worse_than_allowed

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="not of the interpreter's process")
LARGE = (151936, 262144)
#: Types of the logits and what is added to base and other: b'−a' rounds there, and b−a may.
SHIFTS = [
    (torch.float32, (0.0, 3.0)),
    (torch.float32, (100.0, 0.0)),
    (torch.bfloat16, (0.0, 0.0)),
    (torch.float16, (0.0, -3.0)),
]


@compiled
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__)


@compiled
@pytest.mark.slow
def test_slow_ones_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__, "-m", "slow")


@compiled
@pytest.mark.slow
def test_all_by_warps_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__, "-m", "slow or not slow", "-k", "not head", impl="triton_warp")


@interpreted
@pytest.mark.parametrize("level", ["core", "full"])
@pytest.mark.parametrize("vocab", [1, 17, 4096])
def test_kernels(vocab, level):
    check_pair(IMPL, *pair("peaked", vocab), level)


@interpreted
@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize(("dtype", "offsets"), SHIFTS)
def test_kernels_of_shifted_and_of_half_precision_rows(dtype, offsets, level):
    base, other = pair("peaked", 4096, (4.5e-4, 4.5e-3), dtype=dtype, offsets=offsets)
    check_pair(IMPL, base, other, level)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab", "kind", "level", "noise", "dtype"),
    [
        (151936, "peaked", "core", 4.5e-4, torch.float32),
        (151936, "peaked", "core", 4.5e-3, torch.bfloat16),
        (151936, "peaked", "precise", 4.5e-4, torch.float32),
        (151936, "peaked", "full", 4.5e-4, torch.float32),
        (262144, "peaked", "core", 4.5e-3, torch.float32),
        (262144, "flat", "precise", 4.5e-4, torch.float32),
    ],
)
def test_kernels_at_large_vocabularies(vocab, kind, level, noise, dtype):
    check_pair(IMPL, *pair(kind, vocab, (noise,), dtype=dtype), level)


@interpreted
@pytest.mark.slow
def test_kernels_of_long_rows_with_nothing_in_common():
    """Σab is small beside ‖a‖‖b‖: a lane that adds 1188 terms in a row lost 2e-6 of that."""
    base, other = torch.randn(2, 1, 152064).bfloat16()
    got = pair_stats(base, other, impl=IMPL).as_dict()
    assert not worse_than_allowed(got, base, other)


@compiled
@pytest.mark.parametrize("level", ["core", "full"])
@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize(
    "vocab", [1, 17, 4096, 50257, *(pytest.param(v, marks=pytest.mark.slow) for v in LARGE)]
)
def test_eager(vocab, kind, level):
    check_pair("eager", *pair(kind, vocab), level)


@compiled
@pytest.mark.parametrize(("dtype", "offsets"), SHIFTS)
def test_eager_of_shifted_and_of_half_precision_rows(dtype, offsets):
    check_pair("eager", *pair("peaked", 4096, dtype=dtype, offsets=offsets), "core")


@compiled
@pytest.mark.parametrize("seed", range(4))
def test_eager_entropies_of_a_few_likely_tokens(seed):
    """What is small comes after what is large: one long float32 sum rounds it away."""
    random = torch.Generator().manual_seed(seed)
    likely = torch.rand(64, 1, generator=random) * 14
    base = torch.randn(64, 50257, generator=random) * 2.5
    base[:, :4] += likely
    got = pair_stats(base, base.roll(1, 0), fields=("entropy_base", "margin_base"), impl="eager")
    logs = base.double().log_softmax(-1)
    truth = {"entropy_base": -(logs.exp() * logs).sum(-1)}
    off = (got.entropy_base.double() - truth["entropy_base"]).abs()
    assert (off <= allowed("entropy_base", truth, vocab=base.shape[1])).all(), off.max()


@interpreted
@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize("vocab", [1, 17, pytest.param(1000, marks=pytest.mark.slow)])
def test_head(vocab, level):
    """The interpreter takes two minutes for 150,000 tokens: test_metrics_gpu.py has those."""
    assert tuning.head_fused(len(STEPS), True)
    check_head("triton", vocab, level)


@compiled
@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize(
    "vocab", [1, 17, 4096, 50257, *(pytest.param(v, marks=pytest.mark.slow) for v in LARGE)]
)
def test_eager_head(vocab, level):
    check_head("eager", vocab, level)


LANES = 8
TILE = 4 * LANES


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a short row has a tile for each of 37 splits."""
    small = tuning.PairConfig(lanes=LANES, units=1, num_warps=4)
    monkeypatch.setattr(
        tuning, "pair_config", lambda *_, design="tile", **__: small._replace(design=design)
    )


def check_splits(base, other, splits, level="precise", ties=None):
    """Any number of splits is as near the truth as the table allows, and labels are found once.

    ties: the row, if any, whose terms are nearly all equal: then additions in a lane round alike,
    each partial sum by 2⁻²⁴ at most, which makes 2⁻²⁵ per addition of Σw and of Σw·ln w, whose
    terms are 4 there.
    """
    labels = torch.full(base.shape[:-1], base.shape[-1] - 1)
    got = of_splits(base, other, labels, splits, level, IMPL)
    alike = (1 + 4) * 2.0**-25 * base.shape[-1] / LANES / splits
    for name, row, off, limit, truth in worse_than_allowed(
        got, base, other, tile=TILE, level=level, labels=labels
    ):
        more = alike if row == ties else 0.0
        assert off <= limit + more, (splits, name, row, off, limit + more, truth)
    return got


SIZE = 37 * TILE + 13


def check_adversarial(splits, count):
    """`count` adversarial rows, others for each number of splits."""
    cases = adversarial(SIZE)
    rows = [(splits * count + i) % len(cases) for i in range(count)]
    chosen = [list(cases.values())[row] for row in rows]
    base, other = (torch.stack([both[side] for both in chosen]) for side in (0, 1))
    ties = list(cases).index("ties")
    check_splits(base, other, splits, ties=rows.index(ties) if ties in rows else None)


def check_split_rows(splits, name):
    """One of the rows of `for_splits`.

    Where one row alone lacks a column, a KL is infinite and the other is core's: the mass that only
    one of them has is not small against 1, and φ's sums have nothing to keep.
    """
    base, other = for_splits(SIZE, TILE, splits)[name]
    level = "core" if "alone" in name else "precise"
    return check_splits(base[None], other[None], splits, level)


SPLIT_ROWS = list(for_splits(SIZE, TILE, 1))


@interpreted
@pytest.mark.parametrize("splits", [5, 18])
def test_splits_of_adversarial_rows(splits, small_tiles):
    check_adversarial(splits, 1)


@interpreted
@pytest.mark.parametrize(
    ("splits", "name"),
    [
        (1, "other's maximum far and late"),
        (3, "higher in every split"),
        (7, "a column that base alone lacks"),
        (12, "without the columns of a split and the tail"),
        (37, "maximum in the last element"),
    ],
)
def test_splits_of_rows_that_are_odd_for_them(splits, name, small_tiles):
    check_split_rows(splits, name)


@interpreted
@pytest.mark.slow
def test_splits_are_repeatable(small_tiles):
    name = "other's maximum far and late"
    base, other = (row[None] for row in for_splits(SIZE, TILE, 24)[name])
    labels = torch.tensor([SIZE - 1])
    first = of_splits(base, other, labels, 24, "precise", IMPL)
    for name, value in of_splits(base, other, labels, 24, "precise", IMPL).items():
        assert torch.equal(value.nan_to_num(7), first[name].nan_to_num(7)), name


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("splits", range(1, 38))
def test_every_number_of_splits(splits, small_tiles):
    """Each on a row that is odd for it; odd numbers on adversarial rows too, every one in turn."""
    if splits % 2:
        check_adversarial(splits, 1)
    check_split_rows(splits, SPLIT_ROWS[splits % len(SPLIT_ROWS)])


@interpreted
@pytest.mark.slow
def test_the_maximum_in_each_of_six_splits(small_tiles):
    noise, more = torch.randn(SIZE), torch.randn(SIZE)
    base = torch.stack([noise + one_hot(SIZE, 37 * i // 6 * TILE + 9, 9.0) for i in range(6)])
    check_splits(base, base + 0.1 * more, 6)
