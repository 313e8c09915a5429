"""Divergences, normalisers and NLLs alone of long rows, which a CPU sums in a way of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prunekernels import pair_stats, reference
from prunekernels.metrics import eager
from prunekernels.metrics.options import PairOptions
from prunekernels.metrics.sums import light
from tolerances import mismatches
from torch import Tensor

FIELDS = ("kl_base_other", "kl_other_base", "lse_base", "lse_other")
WITH_LABELS = (*FIELDS, "nll_base", "nll_other", "prob_delta")


def rows(vocab: int) -> tuple[Tensor, Tensor]:
    """Rows of a model, and what could break sums that are not masked and hardly centred."""
    base = 2.5 * torch.randn(12, vocab)
    base[:, :20] += torch.linspace(14, 4, 20)
    other = base + 0.3 * torch.randn(12, vocab)
    other[1] = base[1]
    other[2] += 300.0  # the whole row moved
    base[3] -= 4000.0
    other[4, 0] -= 8.0  # the top token fell
    other[11] += 5.3  # by a number that float32 has to round
    base[5] *= 20.0  # weights underflow
    base[6, 40:90] = -torch.inf
    base[7, 11] = torch.nan
    other[8, 11] = torch.inf
    other[9] = -torch.inf
    other[10, 50:] = torch.finfo(torch.float32).min
    base[10, 50:] = torch.finfo(torch.float32).min
    return base, other


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("vocab", [4096, 33001])
def test_hard_rows_are_within_the_table(vocab: int, temperature: float) -> None:
    base, other = rows(vocab)
    labels = torch.randint(50, (12,))  # a masked token's NLL leaves float32
    options: dict[str, Any] = {"labels": labels, "temperature": temperature}
    exact = reference.pair_stats(base.double(), other.double(), **options)
    together = pair_stats(base, other, fields=WITH_LABELS, **options).as_dict()
    alone = [
        pair_stats(
            base[row : row + 1],
            other[row : row + 1],
            fields=WITH_LABELS,
            temperature=temperature,
            labels=labels[row : row + 1],
        ).as_dict()
        for row in range(12)  # a row that is hard has the others of its block summed elsewhere too
    ]
    apart = {name: torch.cat([found[name] for found in alone]) for name in together}
    for found in (together, apart):
        assert set(found) == set(WITH_LABELS)
        wrong = mismatches(found, exact, temperature=temperature)
        assert not wrong, "\n".join(wrong)
        assert found["kl_base_other"][1] == found["kl_other_base"][1] == 0.0


def test_autocast_rounds_nothing() -> None:
    base = 3 * torch.randn(3, 5000)
    other = base + 0.1 * torch.randn_like(base)
    expected = pair_stats(base, other, fields=FIELDS).as_dict()
    with torch.autocast("cpu", torch.bfloat16):
        found = pair_stats(base, other, fields=FIELDS).as_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_strides(dtype: torch.dtype) -> None:
    both = torch.randn(3, 2, 5000, 2).to(dtype)
    base, other = both[:, 0, :, 0], both[:, 0, :, 1]
    found = pair_stats(base.unsqueeze(1), other.unsqueeze(1), fields=FIELDS).as_dict()
    exact = reference.pair_stats(base.double(), other.double())
    assert found["kl_base_other"].shape == (3, 1)
    wrong = mismatches({name: value[:, 0] for name, value in found.items()}, exact)
    assert not wrong, "\n".join(wrong)


def test_long_rows_and_one_alone_give_the_same() -> None:
    vocab = light._TILE + 77
    base = 3 * torch.randn(9, vocab)
    other = base + 0.1 * torch.randn_like(base)
    # the last token of the wider of two tiles, which the other one must not find in its buffers
    base[:, vocab // 2] = other[:, vocab // 2] = 20.0
    other[:, vocab // 2] += 0.3 * torch.randn(9)
    together = pair_stats(base, other, fields=FIELDS).as_dict()
    wrong = mismatches(together, reference.pair_stats(base.double(), other.double()))
    assert not wrong, "\n".join(wrong)
    for row in (0, 8):
        alone = pair_stats(base[row], other[row], fields=FIELDS).as_dict()
        for name, value in together.items():
            assert torch.equal(value[row], alone[name]), name


@pytest.mark.parametrize(
    ("level", "moved", "way"),
    [
        (0.0, 0.0, 0),
        (30.0, 1.9, 0),
        (30.0, 3.0, 1),
        (70.0, 0.0, 1),
        (-40.0, 0.0, 1),
        (-95.0, 0.0, 1),
    ],
)
def test_rows_are_exponentiated_as_they_are_where_float32_can(
    level: float, moved: float, way: int
) -> None:
    """Elsewhere below their maxima; both hold a small divergence beside a peaked row's masses."""
    base = 2.5 * torch.randn(5, 33001) + level
    base[:, 7:27] += torch.linspace(14, 4, 20)
    other = base + 1e-3 * torch.randn_like(base) + moved
    options = PairOptions(fields=",".join(FIELDS))
    sums = light.LightSums(5, 33001, torch.float32, None, options)
    sums.add(0, base, other)
    assert sums.way == way
    found = dict(zip(FIELDS, sums.result()[0], strict=True))
    wrong = mismatches(found, reference.pair_stats(base.double(), other.double()))
    assert not wrong, "\n".join(wrong)


def test_it_is_taken_where_it_can_be_and_only_there() -> None:
    cpu = torch.device("cpu")

    def taken(vocab: int = 50000, device: torch.device = cpu, **options: Any) -> bool:
        return light.suffices(PairOptions(**options), vocab, device, False)

    assert taken(fields="kl_base_other")
    assert taken(fields="lse_base,nll_base", labels=True)
    assert not light.suffices(PairOptions(fields="kl_base_other"), 50000, cpu, True)
    for options in (
        {"fields": ""},
        {"fields": "kl_base_other,flipped"},
        {"fields": "kl_base_other,entropy_base"},
        {"fields": "kl_base_other", "level": "precise"},
        {"fields": "kl_base_other", "topk": 3},
        {"fields": "kl_base_other", "vocab": 100},
        {"fields": "kl_base_other", "device": torch.device("cuda")},
    ):
        assert not taken(**options), options


def test_calls_per_row_stay_few() -> None:
    """At one row of a vocabulary the cost of calls is that of the sums: 48 calls of torch's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    base, other = torch.randn(1, 152064), torch.randn(1, 152064)
    options = PairOptions(fields="kl_base_other,kl_other_base")
    with Calls() as calls:
        eager.pair_stats(base, other, None, None, options)
    assert calls.count <= 55
