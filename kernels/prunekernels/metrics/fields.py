"""The results of the metric ops: frozen dataclasses of tensors that share their leading shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from prunekernels.metrics import result_rows
from prunekernels.metrics.options import PairOptions

_Self = TypeVar("_Self", bound="_Fields")


class Layout(NamedTuple):
    """Where the fields of a result are in the blocks that an op fills.

    Attributes:
        places: Block and row of each field.
        names: All that the result holds; what is not in `places` has its default.
    """

    places: Mapping[str, tuple[int, int]]
    names: tuple[str, ...]


_NOTHING = Layout({}, ()), ()


@dataclass(frozen=True, eq=False, repr=False)
class _Fields:
    """Tensors, or nested groups of tensors; None, or not there, for what was not asked for.

    A result of `later` makes a field when it is first asked for.
    """

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Called for what is not there, or not yet: a choice of `fields` leaves others unset.
            layout, blocks = self.__dict__.get("_packed", _NOTHING)
            if (place := layout.places.get(name)) is not None:
                value = self.__dict__[name] = blocks[place[0]][place[1]]
                return value
            kind = type(self).__name__
            if name in self.__dataclass_fields__:
                raise AttributeError(
                    f"this {kind} has no {name}: it holds {', '.join(self._held())}; "
                    f"ask for it with fields=(…, {name!r})"
                )
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    @classmethod
    def of(cls: type[_Self], values: dict[str, Any]) -> _Self:
        """A result that holds these fields, and no others."""
        made = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def later(cls: type[_Self], layout: Layout, blocks: Sequence[Tensor]) -> _Self:
        """A result whose fields are rows of blocks `(fields, …)`."""
        made = object.__new__(cls)
        made.__dict__["_packed"] = layout, blocks
        return made

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every field that a result can have."""
        return tuple(field.name for field in fields(cls))

    def _held(self) -> dict[str, Any]:
        """All that it holds, by name; fields that were not asked for yet are made."""
        layout, _ = self.__dict__.get("_packed", _NOTHING)
        return {name: getattr(self, name) for name in layout.names} or vars(self)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the fields."""
        return dict(self._held())

    def __repr__(self) -> str:
        held = (f"{name}={value!r}" for name, value in self._held().items())
        return f"{type(self).__name__}({', '.join(held)})"

    def map(self: _Self, fn: Callable[[Tensor], Tensor]) -> _Self:
        """Apply `fn` to every tensor, nested groups included."""
        changed: dict[str, Any] = {}
        for name, value in self._held().items():
            if isinstance(value, Tensor):
                value = fn(value)
            elif isinstance(value, _Fields):
                value = value.map(fn)
            changed[name] = value
        return self.of(changed)

    def __getitem__(self: _Self, index: Any) -> _Self:
        """Index the leading dimensions of every tensor alike."""
        return self.map(lambda tensor: tensor[index])

    def to(
        self: _Self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Self:
        """Move every tensor to `device`; `dtype` applies to the floating ones."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return self.map(move)

    @classmethod
    def cat(cls: type[_Self], parts: Sequence[_Self], dim: int = 0) -> _Self:
        """Rows of several results as one, such as those of several processes.

        Args:
            parts: results with the same fields, at least one.
            dim: leading dimension along which the rows are put one after the other.
        """
        joined: dict[str, Any] = {}
        for name in parts[0]._held():
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], Tensor):
                joined[name] = torch.cat(values, dim)
            elif isinstance(values[0], _Fields):
                joined[name] = type(values[0]).cat(values, dim)
        return cls.of(joined)

    def as_dict(self) -> dict[str, Tensor]:
        """Every tensor by name; those of a nested group as "topk.…" and "subset.…"."""
        flat: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name, None)
            if isinstance(value, Tensor):
                flat[field.name] = value
            elif isinstance(value, _Fields):
                flat.update({f"{field.name}.{key}": item for key, item in value.as_dict().items()})
        return flat


@dataclass(frozen=True, eq=False, repr=False)
class TopKStats(_Fields):
    """The likeliest tokens of both rows (k of each, equal logits in the order of their ids).

    The two KLs are over k+1 outcomes, base's top k and one bucket for all the rest, so they are
    never negative and never above the KL of the full vocabulary.

    Attributes:
        ids_base: `(…, k)` int64, base's top tokens, likeliest first.
        ids_other: `(…, k)` int64, other's.
        values_base: `(…, k)`, base's logits at `ids_base`.
        values_other: `(…, k)`, other's logits at `ids_other`.
        prob_base: `(…, k)`, p at `ids_base`.
        prob_other: `(…, k)`, q at `ids_other`.
        cross_base: `(…, k)`, base's logits at `ids_other`.
        cross_other: `(…, k)`, other's logits at `ids_base`.
        overlap: `(…)`, the share of ids that both lists hold.
        mass_base: `(…)`, Σp over `ids_base`.
        mass_other: `(…)`, Σq over `ids_other`.
        tail_base: `(…)`, Σp outside `ids_base`.
        tail_other: `(…)`, Σq outside `ids_base` (base's list: the bucket of the KLs).
        kl_base_other: `(…)` nats, KL(p‖q) over the k+1 outcomes.
        kl_other_base: `(…)` nats, KL(q‖p) over the k+1 outcomes.
    """

    ids_base: Tensor
    ids_other: Tensor
    values_base: Tensor
    values_other: Tensor
    prob_base: Tensor
    prob_other: Tensor
    cross_base: Tensor
    cross_other: Tensor
    overlap: Tensor
    mass_base: Tensor
    mass_other: Tensor
    tail_base: Tensor
    tail_other: Tensor
    kl_base_other: Tensor
    kl_other_base: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class PairStats(_Fields):
    """How two rows of logits a (base) and b (other) differ, per row.

    p = softmax(a/T), q = softmax(b/T), d = b−a; KL, entropies and log-normalisers in nats. Every
    tensor has the logits' leading shape; float32 unless said. A token that is −inf in both rows
    is left out; one that is −inf in a single row makes the KL that sees it, and the sizes of d,
    +inf, and the angles of the logits NaN. A row that holds NaN or +inf (or only −inf) has NaN
    everywhere, False flags, and argmax −1 on the side at fault.

    Attributes:
        kl_base_other: KL(p‖q).
        kl_other_base: KL(q‖p).
        entropy_base: H(p).
        entropy_other: H(q).
        lse_base: log Σ e^{a/T}.
        lse_other: log Σ e^{b/T}.
        cos_prob: cosine of p and q.
        one_minus_cos_prob: 1−cos(p, q), without cancellation.
        cos_logit: cosine of a and b.
        one_minus_cos_logit: 1−cos(a, b), without cancellation.
        alpha: ⟨d, a⟩/‖a‖².
        parallel_ratio: ‖d∥‖/‖a‖ = |alpha|.
        orthogonal_ratio: ‖d⊥‖/‖a‖.
        kl_estimate: Var_p(d)/2T², the second-order estimate of both KLs (`weights="other"`: Var_q).
        one_minus_cos_prob_estimate: Var_r(d)/2T², r = p²/Σp² (`weights="other"`: of q²), the
            second-order estimate of 1−cos(p, q).
        uniform_variance: Var(d), all tokens weighing the same (logit units squared).
        delta_l1: Σ|d|.
        delta_l2: Σd² (the squared norm).
        argmax_base: int64, first index of the largest a.
        argmax_other: int64, first index of the largest b.
        flipped: bool, whether the two differ.
        margin_base: lead of the largest a over the next (0 for a tie, +inf if V = 1).
        margin_other: the same for b.
        tie: bool, whether either margin is 0 (common in bfloat16: a flip may be an accident).
        estimate_valid: bool, whether the second-order estimates describe the change: with
            Var = 2·kl_estimate and J = KL(p‖q)+KL(q‖p), both are at most 1 and within a factor of
            2 of one another (or of 1e-5). See `closed_form.estimate_applies`.
        nll_base: −ln p(label), with `labels`.
        nll_other: −ln q(label), with `labels`.
        prob_delta: q(label)−p(label), with `labels`.
        js: Jensen–Shannon divergence, with `level="full"`.
        total_variation: Σ|q−p|/2, with `level="full"`.
        hellinger: sqrt(Σ(√q−√p)²/2), with `level="full"`.
        topk: the likeliest tokens, with `topk`.
        subset: all of this again on the softmax over the given tokens, with `subset`; argmax is
            an index into the subset, and `subset.lse_base − lse_base` is the log of its mass.
    """

    kl_base_other: Tensor
    kl_other_base: Tensor
    entropy_base: Tensor
    entropy_other: Tensor
    lse_base: Tensor
    lse_other: Tensor
    cos_prob: Tensor
    one_minus_cos_prob: Tensor
    cos_logit: Tensor
    one_minus_cos_logit: Tensor
    alpha: Tensor
    parallel_ratio: Tensor
    orthogonal_ratio: Tensor
    kl_estimate: Tensor
    one_minus_cos_prob_estimate: Tensor
    uniform_variance: Tensor
    delta_l1: Tensor
    delta_l2: Tensor
    argmax_base: Tensor
    argmax_other: Tensor
    flipped: Tensor
    margin_base: Tensor
    margin_other: Tensor
    tie: Tensor
    estimate_valid: Tensor
    nll_base: Tensor | None = None
    nll_other: Tensor | None = None
    prob_delta: Tensor | None = None
    js: Tensor | None = None
    total_variation: Tensor | None = None
    hellinger: Tensor | None = None
    topk: TopKStats | None = None
    subset: PairStats | None = None


@dataclass(frozen=True, eq=False, repr=False)
class VectorStats(_Fields):
    """How two vectors h (base) and h+Δ (other) differ, per row; float32, the leading shape.

    Attributes:
        cosine: cos(h, h+Δ).
        one_minus_cosine: 1−cosine, without cancellation.
        one_minus_cosine_estimate: ‖Δ⊥‖²/2‖h‖², its second-order estimate.
        alpha: ⟨Δ, h⟩/‖h‖².
        parallel_ratio: ‖Δ∥‖/‖h‖ = |alpha|.
        orthogonal_ratio: ‖Δ⊥‖/‖h‖.
        norm_base: ‖h‖.
        norm_other: ‖h+Δ‖.
    """

    cosine: Tensor
    one_minus_cosine: Tensor
    one_minus_cosine_estimate: Tensor
    alpha: Tensor
    parallel_ratio: Tensor
    orthogonal_ratio: Tensor
    norm_base: Tensor
    norm_other: Tensor


def packed_like(like: Tensor, options: PairOptions, subset: bool) -> list[Tensor]:
    """Uninitialised tensors as a pair op returns for `like` (…, V or D): of fake and meta ones."""
    rows = like.numel() // like.shape[-1]
    packed = []
    for some in (options, options.of_subset)[: 1 + subset]:
        packed.append(like.new_empty(len(some.floats), rows, dtype=torch.float32))
        packed.append(like.new_empty(len(result_rows.PAIR_IDS), rows, dtype=torch.int64))
        packed.append(like.new_empty(len(result_rows.PAIR_FLAGS), rows, dtype=torch.bool))
    if topk := options.topk:
        packed.append(like.new_empty(len(result_rows.TOPK_FLOATS), rows, topk, dtype=torch.float32))
        packed.append(like.new_empty(len(result_rows.TOPK_ROWS), rows, dtype=torch.float32))
        packed.append(like.new_empty(len(result_rows.TOPK_IDS), rows, topk, dtype=torch.int64))
    return packed


def unpack_pair(
    packed: list[Tensor], lead: torch.Size, options: PairOptions, subset: bool
) -> PairStats:
    """Name the rows of a pair op's packed result and give them their leading shape."""
    # fields that have a default are found before `later` can make them
    defaults = subset or options.topk or options.labels or options.second_pass
    if options.fields and not (defaults or torch.compiler.is_compiling()):
        flat = len(lead) == 1
        blocks = packed if flat else [block.view(block.shape[0], *lead) for block in packed]
        return PairStats.later(_pair_layout(options), blocks)
    named = _name_pair(packed[:3], lead, options)
    if subset:
        inner = _name_pair(packed[3:6], lead, options.of_subset)
        named["subset"] = PairStats.of(inner) if options.fields else PairStats(**inner)
    if options.topk:
        floats, rows, ids = packed[-3:]
        top = {
            name: row.reshape(*lead, options.topk)
            for names, block in ((result_rows.TOPK_FLOATS, floats), (result_rows.TOPK_IDS, ids))
            for name, row in zip(names, block, strict=True)
        }
        top |= {
            name: row.reshape(lead) for name, row in zip(result_rows.TOPK_ROWS, rows, strict=True)
        }
        named["topk"] = TopKStats(**top)
    return PairStats.of(named) if options.fields else PairStats(**named)


def pair_places(options: PairOptions) -> dict[str, tuple[int, int]]:
    """Which block of a pair op's result, and which row of it, each field asked for is."""
    kinds = (options.floats, result_rows.PAIR_IDS, result_rows.PAIR_FLAGS)
    asked = set(options.fields.split(","))
    return {
        name: (block, row)
        for block, names in enumerate(kinds)
        for row, name in enumerate(names)
        if not options.fields or name in asked
    }


@functools.lru_cache(256)
def _pair_layout(options: PairOptions) -> Layout:
    places = pair_places(options)
    return Layout(places, tuple(places))


def _name_pair(packed: list[Tensor], lead: torch.Size, options: PairOptions) -> dict[str, Any]:
    blocks = [block.view(block.shape[0], *lead).unbind(0) for block in packed]
    return {name: blocks[block][row] for name, (block, row) in pair_places(options).items()}
