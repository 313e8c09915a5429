"""The metric kernels in Triton's interpreter against float64, and in eager's company."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from interpreter import IMPL, run_interpreted
from prunekernels import head_pair_stats, pair_stats, reference, vector_stats
from prunekernels.runtime import interpreting
from rows import adversarial, broad_against_certain
from tolerances import worse_than_allowed

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="already in the interpreter's process")
INF = float("inf")


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@compiled
def test_by_warps_in_the_interpreter():
    run_interpreted(__file__, "-k", "first_of_equals or alpha", impl="triton_warp")


@compiled
@pytest.mark.slow
def test_slow_ones_in_the_interpreter():
    run_interpreted(__file__, "-m", "slow")


@compiled
@pytest.mark.slow
def test_all_by_warps_in_the_interpreter():
    run_interpreted(__file__, "-m", "slow or not slow", "-k", "not head", impl="triton_warp")


# Absolute floors where float32 sums limit what a value near zero can be (docs/metrics.md),
# and a relative one: float32 results, of sums whose terms carry a few roundings each.
FLOORS = {
    "one_minus_cos_logit": 3e-11,
    "total_variation": 2e-7,
    "entropy_base": 4e-7,
    "entropy_other": 4e-7,
    "kl_base_other": 4e-7,
    "kl_other_base": 4e-7,
}
RELATIVE = 4e-6


def floor(name, exact):
    """What float32 sums can resolve of a field.

    1−cos and ‖d⊥‖² of logits are differences of numbers of the size of (‖d‖/‖a‖)².
    """
    group, _, field = name.rpartition(".")
    dot = "." if group else ""
    flat = FLOORS.get(field, 1e-7)
    if field in ("one_minus_cos_logit", "one_minus_cosine", "one_minus_cosine_estimate"):
        return FLOORS["one_minus_cos_logit"] + 1e-7 * _relative_size(exact, group + dot)
    if field == "orthogonal_ratio":
        return (1e-7 * _relative_size(exact, group + dot)).sqrt() + flat
    return torch.tensor(flat)


def _relative_size(exact, group):
    ratios = (exact[f"{group}parallel_ratio"], exact[f"{group}orthogonal_ratio"])
    return sum(ratio.square() for ratio in ratios).nan_to_num(0.0)


def assert_as_good_as_eager(got, eager, exact, extra=None):
    """Err(kernel) ≤ 2·err(eager) + floor, NaN and ±inf and every id and flag alike."""
    assert list(got) == list(eager)
    extra = extra or {}
    for name, value in got.items():
        want = exact[name] if name in exact else eager[name]
        if not value.is_floating_point():
            assert torch.equal(value, eager[name]), name
            continue
        assert torch.equal(value.isnan(), eager[name].isnan()), name
        infinite = eager[name].isinf()
        assert torch.equal(value[infinite], eager[name][infinite]), name
        fine = ~eager[name].isnan() & ~infinite
        error = (value.double() - want)[fine].abs()
        least = (floor(name, exact) + extra.get(name, 0.0)).expand(want.shape)[fine]
        allowed = 2 * (eager[name].double() - want)[fine].abs()
        allowed += RELATIVE * want[fine].abs() + least
        assert (error <= allowed).all(), (name, error.max().item(), want[fine])


def compare(base, other, extra=None, **options):
    got = pair_stats(base, other, impl=IMPL, **options).as_dict()
    eager = pair_stats(base, other, impl="eager", **options).as_dict()
    exact = reference.pair_stats(base.double(), other.double(), **options)
    assert_as_good_as_eager(got, eager, exact, extra)
    return got


def pair(rows, vocab, dtype=torch.float32, noise=0.2):
    base = torch.randn(rows, vocab) * 3
    return base.to(dtype), (base + noise * torch.randn(rows, vocab)).to(dtype)


@interpreted
@pytest.mark.parametrize("level", ["core", "full"])
@pytest.mark.parametrize(
    ("vocab", "dtype", "weights", "temperature"),
    [
        (1, torch.float32, "base", 1.0),
        (17, torch.bfloat16, "other", 0.7),
        (700, torch.float16, "other", 1.0),
        (4096, torch.bfloat16, "base", 1.3),
    ],
)
def test_values(vocab, dtype, weights, temperature, level):
    base, other = pair(2, vocab, dtype)
    labels = torch.randint(0, vocab, (2,))
    compare(base, other, labels=labels, level=level, weights=weights, temperature=temperature)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_start_on_a_vector(dtype):
    """Odd row lengths: an aligned start before the row, whole tiles, and both ends masked."""
    base, other = pair(3, 8192 + 1111, dtype)
    compare(base, other, labels=torch.tensor([0, 5000, 9302]))


@interpreted
def test_the_first_of_equals_may_lie_before_the_tiles():
    """In rows that start off a vector, whose first piece is read last."""
    base, other = torch.zeros(2, 4096 + 1111), torch.randn(2, 4096 + 1111)
    other[:, 3] = other[:, 4000] = 9.0
    found = pair_stats(base, other, impl=IMPL, fields=("argmax_base", "argmax_other", "tie"))
    assert found.argmax_base.tolist() == [0, 0] and found.argmax_other.tolist() == [3, 3]
    assert found.tie.all()


@interpreted
@pytest.mark.slow
def test_a_real_vocabulary():
    compare(*pair(1, 50257, torch.bfloat16))


@interpreted
@pytest.mark.parametrize(("level", "kl", "allowed"), [("core", 1e-5, 0.1), ("precise", 1e-7, 1e-4)])
def test_small_divergences(level, kl, allowed):
    base, noise = torch.randn(2, 6000) * 3, torch.randn(2, 6000)
    other = base + noise * (2 * kl) ** 0.5
    got = pair_stats(base, other, level=level, impl=IMPL)
    exact = reference.pair_stats(base.double(), other.double())
    for name in ("kl_base_other", "kl_other_base"):
        assert (getattr(got, name) / exact[name] - 1).abs().max() < allowed, name
    apart = exact["one_minus_cos_prob"]
    assert (got.one_minus_cos_prob - apart).abs().max() < 3e-10 + 1e-5 * apart.max()
    assert ((got.kl_estimate / exact["kl_estimate"]) - 1).abs().max() < 4e-6


@interpreted
@pytest.mark.parametrize(
    ("level", "temperature"),
    [("core", 1.0), pytest.param("precise", 0.5, marks=pytest.mark.slow)],
)
def test_adversarial_rows(level, temperature):
    """Whole tiles and a masked rest; two rows more: the last equals itself to the last bit."""
    cases = adversarial(4096 + 200)
    rows = [torch.stack([pair[side] for pair in cases.values()]) for side in (0, 1)]
    base, other = (torch.cat([row, rows[1][:2]]) for row in rows)
    options = {"level": level, "temperature": temperature}
    got = pair_stats(base, other, impl=IMPL, **options).as_dict()
    # Equal terms round alike: 2⁻²⁵ per addition in a lane, and not at random.
    alike = {list(cases).index("ties"): 2.0**-25 * base.shape[1] / 128}
    worse = worse_than_allowed(got, base, other, **options)
    assert not [found for found in worse if found[2] > found[3] + alike.get(found[1], 0.0)]
    exactly = {"cos_prob": 1.0, "cos_logit": 1.0, "one_minus_cos_prob": 0.0, "kl_base_other": 0.0}
    exactly |= {"kl_other_base": 0.0, "one_minus_cos_logit": 0.0, "kl_estimate": 0.0}
    for name, value in exactly.items():
        assert (got[name][-2:] == value).all(), name


@interpreted
def test_broad_against_certain():
    base, other = broad_against_certain(4096 + 200)
    got = pair_stats(base, other, impl=IMPL).as_dict()
    names = ("one_minus_cos_prob", "cos_prob", "kl_base_other", "kl_other_base", "lse_other")
    assert not worse_than_allowed(got, base, other, names)


@interpreted
@pytest.mark.parametrize("level", ["core", pytest.param("full", marks=pytest.mark.slow)])
def test_excluded_and_broken_elements(level):
    base, other = pair(9, 4096 + 600)
    base[0, 5] = other[0, 5] = -INF
    base[1, 7] = other[2, 4200] = -INF
    base[3, 3], other[4, 4100], base[5, 4000] = float("nan"), INF, INF
    base[6] = -INF
    base[7, :4500] = other[7, :4500] = -INF
    lowest = torch.finfo(torch.float32).min
    base[8, 9] = other[8, 9] = lowest
    options = {"labels": torch.full((8,), 4600), "level": level}
    if level == "full":
        options |= {"topk": 3, "subset": torch.tensor([3, 5, 4600])}
    got = compare(base[:8], other[:8], **options)
    # neighbours of a broken row are untouched
    alone = pair_stats(base[2], other[2], level=level, impl=IMPL)
    assert got["kl_other_base"][2] == alone.kl_other_base
    masked = pair_stats(base[8], other[8], level=level, impl=IMPL)
    exact = reference.pair_stats(base[8].double(), other[8].double(), level=level)
    for name in ("kl_base_other", "kl_other_base", "cos_prob", "entropy_base"):
        assert (getattr(masked, name) - exact[name]).abs() < 1e-6, name


@interpreted
def test_any_strides():
    base, other = pair(2, 5000)
    compare(base[:, 1:], other[:, 1:])
    compare(base[:, ::2], other[:, ::2])
    compare(base[:, :4999], other[:, 1:])
    compare(base.t().contiguous().t(), other.t().contiguous().t())
    base, other = pair(8, 300)
    base, other = (x.view(2, 2, 2, 300).transpose(0, 2)[..., :299] for x in (base, other))
    compare(base, other)


@interpreted
def test_no_rows():
    empty = torch.zeros(0, 9)
    stats = pair_stats(empty, empty, level="full", topk=2, subset=[1, 2], impl=IMPL)
    assert {tuple(x.shape) for x in stats.as_dict().values()} == {(0,), (0, 2)}
    assert vector_stats(empty, empty, impl=IMPL).cosine.shape == (0,)
    assert head_pair_stats(empty, empty, torch.ones(5, 9), impl="triton").lse_base.shape == (0,)


@interpreted
@pytest.mark.parametrize("level", ["core", "precise"])
def test_repeatable_and_temperature_scales_exactly(level):
    base, other = pair(1, 5000)
    other[:, 3000] += 25.0  # away from base's top, so that β moves to it
    first = pair_stats(base, other, temperature=0.7, level=level, impl=IMPL).as_dict()
    again = pair_stats(base, other, temperature=0.7, level=level, impl=IMPL).as_dict()
    twice = pair_stats(2 * base, 2 * other, temperature=1.4, level=level, impl=IMPL)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    for name in ("kl_base_other", "kl_other_base", "entropy_base", "cos_prob", "kl_estimate"):
        assert torch.equal(getattr(twice, name), first[name]), name


@interpreted
@pytest.mark.parametrize("level", ["core", "precise"])
def test_swapping_the_rows_swaps_the_fields(level):
    base, other = pair(2, 3000)
    there = pair_stats(base, other, level=level, impl=IMPL)
    back = pair_stats(other, base, level=level, weights="other", impl=IMPL)
    for left, right in (
        ("kl_base_other", "kl_other_base"),
        ("entropy_base", "entropy_other"),
        ("lse_base", "lse_other"),
        ("cos_prob", "cos_prob"),
        ("kl_estimate", "kl_estimate"),
        ("margin_base", "margin_other"),
    ):
        torch.testing.assert_close(getattr(there, left), getattr(back, right), rtol=1e-5, atol=3e-7)


@interpreted
def test_parts_of_the_vocabulary_merge_as_splits():
    from prunekernels.metrics import merge_triton, pair_triton
    from prunekernels.metrics.options import PairOptions

    options = PairOptions(level="precise", labels=True)
    base, other = pair(1, 37 * 4096 // 4 + 99)
    base[0, 9000], other[0, 20000] = 15.0, 16.0
    labels = torch.tensor([30000])
    exact = reference.pair_stats(base.double(), other.double(), labels=labels)
    design = "warp" if IMPL == "triton_warp" else "tile"
    halves = [
        pair_triton.partial_state(part_a, part_b, labels, options, first_id=first, design=design)
        for first, part_a, part_b in (
            (0, base[:, :11111], other[:, :11111]),
            (11111, base[:, 11111:], other[:, 11111:]),
        )
    ]
    (floats, ids, _), _, _ = merge_triton.merge_states(halves).finish()
    assert ids.tolist() == [exact["argmax_base"].tolist(), exact["argmax_other"].tolist()]
    torch.testing.assert_close(floats[0].double(), exact["kl_base_other"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(floats[-3].double(), exact["nll_base"], rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize(("level", "weights"), [("precise", "other")])
def test_states_are_those_of_eager_and_merge_with_them(level, weights):
    from prunekernels import merge, pair_state
    from prunekernels.metrics import partial

    base, other = pair(4, 4096 + 1500)
    base[0, 3000:], other[1, 10] = -INF, -INF
    base[3, 5], other[3, 5000] = 40.0, 60.0
    labels = torch.tensor([3, 4100, 5595, 0])
    options = {"level": level, "weights": weights, "temperature": 0.8}
    exact = reference.pair_stats(base.double(), other.double(), labels=labels, **options)
    cut = 4096 + 300
    parts = {
        impl: [
            pair_state(a, b, labels=labels, offset=offset, impl=impl, **options)
            for offset, a, b in (
                (0, base[:, :cut], other[:, :cut]),
                (cut, base[:, cut:], other[:, cut:]),
            )
        ]
        for impl in (IMPL, "eager")
    }
    for left, right in zip(parts[IMPL], parts["eager"], strict=True):
        exactly = [
            partial.STATE_FIELDS.index(name) for name in partial.HEAD_FIELDS if name != "beta"
        ]
        torch.testing.assert_close(left.data[:, exactly], right.data[:, exactly], rtol=1e-6, atol=0)
    for first, second in ((IMPL, IMPL), (IMPL, "eager"), ("eager", IMPL)):
        got = merge([parts[first][0], parts[second][1]]).stats().as_dict()
        eager = merge(parts["eager"]).stats().as_dict()
        extra = dict.fromkeys(("kl_estimate", "one_minus_cos_prob_estimate"), 6 * 2.0**-24 * 60**2)
        extra |= {"uniform_variance": 6 * 2.0**-24 * 60**2, "entropy_other": 6 * 2.0**-24 * 60}
        assert_as_good_as_eager(got, eager, exact, extra)


@interpreted
@pytest.mark.parametrize(
    ("width", "dtype"), [(1, torch.float32), (77, torch.bfloat16), (2500, torch.float16)]
)
def test_vectors(width, dtype):
    base = torch.randn(2, 5, width)
    other = base + 0.05 * torch.randn(2, 5, width)
    other[0, 0] = base[0, 0]
    base[0, 1] = 0
    base[0, 2] = other[0, 2] = 0
    base, other = base.to(dtype), other.to(dtype)
    got = vector_stats(base, other, impl=IMPL).as_dict()
    eager = vector_stats(base, other, impl="eager").as_dict()
    assert_as_good_as_eager(got, eager, reference.vector_stats(base.double(), other.double()))
    assert got["cosine"][0, 0] == 1 and got["one_minus_cosine"][0, 0] == 0
    flipped = vector_stats(base.transpose(0, 1), other.transpose(0, 1), impl=IMPL)
    assert torch.equal(flipped.cosine.nan_to_num(), got["cosine"].t().nan_to_num())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_alpha_near_zero_keeps_its_digits(dtype):
    """⟨d, a⟩ is a sum of terms of both signs: it is off by roundings of ‖d‖‖a‖, not of its size."""
    base, noise = torch.randn(2, 4096 + 40), torch.randn(2, 4096 + 40)
    along = (noise * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True)
    other = base + 0.1 * (noise - along * base)
    base, other = base.to(dtype), other.to(dtype)
    exact = reference.vector_stats(base.double(), other.double())
    off = (vector_stats(base, other, impl=IMPL).alpha - exact["alpha"]).abs()
    assert (exact["alpha"].abs() < 1e-3).all()
    assert (off <= 2.0**-24 * exact["orthogonal_ratio"]).all(), off


@interpreted
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "dtype", "options"),
    [
        (3, 40, 300, torch.float32, {"level": "precise", "labels": True, "subset": [3, 9, 1]}),
        (18, 33, 200, torch.bfloat16, {"softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8}),
        (2, 64, 500, torch.float16, {"weights": "other", "second": True, "norm": True}),
        (2, 64, 500, torch.float16, {"level": "full", "topk": 3}),
        (2, 40, 300, torch.float32, {"bias": True}),
    ],
)
def test_heads(rows, width, vocab, dtype, options, monkeypatch):
    from prunekernels.metrics import tuning

    monkeypatch.setattr(tuning, "head_fused", lambda *_: True)  # more rows than a block has too
    options = dict(options)
    base = torch.randn(rows, width)
    other = base + 0.1 * torch.randn(rows, width)
    other[0] = base[0]
    head = (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    if options.pop("second", False):
        options["other_head_weight"] = (head + 0.01 * torch.randn(vocab, width)).to(dtype)
    if options.pop("norm", False):
        options["norm_weight"] = torch.rand(width) + 0.5
    if options.pop("labels", False):
        options["labels"] = torch.randint(0, vocab, (rows,))
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocab)
        options["bias"][50:90] = -INF
    base, other = base.to(dtype), other.to(dtype)
    got = head_pair_stats(base, other, head, impl="triton", **options)
    eager = head_pair_stats(base, other, head, impl="eager", **options).as_dict()
    if "other_head_weight" not in options:
        assert got.kl_base_other[0] == 0 and got.cos_prob[0] == 1
    for name, value in got.as_dict().items():
        if value.is_floating_point():
            # two orders of summation of float32 products
            torch.testing.assert_close(value, eager[name], rtol=2e-5, atol=2e-6, equal_nan=True)
        else:
            assert torch.equal(value, eager[name]), name


def opcheck(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.prunekernels, name).default, arguments)


@interpreted
def test_rows_of_equal_states_are_copied_and_no_others():
    from prunekernels.metrics import head_triton

    source, target = torch.randn(5, 9001), torch.randn(5, 9001)
    same = torch.tensor([True, False, False, True, True])
    wanted = torch.where(same[:, None], source, target)
    head_triton.copy_equal_rows(same, source, target)
    assert torch.equal(target, wanted)


@interpreted
def test_memory_of_the_fused_head_is_some_hundred_bytes_per_row():
    from prunekernels.metrics import head_triton, tuning
    from prunekernels.metrics.options import OutputHead, PairOptions

    width, peaks = 8, {}
    for rows, vocab in ((8, 200), (8, 400), (16, 200)):
        assert tuning.head_fused(rows, True)
        hidden, head = torch.randn(rows, width), torch.randn(vocab, width)
        with Allocations() as memory:
            head_triton.head_pair_stats(
                hidden, hidden + 0.1, OutputHead(head), None, None, PairOptions()
            )
        splits = tuning.head_splits(rows, vocab, tuning.head_config(rows, 4, False, (9, 0)))
        state = 4 * 35 + 16  # bytes of a partial state's numbers and ids
        peaks[rows, vocab] = memory.peak - rows * splits * state
    # normalised copies of the states, results and normalisers: nothing of the vocabulary
    assert peaks[8, 200] == peaks[8, 400]
    assert 0 < peaks[16, 200] - peaks[8, 200] <= 8 * (2 * 4 * width + 200)
    assert peaks[16, 200] <= 16 * (2 * 4 * width + 200)


@interpreted
def test_ops_pass_opcheck():
    base, other = pair(2, 40)
    labels = torch.tensor([1, 2])
    opcheck("pair_stats", base, other, labels, None, 1.0, 2, "core", "base", "", IMPL)
    opcheck("vector_stats", base, other, IMPL)


@interpreted
@pytest.mark.slow
def test_all_ops_pass_opcheck_and_fullgraph():
    base, other = pair(2, 40)
    labels, head = torch.tensor([1, 2]), torch.randn(30, 40)
    opcheck("pair_state", base, other, labels, 1.0, "precise", "other", 7, "", IMPL)
    more = (1e-6, 4.0, None, 1.0, 0, "core", "base", "", "triton")
    opcheck("head_pair_stats", base, other, head, None, None, None, labels, None, *more)

    def everything(a, b):
        fused = head_pair_stats(a, b, head, impl="triton").as_dict()
        return pair_stats(a, b, impl=IMPL).as_dict(), fused

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for found, wanted in zip(compiled(base, other), everything(base, other), strict=True):
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name


@interpreted
def test_bad_input_is_refused_before_any_kernel_runs():
    base, other = pair(2, 9)
    for options, message in (
        ({"labels": torch.tensor([0, 9])}, "labels holds token id 9"),
        ({"subset": [1, 1]}, "token id 1 appears twice"),
        ({"topk": 10}, "0..9"),
        ({"temperature": float("nan")}, "got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_stats(base, other, impl=IMPL, **options)
    with pytest.raises(ValueError, match="no backward"):
        pair_stats(base.requires_grad_(), other, impl=IMPL)


@interpreted
@pytest.mark.slow
def test_rows_further_apart_than_32_bits_reach(tmp_path):
    """A sparse file stands in for 4 GiB of logits: only the pages of two rows exist."""
    stride, vocab = 2**31 + 16, 5000
    small_a, small_b = pair(2, vocab, torch.bfloat16)
    big = torch.from_file(
        str(tmp_path / "logits"), shared=True, size=stride + 8192 + vocab, dtype=torch.bfloat16
    )
    base = big.as_strided((2, vocab), (stride, 1))
    other = big.as_strided((2, vocab), (stride, 1), 8192)
    base.copy_(small_a)
    other.copy_(small_b)
    for impl in (IMPL, "eager"):
        found = pair_stats(base, other, impl=impl).as_dict()
        wanted = pair_stats(small_a, small_b, impl=impl).as_dict()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
