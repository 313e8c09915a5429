"""What is asked of a pair of logit rows, and of the output head that makes them.

`PairOptions` is checked once, where a public function receives its arguments, and is then handed
on whole. Only the custom ops take its scalars one by one (`PairOptions.scalars`), because a torch
operator has no other arguments; tensors (labels, a subset of ids) never are part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from prunekernels import checks
from prunekernels.metrics import needed_sums
from prunekernels.metrics.result_rows import (
    FULL_FLOATS,
    LABEL_FLOATS,
    LEVELS,
    PAIR_FLAGS,
    PAIR_IDS,
    WEIGHTS,
    chosen,
    pair_floats,
)
from prunekernels.runtime import keep

_T = TypeVar("_T")


@dataclass(frozen=True)
class PairOptions:
    """The choices that the pair ops share.

    Attributes:
        temperature: T, by which both rows are divided.
        topk: how many of the likeliest tokens are reported.
        level: "core", "precise" or "full".
        weights: "base" or "other": whose distribution weighs the second-order estimates.
        fields: names asked for in the order of a result, with commas between them; "" for all.
        labels: whether there are labels.
    """

    temperature: float = 1.0
    topk: int = 0
    level: str = "core"
    weights: str = "base"
    fields: str = ""
    labels: bool = False

    @classmethod
    def checked(
        cls,
        op: str,
        vocab: int,
        *,
        labels: bool,
        temperature: float = 1.0,
        topk: int = 0,
        level: str = "core",
        weights: str = "base",
        fields: Sequence[str] | None = None,
    ) -> PairOptions:
        """The options of a call of the public function `op` on logits of `vocab` columns.

        Raises:
            ValueError: for an unknown level, weighting or field, a field that the level or the
                missing labels rule out, a temperature that is not above 0, or k above V.
        """
        fields = checks.names(op, fields)
        key: tuple[Any, ...] | None = None
        if not torch.compiler.is_compiling():
            key = (op, vocab, labels, temperature, topk, level, weights, fields)
            try:
                known = _checked.get(key)
            except TypeError:  # something that no option can be, such as a list
                known = None
            if known is not None:
                return known
        if level not in LEVELS:
            raise ValueError(f"{op}: level must be one of {', '.join(LEVELS)}, got {level!r}")
        if weights not in WEIGHTS:
            raise ValueError(f"{op}: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        checks.positive(op, "temperature", temperature)
        if not isinstance(topk, int) or isinstance(topk, bool):
            raise ValueError(f"{op}: topk must be a whole number, got {topk!r}")
        if not 0 <= topk <= vocab:
            raise ValueError(f"{op}: topk must lie in 0..{vocab} (the vocabulary), got {topk}")
        asked = _field_names(op, fields, level, labels)
        made = cls(float(temperature), topk, level, weights, asked, labels)
        if key is not None:
            keep(_checked, key, made)
        return made

    @property
    def scalars(self) -> tuple[float, int, str, str, str]:
        """All of it but `labels`, in order: what a custom op takes beside its tensors."""
        return self.temperature, self.topk, self.level, self.weights, self.fields

    @property
    def precise(self) -> bool:
        """Whether a small divergence keeps its digits."""
        return self.level != "core"

    @property
    def by_other(self) -> bool:
        """Whether the second-order estimates are weighted by other."""
        return self.weights == "other"

    @property
    def floats(self) -> tuple[str, ...]:
        """Names of the float fields asked for, in packed order."""
        return self._kept("_floats", lambda: pair_floats(self.level, self.labels, self.fields))

    @property
    def asked(self) -> frozenset[str]:
        """Names of the float fields and flags asked for: what sums must be there for."""
        return self._kept(
            "_asked", lambda: frozenset((*self.floats, *chosen(PAIR_FLAGS, self.fields)))
        )

    @property
    def second_pass(self) -> tuple[str, ...]:
        """Those of the float fields for which the logits are read a second time."""
        return tuple(name for name in FULL_FLOATS if name in self.floats)

    @property
    def names_tokens(self) -> bool:
        """Whether a field needs the id of a largest logit, or its lead."""
        of_tokens = (*PAIR_IDS, "flipped", "tie", "margin_base", "margin_other")
        return len(chosen(of_tokens, self.fields)) > 0

    @property
    def light(self) -> bool:
        """Whether masses and divergences in float32 are all that is asked for (`sums.light`)."""
        few = frozenset((*needed_sums.MASSES, *needed_sums.DIVERGENCES))
        return self._kept(
            "_light",
            lambda: (
                not (self.precise or self.topk or self.names_tokens)
                and self.sums(float32=False) <= few
            ),
        )

    @property
    def of_subset(self) -> PairOptions:
        """The options of the softmax over a subset of the tokens: no labels, no top tokens."""
        return replace(self, labels=False, topk=0)

    def _kept(self, name: str, make: Callable[[], _T]) -> _T:
        """What `make` returns, made once (`functools.cached_property` cannot be traced)."""
        if torch.compiler.is_compiling():
            return make()
        if name not in self.__dict__:
            self.__dict__[name] = make()
        kept: _T = self.__dict__[name]
        return kept

    def sums(self, *, float32: bool) -> frozenset[str]:
        """Names of the sums that the fields need.

        Args:
            float32: whether they are summed in float32, where the precise level needs φ sums too.
        """
        precise = float32 and self.precise
        return self._kept(
            f"_sums_{float32}",
            lambda: needed_sums.sums(self.asked, weights=self.weights, precise=precise),
        )


#: What was found good, by the arguments of `PairOptions.checked`.
_checked: dict[tuple[Any, ...], PairOptions] = {}


@dataclass(frozen=True, eq=False)
class OutputHead:
    """How hidden states become logits: head(norm(h)), head(h) = cap(scale·(h·Wᵀ + bias)).

    Attributes:
        weight: `(V, D)` output embedding.
        other_weight: `(V, D)` head of the other states; None if it is the same one.
        bias: `(V,)` or None.
        norm_weight: `(D,)` weight of the RMS norm, or None for no norm.
        norm_eps: ε of the norm.
        softcap: cap(z) = softcap·tanh(z/softcap), or None.
        logit_scale: or None.
    """

    weight: Tensor
    other_weight: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_eps: float = 1e-6
    softcap: float | None = None
    logit_scale: float | None = None

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The heads of base and of other: one tensor twice if there is no other head."""
        return self.weight, self.weight if self.other_weight is None else self.other_weight

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Weight, other weight, bias and norm weight, as the custom op takes them."""
        return self.weight, self.other_weight, self.bias, self.norm_weight

    def only(self, tokens: Tensor) -> OutputHead:
        """The head of a subset of the tokens."""
        other, bias = self.other_weight, self.bias
        return replace(
            self,
            weight=self.weight.index_select(0, tokens),
            other_weight=None if other is None else other.index_select(0, tokens),
            bias=None if bias is None else bias.index_select(0, tokens),
        )


def checked_labels(
    op: str, labels: Tensor | None, lead: torch.Size, device: torch.device
) -> Tensor | None:
    """The labels as int64, checked against the leading shape of the logits."""
    if labels is None:
        return None
    checks.integers(op, "labels", labels, device)
    if labels.shape != lead:
        raise ValueError(
            f"{op}: labels must have the logits' leading shape {tuple(lead)}, "
            f"got {tuple(labels.shape)}"
        )
    return labels.long()


def checked_subset(
    op: str, subset: Tensor | Sequence[int] | None, device: torch.device
) -> Tensor | None:
    """The ids of a subset as an int64 tensor on the logits' device."""
    if subset is None:
        return None
    if not isinstance(subset, Tensor):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{op}: subset is a {type(subset).__name__}, and a CUDA graph is being captured; "
                f"pass torch.tensor(subset, device={str(device)!r}) made beforehand"
            )
        try:
            ids = list(subset)
            # without a type, so that numbers which are no integers are refused and not rounded
            subset = torch.tensor(ids, dtype=None if ids else torch.int64, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{op}: subset must be a non-empty list of token ids, got {subset!r}"
            ) from error
    checks.integers(op, "subset", subset, device)
    if subset.dim() != 1 or subset.numel() == 0:
        raise ValueError(
            f"{op}: subset must be a non-empty list of token ids, got shape {tuple(subset.shape)}"
        )
    return subset.long()


def _field_names(op: str, fields: tuple[str, ...] | None, level: str, labels: bool) -> str:
    """The names asked for in the order of a result, with commas between them; "" for all."""
    if fields is None:
        return ""
    known = needed_sums.PAIR_FIELDS
    for name in fields:
        if name not in known:
            raise ValueError(f"{op}: fields holds {name!r}, which is not one of {', '.join(known)}")
        if name in LABEL_FLOATS and not labels:
            raise ValueError(f"{op}: fields holds {name!r}, which needs labels=")
        if name in FULL_FLOATS and level != "full":
            raise ValueError(
                f"{op}: fields holds {name!r}, which needs level='full', got {level!r}"
            )
    return ",".join(name for name in known if name in fields)
