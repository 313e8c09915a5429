"""Both sides of a comparison as rows of logits that are not there until they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from prunekernels import PairStats, head_pair_stats, pair_stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.evaluation.scoring import right_padded
from prunekit.models.architectures import input_device
from prunekit.models.token_ids import check_ids

_LOGITS_PER_CHUNK = 2**21  # logits of one side held at once: 8 MiB in float32
_FEWEST_ROWS = 32  # multiplied by a head at once on a CPU, so that reading the head costs little


@dataclass(frozen=True)
class Options:
    """How rows are computed.

    Attributes:
        topk: Likeliest tokens whose overlap is reported; 0 for none.
        batch_tokens: Padded tokens per forward pass.
        device: Where models go.
        progress: Show bars.
    """

    topk: int = 10
    batch_tokens: int = 1024
    device: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class Readout:
    """The map from final normed states to logits: softcap(scale · (h Wᵀ + bias)).

    Attributes:
        weight: (vocabulary, width); None where `module` maps states to h Wᵀ + bias instead.
        bias: (vocabulary,) or None.
        softcap: c in c·tanh(z/c), or None.
        scale: Factor of the logits, or None.
        module: A head that is no plain matrix, such as a quantised one.
        vocabulary: Number of logits.
    """

    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None
    scale: float | None
    vocabulary: int
    module: nn.Module | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Readout:
        """The readout of a causal language model.

        Raises:
            PrunekitError: The model's logits are not those of its head, scaled and capped.
        """
        head: Any = model.get_output_embeddings()
        if head is None or model.base_model is model:
            raise PrunekitError(
                f"{type(model).__name__} has no separate base model and output head: load a causal "
                "language model"
            )
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None)
        if scale is None and getattr(config, "logits_scaling", None) is not None:
            scale = 1.0 / config.logits_scaling
        softcap = getattr(config, "final_logit_softcapping", None)
        weight: Any = getattr(head, "weight", None)
        plain = type(head) is nn.Linear and type(weight) in (Tensor, nn.Parameter)
        if plain and weight.is_floating_point() and weight.dtype.itemsize > 1:
            bias = None if head.bias is None else head.bias.detach()
            made = cls(weight.detach(), bias, softcap, scale, weight.shape[0])
        else:
            width = config.hidden_size
            probe = torch.zeros(1, width, dtype=model.dtype, device=weight.device)
            made = cls(None, None, softcap, scale, head(probe).shape[-1], head)
        made._check(model)
        return made

    def _check(self, model: PreTrainedModel) -> None:
        """See that base model and readout give the model's own logits, over three tokens."""
        ids = torch.arange(3, 6, device=input_device(model))[None]
        theirs = model(input_ids=ids, use_cache=False).logits.to("cpu", torch.float64)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = self.logits(states, self.vocabulary).cpu().double()
        # Room for half-precision rounding; a forgotten scale is far outside it.
        known = theirs[0].isfinite().all()
        if known and (ours - theirs[0]).abs().max() > 0.02 * theirs.abs().max():
            raise PrunekitError(
                f"{type(model).__name__} changes its logits after the output head in a way "
                "prunekit does not know: compare another architecture, or capture its logits"
            )

    def to(self, device: torch.device) -> Readout:
        """The same map with its matrix on `device`."""
        held = {"weight": self.weight, "bias": self.bias}
        moved = {name: None if part is None else part.to(device) for name, part in held.items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def plain(self) -> Readout:
        """The same map with a matrix for the module, found by applying it to unit vectors."""
        if self.module is None:
            return self
        reference = next(p for p in self.module.parameters() if p is not None)
        width = int(self.module.in_features)  # type: ignore[arg-type]
        dtype = reference.dtype if reference.is_floating_point() else torch.float32
        zero = torch.zeros(1, width, dtype=dtype, device=reference.device)
        bias = self.module(zero)[0]
        columns = [
            self.module(torch.eye(width, dtype=dtype, device=zero.device)[start : start + 256])
            for start in range(0, width, 256)
        ]
        weight = (torch.cat(columns) - bias).t().contiguous()
        return replace(self, module=None, weight=weight, bias=bias if bias.any() else None)

    def logits(self, states: Tensor, vocabulary: int) -> Tensor:
        """The first `vocabulary` logits (n, vocabulary) of states (n, width), in float32."""
        if self.module is not None:
            logits = self.module(states).float()[:, :vocabulary]
        else:
            assert self.weight is not None
            weight = self.weight[:vocabulary]
            logits = _product(states.to(weight.device), weight)
            if self.bias is not None:
                logits += self.bias[:vocabulary]
        if self.scale is not None:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def same_after(self, other: Readout, vocabulary: int) -> bool:
        """Whether two matrices' logits go through the same bias, scale and cap."""
        if self.module is not None or other.module is not None:
            return False
        if (self.softcap, self.scale) != (other.softcap, other.scale):
            return False
        if self.bias is None or other.bias is None:
            return self.bias is other.bias
        mine = self.bias[:vocabulary].to(other.bias.device)
        return mine.dtype == other.bias.dtype and torch.equal(mine, other.bias[:vocabulary])


@dataclass(frozen=True)
class Rows:
    """One side's predictions at n positions: hidden states and a readout, or logits.

    Attributes:
        values: (n, width) final normed states, or (n, vocabulary) logits where `readout` is None.
        readout: What reads the states.
    """

    values: Tensor
    readout: Readout | None = None

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return self.values.shape[1] if self.readout is None else self.readout.vocabulary

    def logits(self, rows: slice, vocabulary: int, device: torch.device) -> Tensor:
        """The first `vocabulary` logits of some positions, float32, on `device`."""
        values = self.values[rows]
        if self.readout is None:
            return values[:, :vocabulary].to(device, torch.float32)
        return self.readout.logits(values, vocabulary).to(device)


def compare(base: Rows, other: Rows, labels: Sequence[int], **options: Any) -> PairStats:
    """Statistics of two sides at the same positions, over the vocabulary that both have.

    Where both sides are states of one width and plain matrices that share bias, scale and cap, the
    logits never exist (`head_pair_stats`); else a few rows of them at a time (`pair_stats`).

    Args:
        base: The reference's side.
        other: The candidate's.
        labels: The tokens that follow.
        options: `level`, `fields`, `topk` of the metric ops.
    """
    vocabulary = min(base.vocabulary, other.vocabulary)
    ours, theirs = base.readout, other.readout
    if ours is not None and theirs is not None:
        same_width = base.values.shape[1] == other.values.shape[1]
        if same_width and ours.same_after(theirs, vocabulary):
            return _of_states(base, other, vocabulary, labels, options)
    device = other.values.device
    step = max(1, _LOGITS_PER_CHUNK // vocabulary)
    targets = torch.tensor(labels, device=device)
    parts = []
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        logits = [side.logits(rows, vocabulary, device) for side in (base, other)]
        parts.append(pair_stats(*logits, labels=targets[rows], **options))
    return PairStats.cat(parts)


def _of_states(
    base: Rows, other: Rows, vocabulary: int, labels: Sequence[int], options: dict[str, Any]
) -> PairStats:
    assert base.readout is not None and other.readout is not None
    mine, own = base.readout.weight, other.readout.weight
    assert mine is not None and own is not None
    device = own.device
    dtype = torch.promote_types(base.values.dtype, other.values.dtype)
    bias = other.readout.bias
    heads = mine.to(device)[:vocabulary], None if mine is own else own[:vocabulary]
    targets = torch.tensor(labels, device=device)
    step = len(labels)
    if device.type == "cpu":  # where the op holds as many logits as it is given rows for
        step = max(_FEWEST_ROWS, _LOGITS_PER_CHUNK // vocabulary)
    parts = []
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        found = head_pair_stats(
            base.values[rows].to(device, dtype),
            other.values[rows].to(device, dtype),
            heads[0],
            other_head_weight=heads[1],
            bias=None if bias is None else bias[:vocabulary],
            softcap=other.readout.softcap,
            logit_scale=other.readout.scale,
            labels=targets[rows],
            **options,
        )
        parts.append(found)
    return PairStats.cat(parts)


def states_of(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    firsts: Sequence[int],
    batch_tokens: int,
) -> Tensor:
    """Final normed states (n, width) that predict the scored tokens of some windows, in order.

    Args:
        model: In eval mode.
        ids: Token ids of each window; the last is not read.
        firsts: Index of each window's first scored token.
        batch_tokens: Padded tokens per forward pass (one window may exceed it).

    Raises:
        PrunekitError: A window holds an id that the model's embedding lacks.
    """
    fed = [list(window[:-1]) for window in ids]
    for window in fed:
        check_ids(model, window, "the text")
    longest = max(map(len, fed))
    size = max(1, batch_tokens // longest)
    parts = []
    for start in range(0, len(fed), size):
        batch = fed[start : start + size]
        padded, _ = right_padded(batch, input_device(model))
        hidden = model.base_model(input_ids=padded, use_cache=False).last_hidden_state
        for row, window in enumerate(batch):
            parts.append(hidden[row, firsts[start + row] - 1 : len(window)])
    return torch.cat(parts)


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """`states @ weight.T` with float32 sums, a slice of a 16-bit weight at a time on a CPU."""
    if weight.dtype == torch.float32:
        return states.float() @ weight.t()
    if states.is_cuda and states.dtype == weight.dtype:
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    states = states.float()
    return torch.cat([states @ part.float().t() for part in torch.split(weight, 4096)], 1)
