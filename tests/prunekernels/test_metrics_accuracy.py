"""How near the metrics are to float64: vocabulary sizes, the fused head, splits.

Kernels run in Triton's interpreter; eager is held to the same table in the process as it is.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import run_interpreted
from prunekernels import head_pair_stats, pair_stats, reference, tuning
from prunekernels.runtime import interpreting
from rows import adversarial
from tolerances import mismatches, precise_kl_rounding, worse_than_allowed

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="not of the interpreter's process")
#: By how much rows differ for a KL of about 0.05, 1e-5 and 1e-7; and rows that do not.
NOISES = (0.3, 4.5e-3, 4.5e-4, 0.0)
KLS = ("kl_base_other", "kl_other_base")
ZEROS = (*KLS, "one_minus_cos_prob", "one_minus_cos_logit", "kl_estimate", "uniform_variance")
#: The vocabulary from which on roundings average out as they did when the table was found.
LONG = 151936


@compiled
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__)


def pair(kind, vocab, noises):
    """Rows with a language model's heavy head over a broad tail, or nearly flat ones."""
    base = torch.randn(len(noises), vocab)
    if kind == "flat":
        base *= 0.01
    else:
        head = min(vocab, 20)
        base *= 2.5
        base[:, :head] += torch.linspace(14, 4, 20)[:head]
    return base, base + torch.tensor(noises)[:, None] * torch.randn(base.shape)


def check_table(got, base, other, level, sums, rounded_x=0.0):
    """Every field as the table has it for `sums`, KL for `level`; equal rows exactly 0 and 1.

    rounded_x: what x carries, which makes 2·σ(x)·rounded_x of a variance (σ of 1e-3 and less are
    beyond the table's figure for variances).
    """
    exact = reference.pair_stats(base.double(), other.double(), level=level)
    vocab = base.shape[-1]
    rest = {name: value for name, value in got.items() if name not in KLS}
    estimates = ("kl_estimate", "one_minus_cos_prob_estimate")
    bent = {name: rounded_x * (2 * exact[name]).sqrt() for name in estimates}
    wrong = mismatches(rest, exact, level=sums, vocab=vocab, extra=bent)
    rounding = torch.zeros(2, len(base), dtype=torch.float64)
    if level != sums and vocab < LONG:
        rounding = precise_kl_rounding(base, other, temperature=1.0, tile=4096)
    extra = dict(zip(KLS, rounding, strict=True))
    kls = {name: got[name] for name in KLS}
    wrong += mismatches(kls, exact, level=level, vocab=vocab, extra=extra)
    assert not wrong, "\n".join(wrong)
    equal = (base == other).all(1)
    for name in ZEROS:
        assert (got[name][equal] == 0).all(), name
    for name in ("cos_prob", "cos_logit"):
        assert (got[name][equal] == 1).all(), name


def check_kernel(kind, vocab, level, noises):
    base, other = pair(kind, vocab, noises)
    got = pair_stats(base, other, level=level, impl="triton").as_dict()
    # At the core level x = z−y, of exponents that are rounded: by 2⁻²² where the mass is, at 4…8.
    check_table(got, base, other, level, "core", 2.0**-22 if level == "core" else 0.0)


@interpreted
@pytest.mark.parametrize("level", ["core", "full"])
@pytest.mark.parametrize("vocab", [1, 17, 4096])
def test_kernels(vocab, level):
    check_kernel("peaked", vocab, level, NOISES)


@compiled
@pytest.mark.parametrize("level", ["core", "full"])
@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize(
    "vocab",
    [1, 17, 4096, 50257],
)
def test_eager(vocab, kind, level):
    base, other = pair(kind, vocab, NOISES)
    got = pair_stats(base, other, level=level, impl="eager").as_dict()
    check_table(got, base, other, level, "core" if level == "core" else "precise")


def check_head(impl, vocab, level, steps):
    """Hidden states and a head whose products float32 holds exactly: only the sums round.

    steps: by how many 2⁻¹³ the hidden states differ at most, per row.
    """
    width = 16
    hidden = torch.randint(-(2**14), 2**14 + 1, (len(steps), width)).float() / 2**13
    change = torch.stack([torch.randint(-n, n + 1, (width,)) for n in steps]).float() / 2**13
    head = torch.randint(-16, 17, (vocab, width)).float() / 16
    base, other = (x.double() @ head.double().T for x in (hidden, hidden + change))
    assert torch.equal(base.float().double(), base) and torch.equal(other.float().double(), other)
    assert impl == "eager" or tuning.head_fused(len(steps), width)
    got = head_pair_stats(hidden, hidden + change, head, level=level, impl=impl).as_dict()
    check_table(
        got, base, other, level, "precise" if (impl, level) == ("eager", "precise") else "core"
    )


@interpreted
@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize("vocab", [1, 17, 1000])
def test_head(vocab, level):
    check_head("triton", vocab, level, (1500, 20, 2, 0))


@compiled
@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize(
    "vocab",
    [1, 17, 4096, 50257],
)
def test_eager_head(vocab, level):
    check_head("eager", vocab, level, (1500, 20, 2, 0))


LANES = 8
TILE = 4 * LANES


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a short row has a tile for each of 37 splits."""
    small = tuning.PairConfig(lanes=LANES, units=1, num_warps=4)
    monkeypatch.setattr(tuning, "pair_config", lambda warp=32: small)


def of_splits(base, other, labels, splits):
    """Precise statistics from any number of splits, by name."""
    from prunekernels.metrics import merge_triton, pair_triton
    from prunekernels.metrics.fields import unpack_pair

    kind = merge_triton.Kind(1.0, "precise", "base", True, "")
    packed, _, _ = pair_triton.partial_state(base, other, labels, kind, splits=splits).finish()
    what = {"level": "precise", "labels": True, "subset": False, "topk": 0, "fields": ""}
    return unpack_pair(packed, base.shape[:-1], **what).as_dict()


def check_splits(base, other, splits, ties=None):
    """Any number of splits is as near the truth as the table allows, and labels are found once.

    ties: the row, if any, whose terms are nearly all equal: then additions in a lane round alike,
    each partial sum by 2⁻²⁴ at most, which makes 2⁻²⁵ per addition of Σw and of Σw·ln w, whose
    terms are 4 there.
    """
    labels = torch.full(base.shape[:-1], base.shape[-1] - 1)
    got = of_splits(base, other, labels, splits)
    alike = (1 + 4) * 2.0**-25 * base.shape[-1] / LANES / splits
    for name, row, off, limit, truth in worse_than_allowed(
        got, base, other, tile=TILE, level="precise", labels=labels
    ):
        more = alike if row == ties else 0.0
        assert off <= limit + more, (splits, name, row, off, limit + more, truth)
    return got


@interpreted
def test_splits_where_beta_moves_late(small_tiles):
    base = 3 * torch.randn(1, 37 * TILE + 13)
    other = base + 0.2 * torch.randn(base.shape)
    base[0, 900], other[0, 900], other[0, 1000] = 15.0, -5.0, 16.0  # β moves by 21, late
    first = check_splits(base, other, 37)
    for splits in (1, 24):
        check_splits(base, other, splits)
    labels = torch.tensor([base.shape[-1] - 1])
    for name, value in of_splits(base, other, labels, 37).items():
        assert torch.equal(value.nan_to_num(7), first[name].nan_to_num(7)), name


def check_adversarial(splits, count):
    """`count` adversarial rows, others for each number of splits."""
    cases = adversarial(37 * TILE + 13)
    rows = [(splits * count + i) % len(cases) for i in range(count)]
    chosen = [list(cases.values())[row] for row in rows]
    base, other = (torch.stack([both[side] for both in chosen]) for side in (0, 1))
    ties = list(cases).index("ties")
    check_splits(base, other, splits, rows.index(ties) if ties in rows else None)


@interpreted
@pytest.mark.parametrize("splits", [18])
def test_splits_of_adversarial_rows(splits, small_tiles):
    check_adversarial(splits, 2)
