"""Rows whose KL is known in size, and the accuracy table that every implementation is held to."""

from __future__ import annotations

import torch
from prunekernels import head_pair_stats, pair_stats, reference
from tolerances import mismatches, precise_kl_rounding
from torch import Tensor

#: By how much rows differ for a KL of about 0.05, 1e-5 and 1e-7; and rows that do not.
NOISES = (0.3, 4.5e-3, 4.5e-4, 0.0)
#: By how many 2⁻¹³ hidden states differ at most, for KLs about as large.
STEPS = (1500, 20, 2, 0)
#: The vocabulary from which on roundings average out as they did when the table was found.
LONG = 151936
KLS = ("kl_base_other", "kl_other_base")
#: What equal rows give, to the last bit.
EQUAL = dict.fromkeys((*KLS, "one_minus_cos_prob", "one_minus_cos_logit", "kl_estimate"), 0.0)
EQUAL |= {"uniform_variance": 0.0, "cos_prob": 1.0, "cos_logit": 1.0}

#: What sums in float64; kernels sum in float32 at every level.
EXACT = (("eager", "precise"), ("eager", "full"))


def pair(
    kind: str,
    vocab: int,
    noises: tuple[float, ...] = NOISES,
    *,
    dtype: torch.dtype = torch.float32,
    offsets: tuple[float, float] = (0.0, 0.0),
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Rows with a language model's heavy head over a broad tail ("peaked"), or nearly "flat" ones.

    Args:
        kind: "peaked" or "flat".
        vocab: V.
        noises: by how much the two rows of a pair differ, per pair.
        dtype: of the logits.
        offsets: added to all logits of base and of other.
        device: where the logits are.
    """
    base = torch.randn(len(noises), vocab)
    if kind == "flat":
        base *= 0.01
    else:
        head = min(vocab, 20)
        base *= 2.5
        base[:, :head] += torch.linspace(14, 4, 20)[:head]
    other = base + torch.tensor(noises)[:, None] * torch.randn(base.shape)
    shifted = (base + offsets[0], other + offsets[1])
    return shifted[0].to(device, dtype), shifted[1].to(device, dtype)


def check_table(
    got: dict[str, Tensor], base: Tensor, other: Tensor, level: str, sums: str, tile: int = 4096
) -> None:
    """Every field as the table has it for `sums`, KL for `level`; equal rows exactly 0 and 1.

    Args:
        got: fields by name, of `pair_stats`.
        base: logits `(N, V)`.
        other: logits `(N, V)`.
        level: the level that was asked for.
        sums: "core" if sums are float32, else "precise".
        tile: columns that share a centre.
    """
    exact = reference.pair_stats(base.double(), other.double(), level=level)
    vocab = base.shape[-1]
    rest = {name: value for name, value in got.items() if name not in KLS}
    kls = {name: value for name, value in got.items() if name in KLS}
    wrong = mismatches(rest, exact, level=sums, vocab=vocab)
    rounding = torch.zeros(2, len(base), dtype=torch.float64, device=base.device)
    if level != sums and vocab < LONG:
        rounding = precise_kl_rounding(base, other, temperature=1.0, tile=tile)
    extra = dict(zip(KLS, rounding, strict=True))
    wrong += mismatches(kls, exact, level=level, vocab=vocab, extra=extra)
    assert not wrong, "\n".join(wrong)
    equal = (base == other).all(1)
    for name, value in got.items():
        if name in EQUAL:
            assert (value[equal] == EQUAL[name]).all(), name


def check_pair(impl: str, base: Tensor, other: Tensor, level: str) -> None:
    """`pair_stats` by `impl` as the table has it."""
    got = pair_stats(base, other, level=level, impl=impl).as_dict()
    check_table(got, base, other, level, "precise" if (impl, level) in EXACT else "core")


def check_head(
    impl: str, vocab: int, level: str, *, steps: tuple[int, ...] = STEPS, device: str = "cpu"
) -> None:
    """Hidden states and a head whose products float32 holds exactly: only the sums round."""
    width = 16
    hidden = torch.randint(-(2**14), 2**14 + 1, (len(steps), width)).float() / 2**13
    change = torch.stack([torch.randint(-n, n + 1, (width,)) for n in steps]).float() / 2**13
    head = torch.randint(-16, 17, (vocab, width)).float() / 16
    hidden, change, head = (x.to(device) for x in (hidden, change, head))
    base, other = (x.double() @ head.double().T for x in (hidden, hidden + change))
    assert torch.equal(base.float().double(), base) and torch.equal(other.float().double(), other)
    got = head_pair_stats(hidden, hidden + change, head, level=level, impl=impl).as_dict()
    check_table(got, base, other, level, "precise" if (impl, level) in EXACT else "core")


def of_splits(
    base: Tensor, other: Tensor, labels: Tensor, splits: int, level: str, impl: str = "triton"
) -> dict[str, Tensor]:
    """Statistics by the kernels from any number of splits, by name."""
    from prunekernels.metrics import pair_triton
    from prunekernels.metrics.fields import unpack_pair
    from prunekernels.metrics.options import PairOptions

    options = PairOptions(level=level, labels=True)
    design = "warp" if impl == "triton_warp" else "tile"
    state = pair_triton.partial_state(base, other, labels, options, splits=splits, design=design)
    packed, _, _ = state.finish(design)
    return unpack_pair(packed, base.shape[:-1], options, False).as_dict()
