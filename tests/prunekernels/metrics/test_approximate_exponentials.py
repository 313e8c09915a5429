"""The kernels with a GPU's exponentials: the floors of docs/metrics.md hold without a GPU.

ex2.approx.ftz.f32 may be 2 ulp from the rounded exponential. In the interpreter every float32 one
is moved by as much, in the directions that hurt most: w one way and v the other, or each at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import IMPL, run_interpreted
from prunekernels import pair_stats
from prunekernels.runtime import interpreting
from tolerances import EX2, worse_than_allowed
from torch import Tensor

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(interpreting(), reason="already in the interpreter's process")
#: By what the calls of exp2 are multiplied, in turn: the first of each pair is w, the second v.
DIRECTIONS: dict[str, Callable[[int, Any], Any]] = {
    "w less, v more": lambda call, x: -1.0 if call % 2 == 0 else 1.0,
    "w more, v less": lambda call, x: 1.0 if call % 2 == 0 else -1.0,
    "at random": lambda call, x: np.sign(np.sin(1e6 * np.maximum(x, -1e4) + call)),
}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton", "triton_warp"])
def test_in_the_interpreter(impl: str) -> None:
    run_interpreted(__file__, impl=impl)


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, float], None]]:
    """Makes exponentials wrong by so much relatively, in one of `DIRECTIONS`."""
    from triton.runtime.interpreter import InterpreterBuilder

    def start(direction: str, size: float) -> None:
        calls = iter(range(1 << 60))

        def exp2(x: Any) -> Any:
            exact = np.exp2(x)
            if exact.dtype != np.float32 or not np.ndim(x):
                return exact
            sign = DIRECTIONS[direction](next(calls), x.astype(np.float64))
            return (exact.astype(np.float64) * (1.0 + sign * size)).astype(np.float32)

        monkeypatch.setattr(
            InterpreterBuilder, "create_exp2", lambda self, arg: self.unary_op(arg, exp2)
        )

    yield start


def rows(vocab: int) -> tuple[Tensor, Tensor]:
    """Rows whose KL is about 0.5, 0.02, 1e-3 and 5e-6."""
    base = torch.randn(4, vocab) * 3
    noises = torch.tensor([1.0, 0.2, 0.05, 0.003])[:, None]
    return base, base + noises * torch.randn(4, vocab)


@interpreted
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("vocab", "level"), [(17, "full"), (4096, "full"), (4096, "core")])
def test_fields_stay_within_the_derived_floors(
    vocab: int, level: str, direction: str, off: Callable[[str, float], None]
) -> None:
    base, other = rows(vocab)
    off(direction, EX2)
    options: dict[str, Any] = {"level": level, "temperature": 0.9}
    found = pair_stats(base, other, impl=IMPL, **options).as_dict()
    worse = worse_than_allowed(found, base, other, approximate=True, **options)
    assert not worse, worse


@interpreted
def test_a_small_kl_needs_no_floor_of_its_own(off: Callable[[str, float], None]) -> None:
    """Below |t| = 1/4 terms have one factor alone, so that relative errors stay relative."""
    base, other = (row[2:] for row in rows(4096))
    off("w less, v more", EX2)
    found = pair_stats(base, other, impl=IMPL, level="precise").as_dict()
    kls = ("kl_base_other", "kl_other_base")
    assert not worse_than_allowed(found, base, other, kls, level="precise")


@interpreted
def test_exponentials_that_are_worse_than_documented_are_noticed(
    off: Callable[[str, float], None],
) -> None:
    base, other = rows(4096)
    off("w less, v more", 64 * EX2)
    found = pair_stats(base, other, impl=IMPL, level="precise").as_dict()
    names = {
        name
        for name, *_ in worse_than_allowed(found, base, other, approximate=True, level="precise")
    }
    assert {"kl_base_other", "lse_base"} <= names
