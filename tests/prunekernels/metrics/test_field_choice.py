"""A choice of fields: the same values from fewer sums, and nothing else."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from allocations import Allocations
from interpreter import run_interpreted
from prunekernels import PairStats, head_pair_stats, merge, pair_state, pair_stats, summarize
from prunekernels.metrics import eager, needed_sums, result_rows
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.sums.eager import PairSums
from prunekernels.runtime import interpreting
from rows import adversarial
from torch import Tensor

IMPL = "triton" if interpreting() else "eager"
COUNT, VOCAB = 4, 4096 + 300
compiled = pytest.mark.skipif(interpreting(), reason="already in the interpreter's process")
#: One choice per group of sums, then mixtures; label fields have no sum of their own.
CHOICES: list[tuple[str, ...]] = [
    ("kl_base_other",),
    ("argmax_other", "nll_base", "lse_other", "tie"),
    ("entropy_other", "flipped"),
    ("one_minus_cos_prob",),
    ("kl_estimate", "estimate_valid"),
    ("one_minus_cos_prob_estimate",),
    ("orthogonal_ratio", "cos_logit"),
    ("uniform_variance",),
    ("delta_l1",),
    ("delta_l2", "margin_base"),
    ("kl_other_base", "cos_prob", "delta_l1", "prob_delta"),
]
#: In the interpreter each group of sums is chosen the same way, so a few will do.
SOME = [CHOICES[0], CHOICES[5], CHOICES[-1]] if interpreting() else CHOICES


@compiled
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(__file__)


def logits(rows: int = COUNT, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    base = 3 * torch.randn(rows, vocab)
    return base, base + 0.3 * torch.randn(rows, vocab)


def same(found: PairStats, whole: PairStats, names: tuple[str, ...]) -> None:
    """Just these fields, and of nearly the same sums: only compilers may round otherwise."""
    some, every = found.as_dict(), whole.as_dict()
    assert set(some) == set(names)
    for name, value in some.items():
        torch.testing.assert_close(
            value, every[name], rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("names", SOME, ids="+".join)
@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize("weights", ["base", "other"])
def test_fields_are_those_of_the_whole_set(
    names: tuple[str, ...], level: str, weights: str
) -> None:
    """On ordinary rows, on rows with excluded elements, and on rows that are broken."""
    if interpreting() and (level, weights) != (
        ("core", "base") if names == CHOICES[0] else ("precise", "other")
    ):
        pytest.skip("the interpreter takes one mixture of each")
    base, other = logits()
    base[1, 7] = other[1, 8] = other[2, 9] = -torch.inf
    base[3, 4200] = torch.nan
    options: dict[str, Any] = {"level": level, "weights": weights, "labels": torch.arange(COUNT)}
    options |= {"impl": IMPL, "temperature": 0.8}
    whole = pair_stats(base, other, **options)
    same(pair_stats(base, other, fields=names, **options), whole, names)


@compiled
@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_adversarial_rows(names: tuple[str, ...]) -> None:
    cases = adversarial(VOCAB).values()
    base, other = (torch.stack([pair[side] for pair in cases]) for side in (0, 1))
    labels = torch.zeros(len(base), dtype=torch.int64)
    found = pair_stats(base, other, labels=labels, fields=names)
    same(found, pair_stats(base, other, labels=labels), names)


def test_second_pass_only_where_asked() -> None:
    base, other = logits()
    whole = pair_stats(base, other, level="full", impl=IMPL)
    for names in (("total_variation",), ("js", "hellinger", "kl_base_other"), ("cos_prob",)):
        same(pair_stats(base, other, level="full", fields=names, impl=IMPL), whole, names)


def test_subset_and_top_tokens_come_along() -> None:
    base, other = logits(2, 500)
    names = ("kl_base_other", "flipped")
    options: dict[str, Any] = {"subset": [4, 400, 17], "topk": 3, "impl": IMPL}
    found = pair_stats(base, other, fields=names, **options)
    whole = pair_stats(base, other, **options).as_dict()
    wanted = {*names, *(f"subset.{name}" for name in names)}
    assert {name for name in found.as_dict() if not name.startswith("topk.")} == wanted
    for name, value in found.as_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("topk", [0, 2])
def test_heads(topk: int) -> None:
    hidden, head = torch.randn(2, 3, 24), torch.randn(301, 24)
    names = ("kl_base_other", "entropy_base", "nll_other")
    options: dict[str, Any] = {"labels": torch.tensor([0, 300, 7]), "topk": topk, "impl": IMPL}
    found = head_pair_stats(*hidden, head, fields=names, subset=[1, 2, 3], **options)
    whole = head_pair_stats(*hidden, head, subset=[1, 2, 3], **options).as_dict()
    kept = {name for name in found.as_dict() if "." not in name}
    assert kept == set(names)
    assert "subset.kl_base_other" in found.as_dict() and "subset.cos_prob" not in found.as_dict()
    for name, value in found.as_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-7, msg=name)


def test_states_merge_with_those_of_the_same_fields_only() -> None:
    base, other = logits(3, 900)
    names = ("kl_base_other", "one_minus_cos_prob", "nll_base")
    options: dict[str, Any] = {"labels": torch.tensor([3, 500, 899]), "impl": IMPL}
    parts = [
        pair_state(base[:, a:b], other[:, a:b], offset=a, fields=names, **options)
        for a, b in ((0, 400), (400, 900))
    ]
    found = merge(parts).stats()
    assert set(found.as_dict()) == set(names)
    whole = pair_stats(base, other, **options).as_dict()
    for name, value in found.as_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=2e-6, atol=2e-7, msg=name)
    every = pair_state(base[:, 400:], other[:, 400:], offset=400, **options)
    with pytest.raises(ValueError, match=r"same fields, got kl_base_other.* and all of them"):
        merge([parts[0], every])


def test_what_is_not_there_says_how_to_ask() -> None:
    found = pair_stats(*logits(2, 50), fields=("kl_base_other", "flipped"), impl=IMPL)
    with pytest.raises(AttributeError, match=r"no cos_prob: it holds .* fields=\(…, 'cos_prob'\)"):
        _ = found.cos_prob
    with pytest.raises(AttributeError, match="'PairStats' object has no attribute 'kl'"):
        _ = found.kl  # type: ignore[attr-defined]
    assert found.nll_base is found.js is found.topk is None
    assert (
        set(found[0].as_dict()) == set(found.to("meta").as_dict()) == {"kl_base_other", "flipped"}
    )
    both = PairStats.cat([found, found])
    assert both.kl_base_other.shape == (4,) and not hasattr(both, "alpha")
    assert torch.equal(pickle.loads(pickle.dumps(found)).flipped, found.flipped)
    assert repr(found).startswith("PairStats(kl_base_other=tensor(")


@compiled
def test_bad_choices_name_the_fix() -> None:
    base, other = logits(2, 50)
    bad: list[tuple[Any, str]] = [
        ("kl_base_other", "sequence of names, got 'kl_base_other'"),
        ((), r"got \(\); leave it out for all"),
        (("kl",), "holds 'kl', which is not one of kl_base_other, "),
        (("nll_base",), "'nll_base', which needs labels="),
        (("js",), "'js', which needs level='full', got 'core'"),
    ]
    for fields, message in bad:
        with pytest.raises(ValueError, match=message) as caught:
            pair_stats(base, other, fields=fields)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="head_pair_stats: fields holds 'kl'"):
        head_pair_stats(base, other, torch.randn(9, 50), fields=("kl",))
    with pytest.raises(ValueError, match="pair_state: fields holds 'js'"):
        pair_state(base, other, fields=("js",))


@compiled
def test_every_field_can_be_asked_for_alone() -> None:
    base, other = logits(2, 700)
    options: dict[str, Any] = {"labels": torch.tensor([1, 2]), "level": "full"}
    whole = pair_stats(base, other, **options)
    assert set(whole.as_dict()) == set(needed_sums.PAIR_FIELDS)
    for name in needed_sums.PAIR_FIELDS:
        same(pair_stats(base, other, fields=[name], **options), whole, (name,))


@compiled
def test_summarize_reports_what_is_there() -> None:
    base, other = logits(9, 70)
    labels = torch.arange(9)
    whole = summarize(pair_stats(base, other, labels=labels))
    found = summarize(pair_stats(base, other, fields=("kl_base_other", "flipped")))
    assert {"kl_mean", "kl_median", "same_top"} <= found.keys()
    assert "kl_reverse_mean" not in found and "ln_ppl_ratio" not in found
    for name, value in found.items():
        assert value == pytest.approx(whole[name], rel=1e-6, abs=1e-9), name
    with pytest.raises(AttributeError, match="kl_base_other"):
        summarize(pair_stats(base, other, fields=("flipped",)))


@compiled
@pytest.mark.parametrize("fields", ["kl_base_other", "cos_prob,delta_l1", ""])
@pytest.mark.parametrize("level", ["core", "precise", "full"])
def test_memory_stays_under_a_tenth_of_the_logits(level: str, fields: str) -> None:
    base, other = torch.randn(64, 49152), torch.randn(64, 49152)
    with Allocations() as memory:
        eager.pair_stats(base, other, None, None, PairOptions(level=level, fields=fields))
    logits = base.nbytes + other.nbytes
    assert 0.005 * logits < memory.peak < 0.10 * logits


@compiled
def test_fewer_fields_take_fewer_passes() -> None:
    """Counted in elements that arithmetic writes or sums: that is what eager time goes by."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Work(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.name()
            if "out" in name or name == "aten::dot" or name.startswith("aten::sum"):
                self.elements += sum(x.numel() for x in torch.utils._pytree.tree_leaves(args[0]))
            return func(*args, **(kwargs or {}))

    def passes(fields: str) -> float:
        pair = logits()
        with Work() as work:
            eager.pair_stats(*pair, None, None, PairOptions(fields=fields))
        return work.elements / pair[0].numel()

    assert passes("lse_base,argmax_other") < 0.35 * passes("")
    assert passes("kl_base_other") < 0.45 * passes("")
    assert passes("kl_base_other") < passes("kl_base_other,cos_logit") < 0.8 * passes("")


@compiled
def test_opcheck_and_fullgraph() -> None:
    base, other = logits(2, 50)
    names = "kl_base_other,flipped"
    arguments = (base, other, None, torch.tensor([3, 1]), 1.0, 2, "core", "base", names, "auto")
    torch.library.opcheck(torch.ops.prunekernels.pair_stats.default, arguments)

    def chosen(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        found = pair_stats(a, b, fields=("kl_base_other", "flipped"))
        return found.kl_base_other, found.flipped

    for found, wanted in zip(
        torch.compile(chosen, fullgraph=True, backend="eager")(base, other),
        chosen(base, other),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_groups_of_sums_are_as_small_as_said() -> None:
    """What the KLs, normalisers, NLLs, argmaxes and margins need: four sums in the kernels."""
    from prunekernels.metrics.sums import bundle_triton

    few = ("kl_base_other", "kl_other_base", "lse_base", "nll_other", "margin_base", "argmax_base")
    names = needed_sums.sums(few, weights="base", precise=False)
    assert bundle_triton.bundle(bundle_triton.wanted(names)) == ("W0", "W1", "V0", "V1")
    every = needed_sums.sums(needed_sums.PAIR_FIELDS, weights="base", precise=False)
    bundle = bundle_triton.bundle(bundle_triton.wanted(every))
    # four of these are not summed but taken from the others, and n is counted
    assert len(bundle) == 18 + 4 + 1
    assert {"A", "Fp", "Fq", "V2"}.isdisjoint(bundle)
    assert set(result_rows.PAIR_FLOATS) <= set(needed_sums.PAIR_FIELDS)


@compiled
def test_the_second_pass_of_kept_weights_is_that_of_recomputed_ones() -> None:
    """Many rows leave room for the weights of one, few do not; far, equal and empty tokens too."""
    base = torch.randn(60, 20_000, generator=torch.Generator().manual_seed(3))
    other = base + 0.3 * torch.randn(60, 20_000, generator=torch.Generator().manual_seed(4))
    other[0] = base[0]
    other[1] -= 60.0 * (torch.arange(20_000) % 3 == 0)  # |s| rounds to 1
    base[2, 5:700] = other[2, 300:900] = -math.inf
    base[3, :9000] = other[3, :9000] = -1e4  # both weights vanish
    fields = ("js", "total_variation", "hellinger")
    options = PairOptions(level="full", fields=",".join(fields))
    kept, few = (
        PairSums(rows, 20_000, base.device, base.dtype, None, None, options) for rows in (60, 4)
    )
    kept.add(0, base, other)
    few.add(0, base[:4], other[:4])
    assert (kept.keeps, few.keeps) == (True, False)
    torch.testing.assert_close(kept.sums[:, :4], few.sums, rtol=1e-12, atol=1e-13)
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    m = (p + q) / 2
    js = (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).nan_to_num().sum(-1) / 2
    for name, wanted in zip(
        fields,
        (js, (p - q).abs().sum(-1) / 2, ((p.sqrt() - q.sqrt()).square().sum(-1) / 2).sqrt()),
        strict=True,
    ):
        found = getattr(pair_stats(base, other, level="full"), name)
        alone = getattr(pair_stats(base, other, level="full", fields=(name,)), name)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-12)
        assert found[0] == 0 and torch.equal(found, alone)
