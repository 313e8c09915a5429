"""head_pair_stats against the float64 reference, and against pair_stats of explicit logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prunekernels import head_pair_stats, pair_stats, reference
from prunekernels.metrics import eager
from prunekernels.metrics.options import OutputHead, PairOptions
from tolerances import mismatches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def states(rows: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, width)
    other = hidden + 0.1 * torch.randn(rows, width)
    return hidden, other, torch.randn(vocab, width) / width**0.5 * 3


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"norm_weight": torch.linspace(0.5, 1.5, 48), "norm_eps": 1e-5},
    "bias": {"bias": torch.linspace(-1, 1, 3001)},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.25},
    "all": {
        "norm_weight": torch.linspace(0.5, 1.5, 48),
        "bias": torch.linspace(-1, 1, 3001),
        "softcap": 8.0,
        "logit_scale": 1.7,
        "temperature": 0.7,
        "weights": "other",
    },
}


@pytest.mark.parametrize("level", ["core", "precise"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_matches_reference(name: str, level: str) -> None:
    """The logits are float32, so a KL may be off by what 1e-6 on a logit makes of it."""
    hidden, other, head = states(6, 48, 3001)
    options = VARIANTS[name]
    found = head_pair_stats(hidden, other, head, level=level, **options).as_dict()
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    truth = reference.head_pair_stats(hidden.double(), other.double(), head.double(), **double)
    for field, value in truth.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                found[field].double(), value, rtol=2e-5, atol=5e-6, msg=f"{name} {field}"
            )
        else:
            assert torch.equal(found[field], value), field


def test_equals_pair_stats_of_its_logits() -> None:
    """With everything asked for: the fused path only saves the logits."""
    hidden, other, head = states(70, 32, 1999)
    options: dict[str, Any] = {
        "labels": torch.arange(70),
        "subset": [3, 77, 1000],
        "topk": 5,
        "level": "full",
        "temperature": 0.6,
    }
    fused = head_pair_stats(hidden, other, head, **options).as_dict()
    a, b = hidden @ head.T, other @ head.T
    double = {**options, "subset": torch.tensor(options["subset"])}
    truth = reference.pair_stats(a.double(), b.double(), **double)
    explicit = pair_stats(a, b, **options).as_dict()
    assert fused.keys() == truth.keys()
    for name, value in explicit.items():
        if value.is_floating_point():
            torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=5e-6, msg=name)
        else:
            assert torch.equal(fused[name], value), name
    assert not mismatches(explicit, truth, level="full", vocab=1999, temperature=0.6)


def test_another_head_for_the_other_side() -> None:
    hidden, _, head = states(5, 24, 501)
    pruned = head * (torch.rand_like(head) > 0.3)
    found = head_pair_stats(hidden, hidden, head, other_head_weight=pruned)
    wanted = pair_stats(hidden @ head.T, hidden @ pruned.T)
    torch.testing.assert_close(found.kl_base_other, wanted.kl_base_other, rtol=1e-4, atol=1e-6)
    assert bool((found.kl_base_other > 0.01).all())
    copied = head_pair_stats(hidden, hidden, head, other_head_weight=head.clone())
    assert bool((copied.kl_base_other == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_products_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Products of half-precision numbers are exact in float32; nothing rounds to half."""
    hidden, other, head = (tensor.to(dtype) for tensor in states(9, 40, 2003))
    found = head_pair_stats(hidden, other, head)
    truth = reference.head_pair_stats(hidden.double(), other.double(), head.double())
    for name in ("kl_base_other", "one_minus_cos_logit", "lse_base", "margin_base"):
        torch.testing.assert_close(
            found.as_dict()[name].double(), truth[name], rtol=1e-5, atol=2e-6
        )
    mixed = head_pair_stats(hidden.float(), other.float(), head)
    torch.testing.assert_close(mixed.kl_base_other, found.kl_base_other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 333])
def test_identical_states_are_exactly_zero_and_one(rows: int, dtype: torch.dtype) -> None:
    """Wherever the two tensors lie in memory, and however many chunks the rows take."""
    vocab = 30_011
    hidden = torch.randn(rows * 20 + 1).to(dtype)[1:].view(rows, 20)  # not aligned to 16 bytes
    head = torch.randn(vocab, 20).to(dtype)
    for other in (hidden, hidden.clone(), hidden.t().contiguous().t()):
        found = head_pair_stats(
            hidden, other, head, norm_weight=torch.ones(20).to(dtype), topk=3, bias=head[:, 0]
        )
        for name in ("kl_base_other", "kl_other_base", "one_minus_cos_prob", "delta_l1", "alpha"):
            assert bool((found.as_dict()[name] == 0).all()), name
        assert bool((found.cos_prob == 1).all()) and bool((found.cos_logit == 1).all())
        assert not bool(found.flipped.any())


class Products(TorchDispatchMode):
    """Counts the rows that are multiplied with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::mm", "aten::mm.out", "mkldnn::_linear_pointwise"):
            self.rows += args[0].shape[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_of_both_models_is_multiplied_once(dtype: torch.dtype) -> None:
    """As when a sublayer is dropped: its state is then the one that the sublayer before it made."""
    rows, vocab = 150, 401
    chain, _, head = (tensor.to(dtype) for tensor in states(rows, 24, vocab))
    own = chain[:5].float().neg().to(dtype)
    order = torch.randperm(rows)
    other = torch.cat([chain[order][5:], own])[torch.randperm(rows)]
    options = PairOptions(temperature=0.7, topk=2)
    with Products() as products:
        packed = eager.head_pair_stats(chain, other, OutputHead(head), None, None, options)
    assert products.rows == rows + 5
    apart_heads = OutputHead(head, head.clone())
    found = eager.head_pair_stats(chain, other, apart_heads, None, None, options)
    for shared, apart in zip(packed, found, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-4, atol=2e-6, equal_nan=True)


def test_chunks_do_not_show() -> None:
    """More rows than one chunk of logits holds give what each row gives alone."""
    hidden, other, head = states(300, 8, 40_009)
    whole = head_pair_stats(hidden, other, head)
    for row in (0, 208, 209, 299):
        alone = head_pair_stats(hidden[row], other[row], head)
        torch.testing.assert_close(
            whole.kl_base_other[row], alone.kl_base_other, rtol=1e-4, atol=2e-6
        )
        assert whole.argmax_other[row] == alone.argmax_other


def test_strided_head_and_leading_dimensions() -> None:
    hidden, other, head = states(6, 24, 401)
    stored = head.t().contiguous()
    found = head_pair_stats(hidden.view(2, 3, 24), other.view(2, 3, 24), stored.t())
    wanted = head_pair_stats(hidden, other, head)
    assert found.kl_base_other.shape == (2, 3)
    torch.testing.assert_close(
        found.kl_base_other.flatten(), wanted.kl_base_other, rtol=1e-5, atol=1e-6
    )


def test_a_joint_product_gives_equal_states_equal_bits() -> None:
    """Even where the product sums each row in an order of its own, as a GPU's may."""
    base, other, head = states(7, 24, 401)
    other[2], other[6] = base[2], base[6]
    reads = []

    def project(hidden: torch.Tensor) -> torch.Tensor:
        reads.append(hidden.shape[0])
        noise = 1 + 1e-3 * torch.rand(hidden.shape[0], 401)
        return (hidden @ head.T) * noise

    a, b = eager.joint_logits(base, other, project)
    assert reads == [8 + 7]  # one product; other's rows start at a multiple of 16 bytes
    assert torch.equal((a == b).all(1), (base == other).all(1))
    torch.testing.assert_close(a, base @ head.T, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(b, other @ head.T, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "vocab", "expected"),
    [(1, 152064, 1), (500, 152064, 500), (2048, 152064, 512), (10**6, 32000, 2560), (9, 10**8, 1)],
)
def test_chunks_are_whole_tiles_sized_by_memory(rows: int, vocab: int, expected: int) -> None:
    assert eager.chunk_rows(rows, vocab, 640 << 20) == expected
